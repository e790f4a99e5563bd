"""`a2sf lm-eval ...`: lm-eval's command line with the model `a2sf`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from a2sf.errors import UserError
from a2sf.hub.refusals import unfetched

OFFLINE = (
    "without a network give --include_path with tasks whose files are on this disk, or use a2sf run, whose data=bundle "
    "and data.dir need none."
)


def main(arguments: Sequence[str]) -> None:
    """Run lm-eval with `arguments`, such as `--model a2sf --model_args pretrained=...,policy=h2o,budget_ratio=0.2`.

    Raises:
        UserError: if something cannot be fetched from the hub.
    """
    from lm_eval.__main__ import cli_evaluate

    import a2sf.lm  # noqa: F401  # registers the model

    # lm-eval's default is a GPU, even if there is none
    for_a2sf = "a2sf" in arguments and not any(a.partition("=")[0] == "--device" for a in arguments)
    sys.argv = ["a2sf lm-eval", *arguments, *(["--device", "auto"] if for_a2sf else [])]  # lm-eval reads sys.argv
    try:
        cli_evaluate()
    except UserError:
        raise
    except Exception as error:  # of datasets, transformers or the libraries that they use
        if (what := unfetched(error)) is None:
            raise
        raise UserError(f"{what}; {OFFLINE}") from error
