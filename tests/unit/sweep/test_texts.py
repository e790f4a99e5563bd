"""Which documents share a text is stored with them, whatever finished cells knew of it, and is no part of what a cell is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from a2sf.app.check import check
from a2sf.errors import ConfigError
from a2sf.policies.budget import Budget
from a2sf.store.runs import load_sweep
from a2sf.sweep import reuse
from a2sf.sweep.config.schema import register
from a2sf.sweep.prepare.texts import check_field, record_texts
from a2sf.sweep.runner import Runner
from a2sf.sweep.stopping_rule import StoppingRule
from a2sf.tasks import spec as tasks
from tests.unit.sweep.test_sweep import cell, runner  # noqa: F401
from tests.unit.tasks.test_checks import how, own

ROOT = Path(__file__).parents[3]


def test_a_result_says_which_documents_share_a_text(runner: Runner) -> None:  # noqa: F811
    """A field that the user names (`question` of copa has two values), and later for cells that are finished."""
    cells = [cell(p, limit=8) for p in ("full", "window")]
    runner.run(cells)
    before = {s.path.name: s for s in load_sweep(runner.directory)}
    assert not any("cluster" in s.documents or "cluster" in s.result["documents"] for s in before.values())
    requested = [dataclasses.replace(c, data=tasks.DataSpec(source="bundle", cluster="question")) for c in cells]
    assert [c.name for c in requested] == [
        c.name for c in cells
    ]  # which documents share a text is no part of what a cell is
    planned = reuse.plan([c.with_content() for c in requested], runner.directory)
    (message,) = record_texts(planned.cells, planned.done, runner.directory)
    assert "2 finished cells" in message
    for stored in load_sweep(runner.directory):
        old = before[stored.path.name]
        assert stored.result["documents"] == old.result["documents"] | {"cluster": "question", "clusters": 2}
        assert stored.metrics == old.metrics
        assert stored.documents.drop(columns="cluster").equals(old.documents)
        assert stored.documents["cluster"].nunique() == 2
    noted = load_sweep(runner.directory)[0].documents
    assert record_texts(planned.cells, planned.done, runner.directory) == []
    again = [dataclasses.replace(c, limit=6) for c in requested]
    assert [o.status for o in runner.run(again)] == ["done"] * 2
    computed = next(s for s in load_sweep(runner.directory) if s.path.name == again[0].name)
    assert computed.documents["cluster"].tolist() == noted["cluster"].tolist()[:6]
    assert computed.result["documents"]["clusters"] == 2


def test_a_field_that_no_document_has_is_refused(runner: Runner) -> None:  # noqa: F811
    requested = cell(data=tasks.DataSpec(source="bundle", cluster="premis")).with_content()
    with pytest.raises(
        ConfigError, match=r"data.cluster=premis is not allowed: .*copa have the fields .*did you mean premise"
    ):
        record_texts([requested], [], runner.directory)
    other = cell(data=tasks.DataSpec(source="bundle", cluster="premis"), task="piqa").with_content()
    with pytest.raises(ConfigError, match=r"data\.cluster"):
        record_texts([requested, other], [], runner.directory)
    mixed = [
        dataclasses.replace(c, data=tasks.DataSpec(source="bundle", cluster="premise")).with_content()
        for c in (requested, other)
    ]
    assert record_texts(mixed, [], runner.directory) == [
        "data.cluster=premise: the documents of piqa have no such field; each counts as a text."
    ]


def test_a_task_is_made_once_for_its_fields(runner: Runner, monkeypatch) -> None:  # noqa: F811
    """At the check; again only for finished cells that do not have their texts."""
    requested = cell(limit=4, data=tasks.DataSpec(source="bundle", cluster="question")).with_content()
    made, build = [], tasks.TaskSpec.build
    monkeypatch.setattr(tasks.TaskSpec, "build", lambda spec, seed: made.append(spec) or build(spec, seed))
    known = check_field([requested])
    assert record_texts([requested], [], runner.directory, known) == []
    assert len(made) == 1
    assert record_texts([requested], [], runner.directory) == []
    assert len(made) == 2


def test_a_field_that_no_document_has_is_refused_before_the_plan(tmp_path):
    """Where the documents are on this machine; else they are read after it."""
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["tasks=[copa]", "data=bundle", "++data.cluster=premis", "policy=full", f"runs_dir={tmp_path}"]
        points = [(overrides, compose("config", overrides))]
        with pytest.raises(ConfigError, match=r"data.cluster=premis is not allowed"):
            check(points, computes_here=True)
    elsewhere = cell(data=tasks.DataSpec(cluster="premis", content="a" * 40))
    check_field([elsewhere])  # not downloaded: nothing is known


def test_stopping_by_a_metric_that_no_document_has_is_refused_before_the_plan(tmp_path):
    """Also where it is a function of the task that makes the metrics."""
    spec = own(tmp_path, process_results="!function code.results", metric_list=how("right"))
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        stop = ["early_stopping.pair=[full,window]", "early_stopping.metric=many", "early_stopping.half_width=5"]
        shared = [f"tasks=[{spec.ref}]", *stop, f"runs_dir={tmp_path}"]
        of_each = [[f"policy={p}", *shared] for p in ("full", "window")]
        points = [(overrides, compose("config", overrides)) for overrides in of_each]
        with pytest.raises(ConfigError, match=r"early_stopping.metric=many .* odd has right of each document"):
            check(points, computes_here=True)


def test_stopping_early_draws_whole_texts(runner: Runner) -> None:  # noqa: F811
    data = tasks.DataSpec(source="bundle", cluster="question")  # two texts, of many documents each
    rule = StoppingRule(("full", "window"), half_width=95.0)
    cells = [cell("full"), cell("window", budget=Budget(ratio=0.1))]
    cells = [dataclasses.replace(c, data=data, limit=12, stopping_rule=rule) for c in cells]
    assert all("question" in c.tail for c in cells)
    assert [o.status for o in runner.run(cells)] == ["done"] * 2
    unstopped = dataclasses.replace(cells[0], stopping_rule=None)
    assert [o.status for o in runner.run([unstopped])] == ["done"]
    found = {s.path.name: s for s in load_sweep(runner.directory)}
    every = found[unstopped.name].documents.set_index("doc_id")["cluster"]
    for stored in (found[c.name] for c in cells):
        (text,) = set(stored.documents["cluster"])
        assert list(stored.documents["doc_id"]) == list(every.index[every == text])
        assert stored.stopped == f"{len(stored.documents)} of 12"
