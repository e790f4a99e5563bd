"""Few-shot examples: never the document itself, the same for a document whatever else is run, lm-eval's own elsewhere."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.samplers import ContextSampler, FirstNSampler

from a2sf.errors import ConfigError
from a2sf.tasks import spec as tasks
from a2sf.tasks.examples import Examples
from tests import tiers

SEED = 1234


def printed(document):
    return document["q"], document["a"]


def made(pool, scored=None, shots=3, seed=SEED, **more):
    return Examples(pool, pool if scored is None else scored, printed, shots=shots, seed=seed, **more)


def rows(n):
    return [{"q": f"question {i}", "a": f"answer {i}", "id": i} for i in range(n)]


@given(
    answers=st.lists(st.sampled_from("abcdefgh"), min_size=6, max_size=30),
    shots=st.integers(1, 4),
    seed=st.integers(0, 5),
    headroom=st.booleans(),
    kind=st.sampled_from([ContextSampler, FirstNSampler]),
)
@settings(max_examples=150, deadline=None)
def test_no_document_is_among_its_examples(answers, shots, seed, headroom, kind):
    """Documents may repeat, under another id; the same question with another answer is another document."""
    pool = [{"q": "one question", "a": a, "id": i} for i, a in enumerate(answers)]
    examples = made(pool, shots=shots, seed=seed, headroom=headroom, kind=kind)
    for document in pool:
        others = sum(printed(d) != printed(document) for d in pool)
        if others < shots:
            with pytest.raises(ConfigError, match=f"has only {others} documents"):
                examples.of(document)
            continue
        got = examples.of(document)
        assert len(got) == shots
        assert len({d["id"] for d in got}) == shots
        assert all(printed(d) != printed(document) for d in got)


@given(order=st.permutations(range(12)), shots=st.integers(1, 5), headroom=st.booleans())
@settings(max_examples=50, deadline=None)
def test_neither_order_nor_number_of_documents_matters(order, shots, headroom):
    pool = rows(12)
    everything = made(pool, shots=shots, headroom=headroom)
    expected = [everything.of(d) for d in pool]
    other = made(pool, shots=shots, headroom=headroom)
    assert {i: other.of(pool[i]) for i in order} == dict(enumerate(expected))
    alone = made(pool, shots=shots, headroom=headroom)
    assert alone.of(pool[order[0]]) == expected[order[0]]


@given(st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_where_lm_eval_draws_others_the_draws_are_lm_evals(shots, seed):
    pool, scored = rows(40), [{"q": f"other {i}", "a": "x", "id": -i} for i in range(9)]
    sampler = ContextSampler(pool, rnd=seed)
    examples = made(pool, scored, shots=shots, seed=seed)
    for document in scored:
        assert examples.of(document) == sampler.sample(shots)
    within = ContextSampler(pool, rnd=seed)  # given the document, it draws one more
    examples = made(pool, shots=shots, seed=seed, headroom=True)
    for document in pool:
        assert examples.of(document) == within.sample(shots, document)


def test_the_seed_matters():
    pool = rows(30)
    assert [made(pool, seed=1).of(d) for d in pool] != [made(pool, seed=2).of(d) for d in pool]


def test_a_sampler_of_the_tasks_own_never_sees_the_document():
    class Last(ContextSampler):
        def sample(self, n, eval_doc=None, df=None, **_):
            return list(self.df)[-n:]

    pool = rows(5)
    got = made(pool, shots=4, kind=Last).of(pool[4])
    assert got == pool[:4]


def test_a_task_that_makes_its_documents_anew_gets_examples_by_their_content():
    pool = rows(20)
    strangers = [{"q": f"new {i}", "a": "x", "id": 0} for i in range(5)]
    first, second = made(pool), made(pool)
    assert [first.of(d) for d in strangers] == [second.of(d) for d in reversed(strangers)][::-1]


# the tasks themselves


@pytest.fixture
def eight(tmp_path):
    rows = [{"goal": f"Goal number {i}", "sol1": f"right {i}", "sol2": f"wrong {i}", "label": 0} for i in range(8)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tasks.DataSpec(dir=str(tmp_path))


def prompts(task, **which):
    task.build_all_requests(**which)
    return {i.doc_id: i.args[0] for i in task.instances}


def test_eight_documents_three_shots(eight):
    """Three of these eight had their own question and answer before them."""
    task = tasks.TaskSpec("piqa", eight, 3).build(SEED)
    for i, prompt in prompts(task).items():
        assert prompt.count(f"Goal number {i}\n") == 1
        assert f"right {i}" not in prompt


@pytest.mark.parametrize("split", [None, "validation"])
@pytest.mark.parametrize(
    ("name", "shots"),
    [("copa", 5), ("arc_challenge", 5), ("openbookqa", 5), ("winogrande", 5), ("piqa", 3), ("copa", 1)],
)
def test_real_documents(bundle, name, shots, split):
    task = tasks.TaskSpec(name, tasks.DataSpec("bundle", fewshot_split=split), shots).build(SEED)
    examples = task.examples()
    documents = list(task.eval_docs)
    every = max(1, len(documents) // tiers.examples(200))  # a third of two hundred in `make test`
    for document in documents[::every]:
        got = examples.of(document)
        assert len(got) == shots
        assert document not in got
        assert task._printed(document) not in [task._printed(d) for d in got]


def test_a_higher_limit_and_ranks_draw_the_same(bundle):
    everything = prompts(tasks.TaskSpec("copa", bundle, 3).build(SEED))
    few = prompts(tasks.TaskSpec("copa", bundle, 3).build(SEED), limit=10)
    assert few == {i: everything[i] for i in range(10)}
    for rank in range(3):
        part = prompts(tasks.TaskSpec("copa", bundle, 3).build(SEED), rank=rank, world_size=3)
        assert part == {i: everything[i] for i in range(rank, 100, 3)}


def test_the_examples_are_lm_evals_but_for_own_documents(bundle):
    """Against a second task with lm-eval's own sampler over the same documents."""
    ours = tasks.TaskSpec("copa", bundle, 5).build(SEED)
    theirs = ContextSampler(list(ours.examples().pool), rnd=SEED)
    differ = []
    for i, document in enumerate(ours.eval_docs):
        drawn = theirs.sample(5)
        own = any(ours._printed(d) == ours._printed(document) for d in drawn)
        if own or ours.examples().of(document) != drawn:
            differ.append((i, own))
    assert differ
    assert all(own for _, own in differ)


def test_more_shots_than_other_documents(eight):
    tasks.TaskSpec("piqa", eight, 7).build(SEED)
    with pytest.raises(ConfigError, match=r"shots=8 .*piqa has only 7 documents"):
        tasks.TaskSpec("piqa", eight, 8).build(SEED)
    with pytest.raises(ConfigError, match=r"shots=30 .*piqa has only 7 documents .*give at most 7"):
        tasks.TaskSpec("piqa", eight, 30).build(SEED)


def test_what_a_task_draws_itself_leaves_the_callers_generator_alone(eight):
    random.seed(5)
    before = random.getstate()
    tasks.TaskSpec("piqa", eight, 1).build(SEED)
    assert random.getstate() == before
