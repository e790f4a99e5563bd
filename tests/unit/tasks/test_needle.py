"""The needle task and lm-eval's generation under pruning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from lm_eval.api.instance import Instance
from statsmodels.stats.proportion import proportion_confint

from a2sf import Budget
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.results.selection import Selection
from a2sf.errors import UserError
from a2sf.hf.loading import ModelSpec
from a2sf.policies.find import find_policies
from a2sf.report.needle import needle_estimates, needle_plot, needle_table
from a2sf.report.output import TableOptions, show
from a2sf.scoring.lm import PrunedLM
from a2sf.store.runs import StoredCell, write_cell
from a2sf.sweep import cell, group
from a2sf.tasks import definitions
from a2sf.tasks import spec as tasks
from a2sf.tasks.needle.utils import DEPTHS, LENGTHS, conversations, documents, process_results
from a2sf.tasks.turns import NEXT
from tests.conftest import SMOLLM2
from tests.policies import of_models, ties
from tests.sweep_fixture import Plan, write_sweep

DATA = tasks.DataSpec(source="bundle")


def test_documents_are_seeded_and_the_needle_is_where_it_says():
    first, again, other = (documents(seed=s, per_cell=1, distractors=2)["test"] for s in (0, 0, 1))
    assert list(first) == list(again) != list(other)
    assert [(d["length"], d["depth"]) for d in first] == [(n, p) for n in LENGTHS for p in DEPTHS]
    for document in first:
        context, value = document["context"], document["value"]
        assert context.count(value) == 1
        assert context.count("The access code of") == 3
        place = context.index(f"The access code of {document['key']} is {value}.") / len(context)
        assert abs(place - document["depth"] / 100) < 0.25
        assert document["length"] <= len(context.split()) < document["length"] + 40


def test_the_task_needs_no_data_from_elsewhere():
    assert [d.ref for d in definitions.resolve("needle")] == ["needle"]
    tasks.TaskSpec("needle", DATA, 2).check()
    task = tasks.TaskSpec("needle", DATA, 2).build(0)
    assert len(list(task.eval_docs)) == 10 * len(LENGTHS) * len(DEPTHS)
    assert tasks.provenance(task)["fewshot_split"] == "validation"
    tasks.TaskSpec("gsm8k", tasks.DataSpec()).check()  # generates as well


def test_a_conversation_asks_for_each_code_of_its_text_once():
    first, again, other = (conversations(seed=s, per_length=2)["test"] for s in (0, 0, 1))
    assert list(first) == list(again) != list(other)
    assert [d["length"] for d in first] == [*LENGTHS, *LENGTHS]
    for document in first:
        context, keys, values = (document[k] for k in ("context", "keys", "values"))
        assert len(set(keys)) == len(keys) == len(document["questions"]) == 3
        for key, value, question in zip(keys, values, document["questions"], strict=True):
            assert f"The access code of {key} is {value}." in context
            assert question.endswith(f"The access code of {key} is")
        assert context.count("The access code of") == 3
        found = sorted(context.index(v) / len(context) for v in values)
        assert all(abs(at - (i + 0.5) / 3) < 0.15 for i, at in enumerate(found))
    in_order = [[d["context"].index(v) for v in d["values"]] for d in first]
    assert any(sorted(places) != places for places in in_order)  # questions are in any order


def test_a_conversations_score_is_the_share_of_right_answers():
    document = {"values": ["12345", "23456", "34567"]}
    score = process_results(document, [[" 12345.", " It is 23456 or 12345", " 3456"]])
    assert score == {"right": pytest.approx(2 / 3), "right_first": 1.0, "right_last": 0.0}
    assert process_results(document, [["", "none", "34567"]]) == {
        "right": pytest.approx(1 / 3),
        "right_first": 0,
        "right_last": 1,
    }


def test_the_conversation_task_needs_no_data_from_elsewhere():
    task = tasks.TaskSpec("needle_turns", DATA).build(0)
    assert len(list(task.eval_docs)) == 10 * len(LENGTHS)
    assert task.doc_to_text(task.eval_docs[0]).count(NEXT) == 2
    with pytest.raises(UserError, match="shots=1 is not allowed: needle_turns is a conversation"):
        tasks.TaskSpec("needle_turns", DATA, 1).check()


@pytest.fixture(scope="module")
def lm(smollm2):
    return PrunedLM(smollm2.model, tokenizer=smollm2.tokenizer)


TEXTS = [
    "One, two, three, four,",
    "The capital of France is Paris. The capital of Italy is",
    "Red, green, blue. Red, green, blue. Red, green,",
]


def requests(until: list[str], most: int = 4) -> list[Instance]:
    settings = {"until": until, "max_gen_toks": most, "do_sample": False}
    return [Instance("generate_until", {}, (t, settings), 0, ("x", i, 1)) for i, t in enumerate(TEXTS)]


@pytest.mark.full
def test_a_batch_does_not_change_the_text_and_stop_sequences_end_it(smollm2, lm):
    for policy in of_models().values():
        if ties(policy):  # the texts have words that come again
            continue
        lm.use(policy(), Budget(ratio=0.5) if policy.uses_budget else None)
        together = lm.generate_until(requests(["\n"]), disable_tqdm=True)
        assert lm.counts.layer_requests == 3 * lm.scorer.layers
        lm.scorer.sequences_per_pass = 1
        assert lm.generate_until(requests(["\n"]), disable_tqdm=True) == together
        lm.scorer.sequences_per_pass = None
    words = lm.generate_until(requests([" "]), disable_tqdm=True)
    assert all(" " not in w for w in words)


def test_a_full_cache_generates_what_hflm_does(smollm2, lm):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=3)
    lm.use(find_policies()["full"](), None)
    assert lm.generate_until(requests(["\n"]), disable_tqdm=True) == theirs.generate_until(
        requests(["\n"]), disable_tqdm=True
    )


def test_no_room_for_a_prompt_gives_one_sentence(lm):
    with pytest.raises(UserError, match=r"up to 8192 tokens, which leaves no room .* 8192 positions"):
        lm.generate_until(requests(["\n"], most=8192), disable_tqdm=True)


def test_a_cell_of_the_task_and_its_traces(lm, tmp_path, monkeypatch):
    one = cell.Cell("small", ModelSpec(SMOLLM2), find_policies()["h2o"](), Budget(ratio=0.5), "needle", 0, 1, 0, DATA)

    def compute():
        (done,) = group.CellGroup([one], lm.scorer, tmp_path / "s", trace=1).compute()
        traces[:] = done.traces
        return done.result, done.documents

    traces = []
    result, table = compute()
    assert result["metrics"]["exact_match"]["n"] == 1
    row = table.iloc[0]
    assert (row["doc/depth"], row["doc/length"]) == (0, 100)
    assert row["metric/exact_match"] in (0, 1)
    assert row["context_tokens"][0] > 100
    (trace,) = traces
    assert trace.context == row["context_tokens"][0]
    assert trace.evicted_at.shape == (lm.scorer.layers, 3, len(trace.pieces))
    budget = one.budget.slots(total=trace.context + 11, context=trace.context, layer=0)
    assert (trace.retained().sum(-1) == budget).all()

    # greedy answers to one request are equal, so that the stored one is taken for all of them
    stored = SimpleNamespace(result=json.loads(json.dumps(result)), documents=table)
    monkeypatch.setattr(group, "find_extendable", lambda *_: {one.name: stored})
    build = tasks.TaskSpec.build

    def repeated(spec, seed):
        task = build(spec, seed)
        task.config.repeats = 2
        return task

    with monkeypatch.context() as patched:
        patched.setattr(tasks.TaskSpec, "build", repeated)
        assert compute()[0]["timing"]["reused_requests"] == 2

    # scored before: taken from the file, not generated again
    again, same = compute()
    assert again["timing"]["reused_requests"] == 1
    pd.testing.assert_frame_equal(table, same)


def test_a_prompt_of_one_token_is_whole(lm):
    lm.use(find_policies()["h2o"](), Budget(ratio=0.5))
    settings = {"until": ["no such text"], "max_gen_toks": 5, "do_sample": False}
    (text,) = lm.generate_until([Instance("generate_until", {}, ("The", settings), 0)], disable_tqdm=True)
    assert text


def test_the_traces_of_scored_documents(lm):
    lm.use(find_policies()["streaming"](), Budget(tokens=5))
    lm.trace_documents = 1
    lm.loglikelihood(
        [
            Instance("loglikelihood", {}, (TEXTS[i // 2], (" a", " b")[i % 2]), i % 2, ("x", i // 2, 1))
            for i in range(4)
        ],
        disable_tqdm=True,
    )
    lm.trace_documents = 0
    (trace,) = lm.traces
    last = len(trace.pieces) - 1
    assert trace.document == 0
    assert "".join(trace.pieces) == TEXTS[0]
    assert all(head.nonzero()[0].tolist() == [0, 1, 2, 3, last] for layer in trace.retained() for head in layer)


def write_needle(directory: Path, policy: str, share: float | None, hits: list[int], **extra: object) -> StoredCell:
    """A finished cell of the needle task, the documents at two depths and two lengths."""
    plan = Plan(policies=[policy], budgets=[share or 1.0], documents={"needle": 4}, extra=extra)
    (model_cell,) = write_sweep(directory, plan)
    documents = model_cell.documents.drop(columns=["metric/acc", "metric/acc_norm"]).assign(
        **{
            "gold": -1,
            "prediction": -1,
            "choices": [[]] * 4,
            "loglikelihoods": [[]] * 4,
            "is_greedy": [[]] * 4,
            "target": "12345",
            "generated": ["12345" if hit else "no" for hit in hits],
            "doc/depth": [0.0, 50.0] * 2,
            "doc/length": [100.0] * 2 + [250.0] * 2,
            "metric/exact_match": [float(h) for h in hits],
        }
    )
    value = {"value": sum(hits) / 4, "stderr": 0.1, "n": 4, "higher_is_better": True}
    result = model_cell.result | {"metrics": {"exact_match": value}}
    del result["checksums"]
    shutil.rmtree(model_cell.path)
    # settings are not in the name that the fixture gives
    path = model_cell.path.with_name(f"{model_cell.path.name}-{len(list(directory.iterdir()))}")
    return write_cell(path, result, documents, "x: 1\n")


def test_the_table_and_picture_by_depth(tmp_path):
    cells = [
        write_needle(tmp_path / "s", "h2o", 0.5, [1, 0, 1, 1]),
        write_needle(tmp_path / "s", "full", None, [1] * 4),
        write_needle(tmp_path / "s", "window", 0.5, [0, 0, 1, 0]),
    ]
    table = needle_table(cells)
    assert table.columns.tolist() == [0, 50]
    assert table.index.get_level_values("policy").tolist() == ["Full cache", "Window", "H2O"]
    assert table.to_numpy().tolist() == [[1, 1], [0.5, 0], [1, 0.5]]
    assert needle_table(cells, by="length").to_numpy().tolist() == [[1, 1], [0, 0.5], [0.5, 1]]
    of_window = needle_estimates(cells).loc[("tiny", 0, "Window", "0.5", "\N{EN DASH}"), 0]
    wilson = proportion_confint(1, 2, method="wilson")
    assert (of_window.value, of_window.low, of_window.high) == pytest.approx((0.5, *wilson))
    needle_plot(cells, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(UserError, match="no result of the needle task"):
        needle_table([])


def test_policies_with_other_settings_or_budgets_of_another_base_have_rows_of_their_own(tmp_path):
    budget = {"ratio": 0.5, "tokens": None, "base": "context"}
    cells = [
        write_needle(tmp_path / "s", "h2o", 0.5, [1, 1, 1, 1]),
        write_needle(tmp_path / "s", "h2o", 0.5, [0, 0, 0, 0], policy_settings={"recent_share": 0.25}),
        write_needle(tmp_path / "s", "h2o", 0.5, [0, 1, 0, 1], budget=budget),
    ]
    assert sorted(needle_table(cells).to_numpy().tolist()) == [[0, 0], [0, 1], [1, 1]]


def test_tables_and_report_of_a_sweep_hold_the_needles(tmp_path):
    sweep = tmp_path / "needles"
    for policy, budget, hits in (("full", None, [1] * 4), ("h2o", 0.5, [1, 0, 1, 0]), ("a2sf", 0.5, [0, 1, 0, 1])):
        write_needle(sweep, policy, budget, hits)
    shown = show([sweep], Selection(), TableOptions())
    text = (sweep / "tables" / "tables.md").read_text()
    assert f"| Full cache | {DASH} | {DASH} | 100.0 [34.2, 100.0] | 100.0 [34.2, 100.0] |" in text
    by_depth = text[text.index("found by depth") : text.index("found by length")]
    assert f"| H2O | 0.5 | {DASH} | 100.0 [34.2, 100.0] | 0.0 [0.0, 65.8] |" in by_depth
    assert "| A2SF | 0.5 | 0.1 | 0.0 [0.0, 65.8] | 100.0 [34.2, 100.0] |" in by_depth
    assert sweep / "plots" / "needle.png" in shown.files
    assert "Needles found" in (sweep / "report.html").read_text()
