"""The lm-eval model: full cache is HFLM, sharing is exact, and nothing depends on the batch."""

from __future__ import annotations

from functools import cache

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from a2sf import A2SF, H2O, Budget
from a2sf.engine.invariants import SCHEDULES
from a2sf.errors import ConfigError, UserError
from a2sf.hf.loading import ModelSpec, load
from a2sf.policies.find import find_policies
from a2sf.scoring.generation.rows import RowGenerator
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.requests import Requests
from a2sf.scoring.systems import Answer
from a2sf.tasks import spec as tasks
from tests.hub.build import write_model
from tests.models import shared
from tests.own_tasks import simple_evaluate
from tests.policies import cases, features, label, tier, tiered
from tests.stand_in import StandIn

POLICIES = [cls() for cls in find_policies().values()]
SHARED_TASKS = [pytest.param("piqa", 0, marks=pytest.mark.full), ("winogrande", 0), ("arc_easy", 1)]


@cache
def task_of(name: str, bundle, shots: int):
    return tasks.TaskSpec(name, bundle, shots).build(1234)


def evaluate(lm, task: str, bundle, *, shots: int = 0, limit: int = 2):
    built = task_of(task, bundle, shots)
    got = lm_eval.evaluate(lm, task_dict={"tasks": {task: built}}, limit=limit, bootstrap_iters=0)
    return got["results"][task]["acc,none"], [a[0] for s in got["samples"][task] for a in s["filtered_resps"]]


@pytest.fixture(scope="module")
def lm(smollm2):
    return PrunedLM(smollm2.model, tokenizer=smollm2.tokenizer)


@pytest.mark.parametrize(("task", "shots"), SHARED_TASKS)
def test_full_cache_is_hflm(smollm2, lm, bundle, task, shots):
    theirs = HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=8)
    accuracy, expected = evaluate(theirs, task, bundle, shots=shots)
    lm.use(find_policies()["full"](), None)
    got_accuracy, got = evaluate(lm, task, bundle, shots=shots)
    assert got_accuracy == accuracy
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 1e-3
    assert lm.counts.computed < lm.counts.tokens  # beginnings were shared


ONE_OF_EACH = {p.schedules: p.name for p in POLICIES}.values()
OF_A_RULE = {frozenset(features(p)): p.name for p in POLICIES}.values()
"""One policy for each set of features of a rule."""


@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=tier(p.name in ONE_OF_EACH, p.name in OF_A_RULE)) for p in POLICIES],
    ids=lambda p: p.name,
)
def test_sharing_beginnings_is_exact(smollm2, lm, bundle, policy):
    """All requests in shared rows against one request per row, by the rounding rule of docs/semantics.md."""
    budget = Budget(ratio=0.3) if policy.uses_budget else None
    alone = PrunedLM(smollm2.model, policy, budget, tokenizer=smollm2.tokenizer, batch_size=1)
    lm.use(policy, budget)
    accuracy, together = evaluate(lm, "winogrande", bundle)
    expected_accuracy, separate = evaluate(alone, "winogrande", bundle)
    moved = [abs(a - b) > 1e-3 for a, b in zip(together, separate, strict=True)]
    assert sum(moved) <= 1
    assert accuracy == expected_accuracy


def requests(tokens: torch.Tensor, cuts: list[int], lengths: list[int]):
    rows = zip(tokens.tolist(), cuts, lengths, strict=True)
    return [(None, row[:cut], row[cut:length]) for row, cut, length in rows]


@pytest.fixture
def tiny(stand_in):
    """A random LLaMA behind the lm-eval interface; its requests are token ids, so any tokenizer will do."""

    def make(policy="full", **more):
        return PrunedLM(shared("llama"), policy, tokenizer=StandIn(), **more)

    return make


