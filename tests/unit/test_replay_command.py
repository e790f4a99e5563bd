"""The table of `a2sf replay` on screens of any width, and in files and pipes, which have 80 columns."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from rich.console import Console

from a2sf.analysis.results.labels import DASH
from a2sf.commands.replay import COLUMNS, LEGEND, table_of

FRAME = pd.DataFrame(
    {
        "task": ["long_multiquery_generate", "copa"],
        "document": [12, 3],
        "prompt": [1024, 20],
        "text": [32, 3],
        "retained": [204.84, 5.0],
        "loglikelihood": [-10.70314, -0.5],
        "full": [-9.1234, -0.25],
        "deviation": [0.000123, None],
        "first_difference": pd.array([None, 2], dtype="Int64"),
    }
)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_number_and_no_heading_is_cut(width):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(table_of(FRAME))
    said = out.getvalue()
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= width
    words = set(said.split())
    assert {"204.8", "5.0", "-10.7031", "-0.5000", "-9.1234", "-0.2500", "0.000123", "1024", DASH} <= words
    for word in " ".join([*COLUMNS.values(), LEGEND, "2 texts with recorded positions"]).split():
        assert word in words
