"""How many tokens a group will compute: of documents of unequal lengths, and of fewer than were asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from a2sf.evaluation import tasks
from a2sf.experiments.cell import Cell
from a2sf.experiments.estimate import Measured, _documents, _tokens
from a2sf.hf.loading import ModelSpec
from a2sf.policies.find import find_policies
from tests.conftest import SMOLLM2


def full(limit: int) -> list[Cell]:
    spec, data = ModelSpec(SMOLLM2, device="cpu"), tasks.DataSpec(source="bundle")
    return [Cell("small", spec, find_policies()["full"](), None, "copa", 0, limit, 1, data)]


def test_a_few_long_documents_count_for_what_they_are():
    lengths = [[(10, 3), (10, 4)]] * 90 + [[(500, 3), (500, 4)]] * 10
    exact = sum(c + 2 + 3 for (c, _), _ in lengths)  # a context once, all tokens but the last of each choice
    assert _tokens(full(100), lengths) == pytest.approx(exact, rel=0.05)
    assert _tokens(full(50), lengths) == pytest.approx(exact / 2, rel=0.05)


def test_a_task_has_no_more_documents_than_a_cell_found():
    lengths = [[(10, 3)]] * 6
    cells = full(200)
    measured, identity = Measured(), cells[0].identity
    for limit, n in ((4, 4), (100, 6)):
        stored = SimpleNamespace(
            cell={"model": "small", "dtype": "float32", "task": "copa", "shots": 0, "limit": limit}
            | {"identity": identity},
            result={
                "documents": {"n": n},
                "timing": {"computed_tokens": 10, "seconds": 1.0, "reused_requests": 0},
            },
            documents=pd.DataFrame({"context_tokens": [[10]] * n, "continuation_tokens": [[3]] * n}),
        )
        measured._add(stored, {("copa", 0)})
    assert list(measured.sizes.values()) == [6]
    assert measured.sizes.get(_documents(identity)) == 6
    assert measured.sizes.get(_documents(identity | {"data": {"content": "others"}})) is None
    assert _tokens(cells, lengths, 6) == _tokens(full(6), lengths) == 6 * 12