@pytest.mark.parametrize(("policy", "schedule"), tiered(cases(prepared=True), each=1), ids=label)
def test_a_log_likelihood_is_the_sum_over_the_pruned_model(tiny, policy, schedule):
    """Against one forward pass per request over the reference, logits everywhere, nothing shared."""
    lm = tiny(policy, budget=Budget(ratio=0.25) if policy.uses_budget else None, schedule=schedule)
    g = torch.Generator().manual_seed(5)
    # no token twice in a text: rounding would decide between two of equal priority
    every = [3 + torch.randperm(94, generator=g) for _ in range(6)]
    first = every[0][:18]
    for row in (2, 3):  # beginnings in common
        every[row] = torch.cat([first, every[row][~torch.isin(every[row], first)]])
    ids = torch.stack(every)[:, :36]
    ids[4] = ids[0]
    todo = requests(ids, [18, 12, 18, 19, 24, 1], [24, 36, 27, 20, 25, 2])
    got = lm._loglikelihood_tokens(todo)
    slow = tiny(policy, budget=lm.budget, schedule=schedule, backend="reference", batch_size=1)
    for (_, context, continuation), (score, greedy) in zip(todo, got, strict=True):
        (expected,) = slow._loglikelihood_tokens([(None, context, continuation)])
        assert score == pytest.approx(expected[0], abs=1e-3)
        assert greedy == expected[1]
    assert (slow.counts.targets, slow.counts.pruned) == (lm.counts.targets, lm.counts.pruned)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_a_sliding_window_of_the_models_own_stays_as_it_is_under_every_schedule(schedule):
    """A budget that evicts nothing is the model itself, whose sliding layers see eight tokens."""
    model = shared("gemma3")
    lm = PrunedLM(model, A2SF(), Budget(tokens=500), schedule=schedule, tokenizer=StandIn())
    (ids,) = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(8)).tolist()
    ((got, _),) = lm._loglikelihood_tokens([(None, ids[:25], ids[25:])])
    logs = model(torch.tensor([ids[:-1]])).logits.detach().log_softmax(-1)[0]
    assert got == pytest.approx(sum(float(logs[i - 1, ids[i]]) for i in range(25, 40)), abs=1e-3)


def test_scores_that_saw_a_pruned_cache_are_counted(tiny):
    ids = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(9))
    todo = requests(ids, [20, 20, 4], [30, 21, 30])  # 10, 1 and 26 targets
    of = {}
    for name in ("step", "every4", "prompt", "prompt-step"):
        lm = tiny("h2o", budget_tokens=8, schedule=name)
        lm._loglikelihood_tokens(todo)
        of[name] = lm.counts.pruned
        assert lm.counts.targets == 37
    # the first continuation token is predicted by the prompt's last, which saw all of it; the third prompt fits
    assert of == {"step": 10 + 1 + 20, "every4": 10 + 1 + 17, "prompt": 9, "prompt-step": 9 + 20}


def test_reused_requests_are_counted_as_if_computed(tiny):
    todo = [Instance("loglikelihood", {}, ("a context of some length", " and more"), 0)]
    lm = tiny("h2o", budget_tokens=8, schedule="prompt")
    requests, first, again = Requests(lm, "loglikelihood", todo), *(lm.scorer.answers(lm.system) for _ in range(2))
    list(lm.scorer.score(requests, [first]))
    again.known = first.computed
    assert list(lm.scorer.score(requests, [again])) == []
    for answers in (first, again):
        lm.scorer.count(requests, answers)
    assert (first.counts.targets, first.counts.pruned) == (again.counts.targets, again.counts.pruned)
    assert (first.counts.reused, again.counts.reused) == (0, 1)
    assert first.counts.pruned > 0


def test_the_order_and_company_of_requests_do_not_matter(tiny):
    lm = tiny(A2SF(forgetting_factor=0.4), budget=Budget(ratio=0.2))
    ids = torch.randint(3, 97, (12, 50), generator=torch.Generator().manual_seed(6))
    todo = requests(ids, [20] * 12, list(range(25, 49, 2)))
    forward = lm._loglikelihood_tokens(todo)
    backward = lm._loglikelihood_tokens(todo[::-1])[::-1]
    some = lm._loglikelihood_tokens(todo[3:5])
    assert [a for a, _ in forward] == pytest.approx([a for a, _ in backward], abs=1e-4)
    assert [a for a, _ in some] == pytest.approx([a for a, _ in forward[3:5]], abs=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning_and_such_a_continuation_is_refused(tiny):
    lm = tiny("full", max_length=32)
    ids = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(7))[0].tolist()
    (long,) = lm._loglikelihood_tokens([(None, ids[:50], ids[50:])])
    (cut,) = lm._loglikelihood_tokens([(None, ids[60 - 33 : 50], ids[50:])])
    assert long[0] == pytest.approx(cut[0], abs=1e-5)
    with pytest.raises(UserError, match="continuation of 40 tokens is longer than the model's context window of 32"):
        lm._loglikelihood_tokens([(None, ids[:20], ids[20:])])


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_a_token_that_the_model_does_not_know_is_named_before_anything_is_computed(kind, tmp_path, monkeypatch):
    """One that was added to the tokenizer alone; without a word of it a GPU ends the process."""
    loaded = load(ModelSpec(str(write_model(tmp_path / "model"))))
    loaded.tokenizer.add_tokens(["<note>"])
    lm = PrunedLM(loaded.model, A2SF(), Budget(ratio=0.5), tokenizer=loaded.tokenizer)
    computes = (RowGenerator, "_let_in") if kind == "generate_until" else (type(loaded.model), "forward")
    monkeypatch.setattr(*computes, lambda *_, **__: pytest.fail("computed"))
    texts = {"loglikelihood": lambda t: (t, " yes"), "loglikelihood_rolling": lambda t: (t,)}
    arguments = texts.get(kind, lambda t: (t, {"until": ["."], "max_gen_toks": 2}))
    requests = [
        Instance(kind, {}, arguments(text), 0, metadata=("odd", number, 1), task_name="odd", doc_id=number)
        for number, text in enumerate(["A plain text", "A text with a <note> in it"])
    ]
    for _ in range(2):
        with pytest.raises(UserError, match=r"task odd, document 1: .*'<note>' as token 49152, .*knows 49152 tokens"):
            getattr(lm, kind)(requests)


