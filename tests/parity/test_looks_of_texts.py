"""A policy looks at prompts in the pass that reads them for texts; the texts are those of a reading beforehand."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar
from unittest import mock

import pytest

from a2sf.errors import PolicyError
from a2sf.hf.attention import NonFiniteError
from a2sf.hf.warned import Warned
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policies
from a2sf.policies.prepared import LayerRead, Prepared
from a2sf.policies.schedule import STEP, Schedule
from a2sf.scoring import scorer as module
from a2sf.scoring.generation import reading
from a2sf.tasks.warned import collected
from baselines.cake import CAKE
from baselines.simlayerkv import SimLayerKV
from tests.parity.test_looks import LOOKING
from tests.parity.test_texts_together import GREEDY, PROMPTS, requests_of

SOME = PROMPTS[::2]  # two begin in the same way
KEEP, THEN_STEP = Schedule("prompt"), Schedule("prompt", then="step")
SHARE = Budget(ratio=0.4, base="context")


def system(lm, policy, budget=SHARE, schedule=KEEP):
    return lm.scorer.system(policy, budget if policy.uses_budget else None, schedule)


def texts(lm, of, requests=None) -> list[Any]:
    """The answers of systems that are generated together."""
    answers = [lm.scorer.answers(s) for s in of]
    list(lm.scorer.score(requests or requests_of(lm, GREEDY, SOME, new=4), answers))
    return answers


def tokens(answers) -> list[Any]:
    assert answers.error is None
    return [(a.tokens, a.cached) for _, a in sorted(answers.computed.items())]


def beforehand(lm, of) -> list[Any]:
    """The same where each prompt is read for the policy first."""
    with mock.patch.object(Policy, "looks", False):
        return texts(lm, of)


@pytest.mark.parametrize("policy", LOOKING, ids=repr)
def test_texts_are_those_of_a_reading_beforehand(lm, policy):
    of = [system(lm, policy, schedule=THEN_STEP), system(lm, policy, Budget(ratio=0.3))]
    want = [tokens(a) for a in beforehand(lm, of)]
    with mock.patch.object(module, "prepared_for", side_effect=AssertionError):
        assert [tokens(a) for a in texts(lm, of)] == want
        lm.scorer.sequences_per_pass, lm.scorer.tokens_per_pass = 3, 40  # rows come and go, and passes are several
        assert [tokens(a) for a in texts(lm, of)] == want
    full = texts(lm, [lm.scorer.system(find_policies()["full"](), None)])[0]
    assert all([t for t, _ in one] != [t for t, _ in tokens(full)] for one in want)  # something is evicted


def test_systems_of_every_kind_are_generated_together(lm):
    named = find_policies()
    of = [system(lm, p) for p in LOOKING[1::2]] + [system(lm, CAKE(window=3, kernel=3, tau1=3.0), schedule=THEN_STEP)]
    of += [system(lm, named["kvzip"](sinks=1))]
    of += [lm.scorer.system(named["full"](), None), lm.scorer.system(named["a2sf"](), Budget(tokens=30), STEP)]
    of += [system(lm, named["snapkv"](window=3, kernel=3))]
    for one, answers in zip(of, texts(lm, of), strict=True):
        assert tokens(answers) == tokens(beforehand(lm, [one])[0]), one


def test_each_prompt_is_read_once(lm):
    """And its last token a second time."""
    read: list[int] = []
    handle = lm.model.model.register_forward_pre_hook(
        lambda model, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    once = requests_of(lm, GREEDY, new=1)
    try:
        texts(lm, [lm.scorer.system(find_policies()["full"](), None)], once)
        full = sum(read)
        read.clear()
        (looked,) = texts(lm, [system(lm, CAKE(window=3, kernel=3))], once)
        assert sum(read) == full + len(PROMPTS)
        read.clear()
        with mock.patch.object(Policy, "looks", False):
            texts(lm, [system(lm, CAKE(window=3, kernel=3))], once)
        assert sum(read) == full + sum(len(p) for p in PROMPTS)
    finally:
        handle.remove()
    assert tokens(looked)


def test_a_text_that_memory_does_not_suffice_for_is_read_beforehand(lm):
    one = system(lm, CAKE(window=3, kernel=3))
    (want,) = texts(lm, [one])
    lm.scorer._cache_tokens = 30
    with mock.patch.object(module, "prepared_for", wraps=module.prepared_for) as prepared:
        (got,) = texts(lm, [one])
    assert prepared.call_count == sum(len(p) > 30 for p in SOME)
    assert tokens(got) == tokens(want)


class Odd(SimLayerKV):
    """More slots for later layers, and something wrong."""

    name = "odd"
    wrong: ClassVar[str] = ""

    def look(self, read: LayerRead) -> float:
        if self.wrong == "warns":
            warnings.warn("the policy is not sure", RuntimeWarning, stacklevel=1)
        return float("x") if self.wrong == "look" else 1.0 + read.layer

    def conclude(self, found: list[float]) -> Any:
        return found if self.wrong == "type" else Prepared(shares=tuple(found))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("look", "policy odd fails in look: ValueError"),
        ("type", "policy odd prepares a list; conclude must return a Prepared"),
    ],
)
def test_an_error_of_a_policy_is_its_own(lm, wrong, message):
    of = [system(lm, CAKE(window=3, kernel=3)), system(lm, Odd(sinks=1))]
    with mock.patch.object(Odd, "wrong", wrong):
        cake, odd = texts(lm, of)
    with pytest.raises(PolicyError, match=message):
        raise odd.error
    assert tokens(cake) == tokens(texts(lm, of[:1])[0])


def test_warnings_of_a_policy_are_its_systems_alone(lm):
    of = [system(lm, CAKE(window=3, kernel=3)), system(lm, Odd(sinks=1))]
    with mock.patch.object(Odd, "wrong", "warns"), collected(others := Warned()):
        cake, odd = texts(lm, of)
    assert not others.notes
    assert [n["text"] for n in odd.warned.notes] == ["RuntimeWarning warns: the policy is not sure"]
    assert odd.warned.notes[0]["times"] == 3 * len(SOME)  # once in each layer
    assert not cake.warned.notes


def test_numbers_that_are_not_finite_are_those_of_their_prompts(lm):
    def broken(*arguments):
        made = original(*arguments)
        error = NonFiniteError("the key of layer 0", lm.model.dtype, made.row.path[made.row.items.index(-1)][-1:])
        made.decide = mock.Mock(side_effect=error)
        blamed.extend(made.looks[0][0].serves)
        return made

    blamed: list[int] = []
    original = reading.LookingRow.of
    with mock.patch.object(reading.LookingRow, "of", broken):
        (got,) = texts(lm, [system(lm, CAKE(window=3, kernel=3))])
    assert isinstance(got.error, NonFiniteError)
    assert f"document {blamed[0]}:" in str(got.error)  # the longest prompts come first, as the documents do
