"""A policy that looks at prompts does so in the pass that computes the answers; it finds what a reading of its own gives."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar
from unittest import mock

import pytest

from a2sf.errors import PolicyError
from a2sf.hf.attention.errors import NonFiniteError
from a2sf.hf.warned import Warned
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.policies.prepared import LayerRead, Prepared
from a2sf.policies.rule import Rule
from a2sf.policies.schedule import STEP, Schedule
from a2sf.scoring import scorer as module
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.passes import looks, run
from a2sf.scoring.requests import EncodedRequests
from a2sf.scoring.scorer import Scorer
from a2sf.tasks.warned import collected
from baselines.cake import CAKE
from baselines.kvzap import KVzap
from baselines.simlayerkv import SimLayerKV
from tests.models import shared
from tests.stand_in import StandIn

HEAD = list(range(60, 70))  # the prompts begin in the same way
PROMPTS = [[*HEAD, 5 + i, *range(20, 26 + i)] for i in range(4)]
ENDS = ([40, 7, 8], [41, 7, 9, 3], [11])
ENCODED = [(("", ""), prompt, end) for prompt in PROMPTS for end in ENDS]
LOOKING = [
    KVzap(window=2),
    KVzap(window=2, equal_slots=True),
    KVzap(window=3, threshold=0.1),
    CAKE(window=3, kernel=3),
    SimLayerKV(sinks=1, recent=3, threshold=0.3),
]
PROMPT, SHARE = Schedule("prompt"), Budget(ratio=0.4, base="context")


@pytest.fixture
def lm(stand_in):
    return PrunedLM(shared("llama"), tokenizer=StandIn())


def computed(lm, systems, **settings) -> list[Any]:
    """The answers of systems (policy, budget, schedule) that are computed together."""
    scorer = Scorer(lm, **settings)
    answers = [scorer.answers(scorer.system(*s)) for s in systems]
    for _ in scorer.score(EncodedRequests(lm, ENCODED), answers):
        pass
    return answers


def beforehand(lm, systems) -> list[Any]:
    """The same where each prompt is read for the policy first."""
    with mock.patch.object(Policy, "looks", False):
        return computed(lm, systems)


def values(answers) -> list[float]:
    assert answers.error is None
    return [answers.computed[str(i)].value for i in range(len(ENCODED))]


def cached(answers) -> list[Any]:
    return [answers.computed[str(i)].cached for i in range(len(ENCODED))]


def system(policy, budget=SHARE, schedule=PROMPT):
    return policy, budget if policy.uses_budget else None, schedule


@pytest.mark.parametrize("schedule", [PROMPT, Schedule("prompt", then="step")], ids=["keep", "step"])
@pytest.mark.parametrize("policy", LOOKING, ids=repr)
def test_answers_are_those_of_a_reading_beforehand(lm, policy, schedule):
    (want,) = beforehand(lm, [system(policy, schedule=schedule)])
    with mock.patch.object(module, "prepared_for", side_effect=AssertionError):
        (got,) = computed(lm, [system(policy, schedule=schedule)])
        alone = [computed(lm, [system(policy, schedule=schedule)], sequences_per_pass=1)[0]]
    assert values(got) == pytest.approx(values(want), abs=1e-4)
    assert values(alone[0]) == pytest.approx(values(want), abs=1e-4)
    assert cached(got) == cached(want)
    full = computed(lm, [(find_policies()["full"](), None, STEP)])[0]
    assert values(got) != pytest.approx(values(full), abs=1e-4)  # something is evicted


def test_systems_of_every_kind_are_computed_together(lm):
    named = find_policies()
    systems = [system(p) for p in LOOKING]
    systems += [system(CAKE(window=3, kernel=3, tau1=3.0)), system(KVzap(window=2), Budget(tokens=6))]
    systems += [system(SimLayerKV(sinks=1, recent=3, threshold=0.9)), (named["full"](), None, STEP)]
    systems += [(named["a2sf"](), Budget(tokens=6), STEP), system(named["snapkv"](window=3, kernel=3))]
    systems += [(named["future"](), Budget(tokens=6), STEP), system(named["kvzip"](sinks=1))]
    together = computed(lm, systems)
    for one, answers in zip(systems, together, strict=True):
        assert values(answers) == pytest.approx(values(beforehand(lm, [one])[0]), abs=1e-4), one


def test_each_prompt_is_read_once(lm):
    """And its last token a second time, where more than the next token is asked for."""
    tokens, original = [], looks.logits_in_parts

    def counting(*arguments, input_ids, **more):
        tokens.append(input_ids.shape[1])
        return original(*arguments, input_ids=input_ids, **more)

    with mock.patch.object(looks, "logits_in_parts", counting):
        computed(lm, [(find_policies()["full"](), None, STEP)])
        full = sum(tokens)
        tokens.clear()
        computed(lm, [system(CAKE(window=3, kernel=3))])
    assert sum(tokens) == full + len(PROMPTS)
    assert len(tokens) == 2


@pytest.mark.parametrize("policy", LOOKING, ids=repr)
def test_prompts_of_several_passes_are_followed_by_one_pass_of_the_rest(lm, policy):
    (want,) = beforehand(lm, [system(policy)])
    parts, original = [], looks.running_with_looks

    def counting(model, reading, looks):
        parts.append(len(looks))
        return original(model, reading, looks)

    with (
        mock.patch.object(module, "tokens_per_pass", return_value=40),
        mock.patch.object(run, "LEAST_PASS", 40),
        mock.patch.object(looks, "running_with_looks", counting),
    ):
        (got,) = computed(lm, [system(policy)])
    assert [looks > 0 for looks in parts] == [True, True, False]
    assert values(got) == pytest.approx(values(want), abs=1e-4)


def test_a_policy_looks_at_a_prompt_once_for_all_its_budgets(lm):
    seen = []

    class Counting(CAKE):
        name = "counting"

        def look(self, read: LayerRead) -> float:
            seen.append(read.layer)
            return super().look(read)

    policy = Counting(window=3, kernel=3)
    computed(lm, [system(policy, Budget(tokens=t)) for t in (5, 6, 8)])
    assert sorted(seen) == sorted(list(range(3)) * len(PROMPTS))
    seen.clear()
    computed(lm, [system(policy, Budget(tokens=500))])  # nothing is cut
    assert not seen


def test_a_text_that_memory_does_not_suffice_for_is_read_beforehand(lm):
    policy = CAKE(window=3, kernel=3)
    (want,) = computed(lm, [system(policy)])
    with (
        mock.patch.object(module, "tokens_in_caches", return_value=3 * 12),
        mock.patch.object(module, "prepared_for", wraps=module.prepared_for) as prepared,
    ):
        (got,) = computed(lm, [system(policy)])
    assert prepared.call_count == len(PROMPTS)
    assert values(got) == pytest.approx(values(want), abs=1e-4)


@dataclass(frozen=True, kw_only=True)
class Scored(Policy):
    """Layers get slots by their number, and the prompt's last queries count."""

    name: ClassVar[str] = "scored"
    label: ClassVar[str] = "Scored"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    def retention(self, budget: int, layer: int) -> Retention:
        made = find_policies()["snapkv"](window=3, kernel=3).retention(budget, layer)
        return replace(made, recent=min(budget // 2, 3))

    def look(self, read: LayerRead) -> float:
        return 1.0 + read.layer

    def conclude(self, found: list[float]) -> Prepared:
        return Prepared(shares=tuple(found))


def test_a_policy_whose_scores_depend_on_what_it_finds_reads_beforehand(lm):
    assert Scored().prepares
    assert not Scored().looks
    with mock.patch.object(module, "prepared_for", wraps=module.prepared_for) as prepared:
        (got,) = computed(lm, [system(Scored())])
    assert prepared.call_count == len(PROMPTS)
    assert len(values(got)) == len(ENCODED)


@cache
def bias_at(budget: int) -> Any:
    """Another function at each budget."""
    return lambda keys, values, positions: positions.to(keys.dtype)


class Odd(SimLayerKV):
    """More slots for later layers, and something wrong."""

    name = "odd"
    wrong: ClassVar[str] = ""

    def look(self, read: LayerRead) -> float:
        return float("x") if self.wrong == "look" else 1.0 + read.layer

    def conclude(self, found: list[float]) -> Any:
        return found if self.wrong == "type" else Prepared(shares=tuple(found[: 2 if self.wrong == "layers" else None]))

    def retention(self, budget: int, layer: int) -> Retention:
        made = super().retention(budget, layer)
        return replace(made, rule=Rule(bias=bias_at(budget))) if self.wrong == "rule" else made


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("look", r"policy odd fails in look: ValueError: could not convert .* \(.*test_looks.py, line \d+, in look\)"),
        ("type", "policy odd prepares a list; conclude must return a Prepared"),
        ("layers", "policy odd prepares shares for 2 layers, and the model has 3"),
        (
            "rule",
            "policy odd looks at a prompt while it is read, and has another rule .* define prepare instead of look",
        ),
    ],
)
def test_an_error_of_a_policy_is_its_own(lm, wrong, message):
    systems = [system(Odd(sinks=1)), system(CAKE(window=3, kernel=3))]
    with mock.patch.object(Odd, "wrong", wrong):
        odd, cake = computed(lm, systems)
    assert isinstance(odd.error, PolicyError)
    with pytest.raises(PolicyError, match=message):
        raise odd.error
    assert values(cake) == pytest.approx(values(computed(lm, systems[1:])[0]), abs=1e-4)


