"""The choices of tests on the command line; no library is imported here."""

from __future__ import annotations

import argparse

from a2sf.errors import ConfigError

FAMILIES = ("table", "model", "sweep")
"""Which tests are corrected together."""
CORRECTIONS = ("holm", "fdr")
"""Methods: the chance of any false finding, or the share of false findings."""
MARGIN_ALLOWED = "give a number of points above 0 and up to 100"


def add_corrections(parser: argparse._ActionsContainer, usual: str = "of a table (default)") -> None:
    """The options `--family` and `--correction`.

    Args:
        usual: what the help says of the first family.
    """
    parser.add_argument(
        "--family", choices=FAMILIES, help=f"tests that are corrected together: {usual}, a model, all that is shown"
    )
    parser.add_argument(
        "--correction",
        choices=CORRECTIONS,
        default="holm",
        help="of p-values: Holm's, or the false discovery rate for explorations (default: holm)",
    )


def share_of(margin: float | None) -> float | None:
    """A margin in points as a share; None: none is given.

    Raises:
        ConfigError: if it is not above 0 and at most 100.
    """
    if margin is None:
        return None
    if not 0 < margin <= 100:
        raise ConfigError("--margin", margin, MARGIN_ALLOWED)
    return margin / 100
