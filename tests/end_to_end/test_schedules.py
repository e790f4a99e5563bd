"""The real command with schedules: results, traces of cuts, what it says, and settings of one policy in a grid."""

from __future__ import annotations

import pytest

from a2sf.engine.trace import load
from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate

pytestmark = pytest.mark.full

COPA = ["tasks=[copa]", "limit=4", "data=bundle"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_policies_that_cut_after_the_prompt(runs):
    done = evaluate("-m", "policy=full,snapkv,h2o", "schedule=prompt", *COPA, "trace=1", "sweep_name=p", runs=runs)
    assert done.returncode == 0, done.stderr
    cells = {s.cell["policy"]: s for s in load_sweep(runs / "p")}
    names = [cells[p].path.name.rsplit("__", 1)[0] for p in ("full", "snapkv", "h2o")]
    start, end = "smollm2-135m__", "__copa__0shot__n4"
    assert names == [f"{start}full{end}", f"{start}snapkv__r0.2{end}", f"{start}h2o__r0.2__prompt{end}"]
    assert [cells[p].cell["schedule"] for p in ("full", "snapkv", "h2o")] == ["step", "prompt", "prompt"]
    assert cells["full"].result["scored"]["pruned"] == 0
    for policy in ("snapkv", "h2o"):
        documents, scored = cells[policy].documents, cells[policy].result["scored"]
        targets = sum(map(sum, documents["continuation_tokens"]))
        requests = sum(map(len, documents["continuation_tokens"]))
        # all but the first token of each continuation
        assert scored == {"tokens": targets, "pruned": targets - requests}
        with cells[policy].open_traces() as file:  # type: ignore[union-attr]
            (trace,) = load(file)
        evicted = trace.evicted_at[trace.evicted_at < trace.evicted_at.shape[-1]]
        assert len(evicted) > 0
        assert set(evicted) == {trace.context - 1}  # one cut, after the prompt's last token
        logs = [[list(row) for row in c.documents["loglikelihoods"]] for c in (cells["full"], cells[policy])]
        assert logs[0] != logs[1]


def test_budgets_that_grow_with_the_text(runs):
    share = ["budget.base=seen", "budget.ratio=0.3"]
    done = evaluate("-m", "policy=full,h2o,window", *share, *COPA, "sweep_name=seen", "trace=1", runs=runs)
    assert done.returncode == 0, done.stderr
    assert "0.3 of seen" in done.stdout
    cells = {s.cell["policy"]: s for s in load_sweep(runs / "seen")}
    assert cells["h2o"].path.name.rsplit("__", 1)[0] == "smollm2-135m__h2o__r0.3-seen__copa__0shot__n4"
    assert cells["h2o"].cell["identity"]["budget"] == {"ratio": 0.3, "tokens": None, "base": "seen"}
    logs = [[list(row) for row in c.documents["loglikelihoods"]] for c in cells.values()]
    assert logs[0] != logs[1] != logs[2]
    with cells["window"].open_traces() as file:  # type: ignore[union-attr]
        (trace,) = load(file)
    for step in range(trace.evicted_at.shape[-1]):
        assert (trace.retained(step).sum(-1) == max(1, 3 * (step + 1) // 10)).all()
    more = evaluate("policy=h2o", "schedule=prompt", "schedule.then=step", *share, *COPA, "sweep_name=then", runs=runs)
    assert more.returncode == 0, more.stderr
    text = evaluate("policy=h2o", *share, "tasks=[needle]", "limit=2", "sweep_name=text", runs=runs)
    assert text.returncode == 0, text.stderr


def test_a_sweep_in_which_nothing_was_pruned_says_so(runs):
    done = evaluate("policy=h2o", "schedule=prompt", "budget.tokens=60", *COPA, "sweep_name=few", runs=runs)
    assert done.returncode == 0, done.stderr
    assert "only 0 % of the scored tokens saw a pruned cache" in done.stdout


def test_a_setting_goes_to_the_policies_that_have_it(runs):
    alone = evaluate("policy=a2sf", "policy.recent_share=0.25", *COPA, "sweep_name=alone", runs=runs)
    assert alone.returncode == 0, alone.stderr
    plan = ["-m", "policy=a2sf,h2o,snapkv", "policy.recent_share=0.25", "plan_only=true", *COPA]
    done = evaluate(*plan, "policy.window=8,16", runs=runs)
    # a2sf.yaml does not list the setting, and its cell is the one that was computed alone
    assert "4 cells, 1 done, 3 to run" in done.stdout, done.stderr
    wrong = evaluate(*plan, "policy.winow=8", runs=runs)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("policy.winow=8 is not allowed: a2sf has")
    unused = evaluate(*plan[:2], *COPA, "schedule.every=4", runs=runs)
    assert unused.stderr.startswith("schedule.every=4 is not allowed: it is for schedule=every")
