"""A cell's documents: what of them names the cell, and what is kept of each."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from a2sf.app.compute import overrides_of_job
from a2sf.errors import ConfigError, UserError
from a2sf.hf.loading import ModelSpec
from a2sf.policies.find import find_policies
from a2sf.store.runs import load_sweep, results_frame
from a2sf.sweep import runner as sweep
from a2sf.sweep.cell import Cell
from a2sf.sweep.prepare import documents
from a2sf.sweep.runner import Runner
from a2sf.tasks import spec as tasks
from a2sf.tracking.tracker import Tracker, TrackerSpec
from tests.conftest import SMOLLM2
from tests.unit.sweep.test_sweep import run


def cell(data: tasks.DataSpec, task: str = "piqa", **more: object) -> Cell:
    given = {"model_name": "m", "model": ModelSpec(path=SMOLLM2, device="cpu"), "policy": find_policies()["full"]()}
    given |= {"budget": None, "task": task, "shots": 0, "limit": None, "seed": 1, "data": data}
    return Cell(**{**given, **more})  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path):
    def write(label=0, n=6, name="piqa.jsonl"):
        (tmp_path / "data").mkdir(exist_ok=True)
        rows = [{"goal": f"g{i}", "sol1": f"yes {i}", "sol2": f"no {i}", "label": label} for i in range(n)]
        (tmp_path / "data" / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return tasks.DataSpec(dir=str(tmp_path / "data"))

    return write


@pytest.fixture
def runner(tmp_path, little, monkeypatch):
    monkeypatch.setattr(sweep.loading, "load", lambda spec: little)
    return Runner(tmp_path / "runs" / "s", Tracker(TrackerSpec(), "s", tmp_path / "runs" / "s"))


def test_the_documents_name_the_cell(folder):
    data = folder()
    before = cell(data)
    assert before.id == cell(data, limit=3).id == cell(folder()).id
    changed = cell(folder(label=1))
    assert changed.id != before.id
    assert cell(data, shots=1).id != cell(data, shots=1, seed=2).id
    assert cell(data).id == cell(data, seed=2).id


def test_where_documents_lie_does_not_name_the_cell(folder, tmp_path):
    here = cell(folder()).id
    (tmp_path / "data").rename(tmp_path / "there")
    assert cell(tasks.DataSpec(dir=str(tmp_path / "there"))).id == here


def test_the_split_of_the_examples_names_only_cells_with_examples(bundle):
    dev = dataclasses.replace(bundle, fewshot_split="test")
    assert cell(bundle, "mmlu_anatomy").id == cell(dev, "mmlu_anatomy").id
    assert cell(bundle, "mmlu_anatomy", shots=1).id != cell(dev, "mmlu_anatomy", shots=1).id


def test_settings_of_a_groups_member_name_its_cell(bundle):
    plain, member = cell(bundle, "arc_challenge"), cell(bundle, "openllm::arc_challenge")
    assert (plain.task_name, member.task_name) == ("arc_challenge", "openllm::arc_challenge")
    assert plain.id != member.id


def test_a_worker_that_finds_other_documents_fails_its_cell(folder, runner):
    resolved = cell(folder()).with_content()
    folder(label=1)
    outcome = run(runner, resolved)
    assert outcome.status == "failed"
    assert "changed after the sweep began" in outcome.error


def test_a_worker_that_finds_no_documents_fails_the_cell_that_was_planned(folder, runner, tmp_path):
    resolved = cell(folder()).with_content()
    planned = resolved.name
    (tmp_path / "data" / "piqa.jsonl").unlink()
    outcome = run(runner, cell(resolved.data))
    assert (outcome.status, outcome.name) == ("failed", planned)
    assert "does not hold it" in outcome.error


def test_a_higher_limit_reuses_only_the_same_documents(folder, runner):
    data = folder()
    assert run(runner, cell(data, limit=2)).status == "done"
    assert run(runner, cell(data, limit=4)).status == "done"
    folder(label=1)
    assert run(runner, cell(data, limit=5)).status == "done"
    reused = {s.cell["limit"]: s.result["timing"]["reused_requests"] for s in load_sweep(runner.directory)}
    assert reused == {2: 0, 4: 4, 5: 0}
    table = results_frame(load_sweep(runner.directory)).drop_duplicates("limit").set_index("limit")["data"]
    assert table[2] == table[4] != table[5]


def test_unconditional_requests_are_no_choices(folder, runner, tmp_path):
    """A metric that also asks for each choice without its context had predictions beyond the choices."""
    (tmp_path / "mi.yaml").write_text(
        "task: mi\ndataset_path: json\ndataset_kwargs: {data_files: {validation: "
        f"{tmp_path / 'data' / 'piqa.jsonl'}}}}}\noutput_type: multiple_choice\nvalidation_split: validation\n"
        "doc_to_text: '{{goal}}'\ndoc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'\n"
        "metric_list: [{metric: acc}, {metric: acc_mutual_info}]\n"
    )
    folder()
    mi = cell(tasks.DataSpec(), str(tmp_path / "mi.yaml"), limit=3)
    assert run(runner, mi).status == "done"
    (stored,) = load_sweep(runner.directory)
    for row in stored.documents.to_dict("records"):
        assert [len(row[c]) for c in ("choices", "loglikelihoods", "request_hashes", "context_tokens")] == [2] * 4
        assert row["prediction"] in (0, 1)
        assert (row["prediction"] == row["gold"]) == row["metric/acc"]
        assert len(row["more/loglikelihoods"]) == 2
    assert run(runner, dataclasses.replace(mi, limit=6)).status == "done"
    assert [s.result["timing"]["reused_requests"] for s in load_sweep(runner.directory)] == [0, 12]


# what a sweep does before its first cell


def test_two_tasks_of_one_name_are_refused(folder, tmp_path):
    (tmp_path / "x.yaml").write_text("task: piqa\ndataset_path: json\nvalidation_split: validation\n")
    with pytest.raises(ConfigError, match="it is called piqa, as "):
        documents.check([cell(folder()), cell(folder(), str(tmp_path / "x.yaml"))])


def test_documents_that_fail_are_reported_once_for_all_their_cells(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "copa.jsonl").write_text("{")
    data = folder()
    cells = [cell(data, task, policy=find_policies()[p]()) for task in ("piqa", "copa") for p in ("full", "window")]
    resolved = documents.resolve_content([cells])
    assert {c.task for c in resolved.cells[0]} == {"piqa"}
    ((why, names),) = resolved.refused.items()
    assert "copa.jsonl cannot be read" in why
    assert len(names) == 2
    with pytest.raises(UserError, match=r"copa\.jsonl cannot be read"):
        documents.resolve_content([cells[2:]])


@given(st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(lambda s: "${" not in s and s.strip()))
def test_any_name_reaches_a_worker(name):
    made = cell(tasks.DataSpec(content="c0ffee"), name, shots=3)
    given = ["tasks=[a,b]", "shots=0", "policy=full", "++data.content=old"]
    with mock.patch.object(Cell, "name", "its name"):  # there is no such task to look up
        overrides = overrides_of_job([(given, OmegaConf.create())], [made])
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)}
    assert parsed["tasks"] == [name]
    assert (parsed["shots"], parsed["data.content"], parsed["policy"]) == (3, "c0ffee", "full")
    assert len(overrides) == len(parsed)  # each key once
    assert json.loads(parsed["group"]) == {"others": [], "planned": ["its name"]}


def test_tasks_that_are_refused_for_one_reason_are_one_sentence():
    refused = {
        "tasks=piqa cannot be loaded: no network.": ["a", "b"],
        "tasks=boolq cannot be loaded: it is private.": ["c"],
        "tasks=copa cannot be loaded: no network.": ["d"],
        "its files changed.": ["e"],
    }
    assert documents.by_reason(refused) == {
        "tasks=piqa,copa cannot be loaded: no network.": ["a", "b", "d"],
        "tasks=boolq cannot be loaded: it is private.": ["c"],
        "its files changed.": ["e"],
    }