class Unsure(CAKE):
    """Warns when it ranks tokens."""

    name = "unsure"

    def priorities(self, step):
        warnings.warn("the policy is not sure", RuntimeWarning, stacklevel=1)
        return super().priorities(step)


def test_what_warns_in_a_pass_is_noted_of_the_system_that_it_serves(lm):
    """What is looked at has a negative number, which counts no system from the end."""
    systems = [system(Unsure(window=3, kernel=3)), (find_policies()["a2sf"](), Budget(tokens=6), STEP)]
    with collected(Warned()):
        unsure, other = computed(lm, systems)
    assert [n["text"] for n in unsure.warned.notes] == ["RuntimeWarning warns: the policy is not sure"]
    assert not other.warned.notes


def test_numbers_that_are_not_finite_are_those_of_their_requests(lm):
    """Those of a prompt's last token, which no other sequence reads in the part that is looked at."""

    def broken(*arguments):
        made = original(*arguments)
        error = NonFiniteError("the key of layer 0", lm.model.dtype, made.row.path[made.row.items.index(-1)][-1:])
        blamed.append(made.looks[0][0].serves)
        made.decide = mock.Mock(side_effect=error)
        return made

    original, blamed = looks.LookingRow.of, []
    with mock.patch.object(run.LookingRow, "of", broken):
        (got,) = computed(lm, [system(CAKE(window=3, kernel=3))])
    assert isinstance(got.error, NonFiniteError)
    assert len(blamed[0]) == 2  # the third request of the prompt asks for the next token alone
