"""`a2sf lm-eval ...`: lm-eval's own command line, with the model `a2sf` registered."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Run lm-eval with `arguments`; `--model a2sf --model_args pretrained=...,policy=h2o,budget_ratio=0.2` is ours."""
    from lm_eval.__main__ import cli_evaluate

    import a2sf.lm  # noqa: F401  # registers the model

    # lm-eval's own default is a GPU, also where there is none
    ours = "a2sf" in arguments and not any(a.partition("=")[0] == "--device" for a in arguments)
    sys.argv = ["a2sf lm-eval", *arguments, *(["--device", "auto"] if ours else [])]  # which lm-eval reads
    cli_evaluate()
