"""Which choices of a document are right, under each filter, in what is stored of a cell."""

from __future__ import annotations

import json

import pytest
from scipy import stats

from a2sf.analysis.comparisons.fidelity import changes
from a2sf.analysis.comparisons.pairs import paired_values
from a2sf.analysis.results.chance import chance_levels
from a2sf.analysis.results.gather import grid_of
from a2sf.hf.loading import ModelSpec
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.scoring.lm import PrunedLM
from a2sf.store.runs import StoredCell, write_cell
from a2sf.sweep.cell import Cell
from a2sf.sweep.group import CellGroup
from a2sf.tasks.spec import DataSpec
from tests.conftest import SMOLLM2

YAML = """
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/ours.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
{more}
"""
CHOICES = ["this", "that", "these", "those"]
FILTERS = (
    "filter_list: [{name: plain, filter: [{function: take_first}]}, {name: again, filter: [{function: take_first}]}]"
)
MASS = """
import numpy as np

def mass(doc, results):
    p = np.exp([r[0] for r in results])
    return {"acc": float(p[:2].sum() / p.sum())}
"""


@pytest.fixture
def stored(little, tmp_path):
    """The full cache's cell and H2O's, of documents with these labels."""

    def compute(labels: list[object], more: str = "") -> list[StoredCell]:
        rows = [{"goal": f"Which one of {i}?", "choices": CHOICES, "label": label} for i, label in enumerate(labels)]
        (tmp_path / "ours.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (tmp_path / "utils.py").write_text(MASS)
        (file := tmp_path / "ours.yaml").write_text(YAML.format(folder=tmp_path, more=more))
        known = find_policies()
        ways = {known["full"](): None, known["h2o"](): Budget(ratio=0.5)}
        cells = [
            Cell("m", ModelSpec(SMOLLM2), p, b, str(file), 0, None, 0, DataSpec()).with_content()
            for p, b in ways.items()
        ]
        lm = PrunedLM(little.model, tokenizer=little.tokenizer)
        made = list(CellGroup(cells, lm.scorer, tmp_path / "runs/s").compute())
        assert [c.error for c in made] == [None, None]
        return [write_cell(tmp_path / "runs/s" / c.cell.name, c.result, c.documents, "") for c in made]

    return compute


def test_several_right_choices_are_stored_and_are_the_chance_level(stored):
    full, h2o = stored([[0, 1], [2], [1, 3, 9]])
    for cell in (full, h2o):
        assert cell.documents["gold"].tolist() == [-1, -1, -1]
        golds = [list(g) for g in cell.documents["golds"]]
        assert golds == [[0, 1], [2], [1, 3]]
        right = [float(p in g) for p, g in zip(cell.documents["prediction"], golds, strict=True)]
        assert cell.documents["metric/acc"].tolist() == right
    assert chance_levels(grid_of([full, h2o])) == {"ours": pytest.approx((0.5 + 0.25 + 0.5) / 3)}


def test_results_that_do_not_say_which_choices_are_right_have_no_chance_level(stored):
    """As earlier versions stored them."""
    cells = stored([[0, 1, 2], [1, 2, 3], [0, 3]])
    earlier = [
        write_cell(c.path.parents[1] / "t" / c.path.name, c.result, c.documents.drop(columns="golds"), "")
        for c in cells
    ]
    assert chance_levels(grid_of(earlier)) == {}


def test_a_label_beyond_the_choices_is_no_right_answer(stored):
    """The measures of closeness failed with an IndexError at its log-likelihood."""
    full, h2o = stored([0, 4, -1, 3])
    assert full.documents["gold"].tolist() == [0, -1, -1, 3]
    assert chance_levels(grid_of([full, h2o])) == {"ours": 0.125}
    earlier = [
        write_cell(c.path.parents[1] / "t" / c.path.name, c.result, c.documents.assign(gold=[0, 4, -1, 3]), "")
        for c in (full, h2o)
    ]
    for cells in ([full, h2o], earlier):
        assert changes(*cells)[0]["gold_shift"].isna().tolist() == [False, True, True, False]


def test_documents_of_each_filter_are_paired(stored):
    full, h2o = stored([0, 1, 2, 3], FILTERS)
    for metric in ("acc,plain", "acc,again", "acc_norm,again"):
        first, second, _ = paired_values(full, h2o, metric)
        assert (first.mean(), second.mean()) == (full.metrics[metric]["value"], h2o.metrics[metric]["value"])


def test_an_accuracy_that_is_a_probability_has_neither_chance_level_nor_wilsons_interval(stored):
    """As truthfulqa_mc2's."""
    full, h2o = stored([0] * 4, "process_results: !function utils.mass")
    grid = grid_of([full, h2o])
    assert chance_levels(grid) == {}
    values = full.documents["metric/acc"]
    (row,) = [r for r in grid.frame.itertuples() if r.is_full]
    assert (row.low, row.high) == pytest.approx(stats.t.interval(0.95, 3, values.mean(), values.sem()))
