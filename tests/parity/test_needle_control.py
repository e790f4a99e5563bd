"""A control that must not fail: a policy with the order to keep the needle finds it; one with the order to drop it does not.

Where an eviction drops, keeps or rotates other tokens than a policy says, the first stops finding codes that the full
cache finds, whatever the accuracy of published methods looks like.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from a2sf import Budget, Policy, PrunedCache, Retention, Rule, Step
from a2sf.tasks.needle.utils import documents

SINKS, SPARE = 4, 8


@dataclass(frozen=True, kw_only=True)
class Listed(Policy):
    """Keeps the listed positions, then the first and the newest tokens; as data, so that the compiled kernel runs it."""

    name, label = "listed", "Listed positions"
    keep: tuple[int, ...] = ()

    def listed(self, keys, values, positions):
        return torch.isin(positions, torch.tensor(self.keep)).to(keys.dtype)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, sinks=SINKS, rule=Rule(scored=False, bias=self.listed))


@dataclass(frozen=True, kw_only=True)
class ListedByRule(Listed):
    """The same as a function of the step."""

    name, label = "listed_by_rule", "Listed positions, by a rule"

    def priorities(self, step: Step) -> torch.Tensor:
        return self.listed(step.keys, step.values, step.positions)


@dataclass(frozen=True)
class Needle:
    """A prompt, and where things stand in it: the needle's sentence and the question, in tokens."""

    ids: torch.Tensor
    code: str
    needle: tuple[int, ...]
    question: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


@pytest.fixture(scope="module")
def needles(smollm2) -> list[Needle]:
    """Five documents of 60 words of filler, the needle at each depth."""
    found = []
    for d in documents(per_cell=1, lengths=(60,))["test"]:
        asks = f"\n\nQuestion: What is the access code of {d['key']}?\nAnswer: The access code of {d['key']} is"
        sentence = f"The access code of {d['key']} is {d['value']}."
        begin = d["context"].index(sentence)
        read = smollm2.tokenizer(d["context"] + asks, return_offsets_mapping=True, return_tensors="pt")
        spans = read.offset_mapping[0].tolist()
        at = tuple(i for i, (a, b) in enumerate(spans) if b > begin and a < begin + len(sentence))
        found.append(Needle(read.input_ids, d["value"], at, sum(a >= len(d["context"]) for a, _ in spans)))
    return found


def finds(smollm2, needle: Needle, policy: Policy | None = None, budget: int = 0) -> bool:
    """Whether the answer begins with the code."""
    given = {} if policy is None else {"cache": PrunedCache(smollm2.model, policy=policy, budget=Budget(tokens=budget))}
    mask = torch.ones_like(needle.ids)
    text = smollm2.model.generate(needle.ids, attention_mask=mask, max_new_tokens=7, do_sample=False, **given)
    if policy is not None:
        held = given["cache"].state(3).positions
        assert held.shape[-1] <= budget
        if set(needle.needle) <= set(policy.keep):
            assert torch.isin(torch.tensor(needle.needle), held).all()
    return smollm2.tokenizer.decode(text[0, needle.tokens :]).strip().startswith(needle.code)


def others(needle: Needle) -> tuple[int, ...]:
    return tuple(sorted(set(range(needle.tokens)) - set(needle.needle)))


@pytest.mark.full
def test_a_policy_that_keeps_the_needle_finds_it_as_often_as_the_full_cache(smollm2, needles):
    full = [finds(smollm2, n) for n in needles]
    assert sum(full) >= 4  # else the control says nothing
    half = [finds(smollm2, n, Listed(keep=n.needle), n.tokens // 2) for n in needles]
    assert half == full
    # everything but the first four tokens, the needle, the question and a few words before it
    alone = [finds(smollm2, n, Listed(keep=n.needle), SINKS + len(n.needle) + n.question + SPARE) for n in needles]
    assert alone == full
    # and the other way round: everything but the needle
    assert not any(finds(smollm2, n, Listed(keep=others(n)), n.tokens - len(n.needle)) for n in needles)


@pytest.mark.full
def test_the_same_by_a_function_of_the_step(smollm2, needles):
    for n in needles[1:3]:
        assert finds(smollm2, n)
        assert finds(smollm2, n, ListedByRule(keep=n.needle), SINKS + len(n.needle) + n.question + SPARE)
        assert not finds(smollm2, n, ListedByRule(keep=others(n)), n.tokens - len(n.needle))
