"""A metric may be a number of any kind; what is none is said, not lost in silence."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from a2sf.errors import Notice
from a2sf.store.runs import load_sweep
from a2sf.sweep.runner import Runner
from a2sf.tasks.numbers import index_of, number_of
from tests.unit.sweep.test_sweep import cell, runner  # noqa: F401

TASK = """
task: own_numbers
custom_dataset: !function numbered.documents
output_type: {kind}
test_split: test
doc_to_text: "{{{{goal}}}}"
doc_to_choice: {choices}
doc_to_target: {target}
process_results: !function numbered.score
metric_list:
  - {{metric: small, aggregation: !function numbered.single, higher_is_better: true}}
  - {{metric: whole, aggregation: !function numbered.count, higher_is_better: true}}
  - {{metric: held, aggregation: !function numbered.tensor, higher_is_better: true}}
  - {{metric: many, aggregation: !function numbered.listed, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
CODE = """
import numpy as np
import torch
from datasets import Dataset

def documents(**other):
    rows = [{"goal": f"so {i}", "choices": ["yes", "no"], "label": i % 2, "n": i} for i in range(3)]
    return {"test": Dataset.from_list(rows)}

def right(doc):
    return np.int64(doc["label"])

def score(doc, results):
    n = doc["n"]
    return {"small": np.float32(n / 2), "whole": np.int64(n), "held": torch.tensor(n / 4), "many": np.bool_(n > 0)}

def single(values):
    return np.float32(np.mean(values))

def count(values):
    return np.int64(sum(values))

def tensor(values):
    return torch.stack(values).mean()

def listed(values):
    return [float(v) for v in values]
"""


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.float32(2), np.float16(2), np.int64(2), np.array(2), torch.tensor(2.0), Decimal(2), Fraction(4, 2)],
)
def test_numbers_of_any_kind(value: object) -> None:
    assert number_of(value) == 2.0
    assert type(number_of(value)) is float


def test_what_is_no_number() -> None:
    for value in ("2", "N/A", None, [2], (1, 2), np.array([2, 3]), torch.ones(2), 2j, {"a": 1}):
        assert number_of(value) is None
        assert index_of(value) is None
    assert number_of(np.bool_(True)) == number_of(True) == 1.0
    assert math.isnan(number_of(np.float32("nan")))  # type: ignore[arg-type]
    assert index_of(np.int32(3)) == index_of(torch.tensor(3)) == 3
    assert index_of(2.0) is None


@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_a_tasks_metrics_are_kept_and_what_is_dropped_is_reported(kind: str, tmp_path: Path, runner: Runner) -> None:  # noqa: F811
    (tmp_path / "numbered.py").write_text(CODE)
    choices = kind == "multiple_choice"
    text = TASK.format(
        kind=kind, choices="choices" if choices else "null", target="!function numbered.right" if choices else "goal"
    )
    (tmp_path / "own.yaml").write_text(text)
    from a2sf.tasks import spec as tasks

    requested = cell(task=str(tmp_path / "own.yaml"), limit=3, data=tasks.DataSpec())
    with pytest.warns(Notice, match=r"own_numbers: its metric many is no number but list, and is not stored\."):
        (outcome,) = runner.run([requested])
    assert (outcome.status, outcome.error) == ("done", None)
    (stored,) = load_sweep(runner.directory)
    assert {m: v["value"] for m, v in stored.metrics.items()} == {"small": 0.5, "whole": 3.0, "held": 0.25}
    values = {m: stored.documents[f"metric/{m}"].tolist() for m in ("small", "whole", "held", "many")}
    assert values == {"small": [0, 0.5, 1], "whole": [0, 1, 2], "held": [0, 0.25, 0.5], "many": [0, 1, 1]}
    if choices:
        assert stored.documents["gold"].tolist() == [0, 1, 0]