def test_word_perplexity_under_pruning(tiny):
    lm = tiny("full", max_length=16)
    text = "some text that is longer than the window of the model"
    (full,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    theirs = HFLM(pretrained=shared("llama"), tokenizer=StandIn(), max_length=16, batch_size=1)
    (expected,) = theirs.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert full == pytest.approx(expected, abs=1e-3)
    lm.use(A2SF(), Budget(tokens=2))
    (pruned,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert pruned != pytest.approx(full, abs=1e-2)


def test_known_requests_are_not_computed_again(tiny):
    lm = tiny("full")
    todo = [Instance("loglikelihood", {}, ("a context", " and more"), 0), Instance("loglikelihood", {}, ("b", " c"), 1)]
    expected = lm.loglikelihood(todo)
    requests, answers = Requests(lm, "loglikelihood", todo), lm.scorer.answers(lm.system)
    answers.known = {requests.keys[0]: Answer(-1.5, True, 9, 9)}
    list(lm.scorer.score(requests, [answers]))
    assert answers.answer(requests.keys[0]).value == -1.5
    assert list(answers.computed) == [requests.keys[1]]
    assert answers.computed[requests.keys[1]].value == pytest.approx(expected[1][0], abs=1e-4)


def test_a_given_model_needs_no_warning(tiny, caplog):
    """lm-eval's two are of arguments that may be ignored, which are honoured or refused here, and of a single process."""
    with caplog.at_level("INFO", logger="lm_eval.models.huggingface"):
        tiny("h2o", budget_tokens=8)
        assert not caplog.messages
        HFLM(pretrained=shared("llama"), tokenizer=StandIn())
    assert len(caplog.messages) == 2


def test_a_typo_in_model_args_is_reported_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="did you mean policy"):
        lm_eval.simple_evaluate("a2sf", model_args=f"pretrained={tmp_path}/none,polcy=h2o", tasks=["copa"])


def test_lm_eval_takes_it_by_name(bundle, tmp_path):
    write_model(tmp_path)
    task = tasks.TaskSpec("copa", bundle).build(1)
    arguments = f"pretrained={tmp_path},policy=h2o,budget_ratio=0.5,dtype=float32"
    got = simple_evaluate(
        "a2sf", model_args=arguments, tasks=[task], limit=4, bootstrap_iters=0, device="cpu", batch_size=2
    )
    assert 0 <= got["results"]["copa"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"policy": "h3o"}, "policy=h3o is not allowed"),
        ({"policy": "h2o"}, "exactly one"),
        ({"policy": "h2o", "budget_ratio": 3}, r"budget\.ratio=3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"policy": "h2o", "budget_tokens": 8, "schedule": "evry4"}, "schedule=evry4 is not allowed: give one of step"),
        ({"policy": "future", "budget_tokens": 8, "schedule": "prompt"}, "the policy future supports only step"),
        ({"policy": "h2o", "budget_tokens": 8, "schedule": "every0"}, r"schedule\.every=0"),
        ({"polcy": "h2o"}, r"polcy=h2o is not allowed: the model a2sf has no such argument \(did you mean policy"),
        ({"policy": H2O(), "forgetting_factor": 0.3}, "forgetting_factor=0.3 .* policy that is given by its name"),
        ({"policy": "h2o", "budget": 8, "budget_ratio": 0.5}, "not both"),
        ({"policy": "h2o", "budget": 8, "backend": "nunba"}, "did you mean numba"),
    ],
)
def test_bad_arguments(tiny, arguments, why):
    with pytest.raises(ConfigError, match=why):
        tiny(**arguments)


def test_settings_that_generating_would_refuse_are_refused_when_scoring(tiny):
    with pytest.raises(ConfigError, match="streaming protects 4 tokens"):
        tiny("streaming", budget_tokens=3)
    with pytest.raises(ConfigError, match="forgetting_factor"):
        tiny("h2o", budget_tokens=8, forgetting_factor=0.3)


@pytest.mark.parametrize(("context", "continuation"), [([], [5]), ([5], [])])
def test_tokens_without_a_context_or_a_continuation_are_refused(tiny, context, continuation):
    with pytest.raises(UserError, match="a request has no token of"):
        tiny("full")._loglikelihood_tokens([(None, context, continuation)])
