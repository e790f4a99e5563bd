"""Policies that are functions of a step: the same in one pass, token by token, in parts of a prompt, and in a batch."""

from __future__ import annotations

import pytest
import torch

from a2sf import PrunedCache, pruning
from a2sf.engine.invariants import schedules
from a2sf.hf.calls.around import cache_name_of
from tests.models import shared
from tests.policies import instances, label, tiered

PROMPT, TOKENS, BUDGET = 24, 28, 7


def functions() -> list:
    made = [p for p in instances() if p.causal and not p.prepares and p.keeps(BUDGET).rule.calls]
    return [(p, s) for p in made for s in schedules(p)]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() < 1e-3 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(("policy", "schedule"), tiered(functions(), each=1), ids=label)
def test_one_pass_parts_and_single_tokens_agree(policy, schedule):
    model = shared("llama")
    ids = torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    budget = max(BUDGET, policy.min_budget)

    def empty() -> PrunedCache:
        return PrunedCache(model, policy, budget, schedule=schedule, context_tokens=PROMPT)

    def read(tokens: torch.Tensor, cache: PrunedCache) -> torch.Tensor:
        return model(tokens, **{cache_name_of(model): cache}, use_cache=True).logits

    with torch.inference_mode():
        with pruning(model, policy, budget, schedule=schedule, context_tokens=PROMPT):
            full = model(ids, use_cache=False).logits
        for bounds in ([9, PROMPT], [13, PROMPT + 3]):
            cache, rows = empty(), torch.tensor([0, 1])
            ends = [*bounds, *range(bounds[-1] + 1, TOKENS + 1)]
            for begin, end in zip([0, *ends], ends, strict=False):
                if begin == 9:  # stored and loaded in the middle of the prompt, with the rows turned
                    stored, cache, rows = cache.stored(), empty(), rows.flip(0)
                    cache.load(stored)
                    cache.batch_select_indices(rows)
                close(read(ids[rows, begin:end], cache), full[rows, begin:end])
        close(read(ids[1:], empty()), full[1:])
