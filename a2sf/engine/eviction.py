"""The eviction recursion: the readable reference that every kernel is checked against.

For each token: insert, attend, score, evict (docs/semantics.md). Shapes as in `a2sf.engine.state`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from a2sf.engine.levels import Ran, Rows, by_levels
from a2sf.engine.priorities import (
    Numbers,
    mass,
    of_own,
    of_rule,
    pooled,
    smallest,
    smallest_of_all_heads,
    unprotected,
)
from a2sf.engine.state import Attended as Attended
from a2sf.engine.state import EvictionState as EvictionState
from a2sf.engine.state import Options as Options
from a2sf.engine.state import Segments as Segments
from a2sf.engine.state import accumulation_dtype as accumulation_dtype
from a2sf.policies.rule import Sequence, Step


def reference(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion, one token at a time over all rows and heads; slow, readable, the oracle of the kernels.

    Where a gradient is asked for, it goes through what is attended to; which tokens are kept has none.

    Args:
        query: [B, H, T, D].
        key: [B, K, T, D] and
        value: [B, K, T, V], any floating dtype and strides.
        segments: what to attend (see `Segments`).
        state: the state the parentless segments start from, one row for each in their order; None: empty caches.
    """
    differentiable = wants_gradient(query, key, value, state)
    return by_levels(partial(_reference_rows, differentiable), query, key, value, segments, options, state)


def wants_gradient(query: Tensor, key: Tensor, value: Tensor, state: EvictionState | None = None) -> bool:
    """Whether a gradient is asked for of a call's input."""
    inputs = [query, key, value, *([] if state is None else [state.keys, state.values])]
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


@torch.inference_mode(False)
@torch.no_grad()
def _reference_rows(differentiable: bool, rows: Rows, options: Options) -> Ran:
    query, device, rule, old = rows.query, rows.query.device, rows.rule, rows.state
    B, H, T, D = query.shape
    K, past = rows.key.shape[1], old.positions.shape[-1]
    with torch.set_grad_enabled(differentiable):
        grouped = query.reshape(B, K, H // K, T, D)
        all_keys = torch.cat([old.keys, rows.key], dim=2)
        all_values = torch.cat([old.values, rows.value], dim=2)
    numbers = Numbers.of(rows)

    # one column per token that is or may come to be cached: the given state's, then the new ones
    new = (old.seen[:, None] + torch.arange(T, device=device))[:, None].expand(B, K, T)
    position = torch.cat([old.positions, new], dim=2)
    cached = torch.cat([old.positions >= 0, torch.zeros_like(new, dtype=torch.bool)], dim=2)
    score = torch.cat([old.scores.to(query.dtype), query.new_zeros(B, K, T)], dim=2)
    memory = _memory(rows, grouped.detach(), options.scale)
    fixed = all_keys.detach(), all_values.detach(), position
    weight, bias = (None if f is None else f(*fixed) for f in (rule.weight, rule.bias))

    output = query.new_zeros(B, H, T, rows.value.shape[-1])
    gone = []
    for t in range(T):
        n = past + t + 1  # columns that exist by now
        now = new[:, :1, t : t + 1]
        going = (t < rows.length)[:, None, None]  # rows that have a token here
        # insert, with score 0
        cached[:, :, n - 1 : n] = going
        here = cached[:, :, :n].clone()
        with torch.set_grad_enabled(differentiable):
            keys, values = (x[:, :, :n].where(here[..., None], 0) for x in (all_keys, all_values))
            # attend to the cached tokens
            logits = torch.einsum("bkgd,bknd->bkgn", grouped[:, :, :, t], keys) * options.scale
            p = logits.masked_fill(~here[:, :, None], -torch.inf).softmax(-1).masked_fill(~here[:, :, None], 0)
            attended = torch.einsum("bkgn,bknv->bkgv", p, values).reshape(B, H, -1)
            output[:, :, t] = torch.where(going, attended, 0)
        p, keys, values = p.detach(), keys.detach(), values.detach()
        # score
        count = here.sum(-1, keepdim=True)
        fresh = numbers.factor * score[:, :, :n] + mass(rule, p, count)
        score[:, :, :n] = torch.where(going & here & numbers.scored(now), fresh, score[:, :, :n])
        # rank
        positions = position[:, :, :n].where(here, -1)
        shown = score[:, :, :n].where(here, 0), memory[:, :, :n].where(here[..., None], 0)
        step = Step(p, keys, values, positions, here, now, *shown)
        free = unprotected(numbers, positions, here, now) & going
        if rule.cut is not None:
            pooled_score = pooled(numbers, step, free)
            score[:, :, :n] = torch.where(going & numbers.at_cut(now), pooled_score, step.scores)
            step = replace(step, scores=score[:, :, :n].clone())
        if rule.priority_fn is not None:
            priority, kept = of_own(rule, step, free)
            memory[:, :, :n] = torch.where(going[..., None], kept, memory[:, :, :n])
        else:
            priority = of_rule(
                numbers, step, None if weight is None else weight[:, :, :n], None if bias is None else bias[:, :, :n]
            )
        # evict the smallest priorities among the unprotected, of equals the oldest
        out = smallest(priority, positions, free, torch.where(going, numbers.excess(count, now), 0))
        if numbers.across_heads:
            out = torch.where(going & numbers.at_cut(now), smallest_of_all_heads(numbers, priority, step, free), out)
        cached[:, :, :n] &= ~out
        row, head, column = out.nonzero(as_tuple=True)
        gone.append(torch.stack([row, head, torch.full_like(row, t), position[row, head, column]], 1))
    with torch.set_grad_enabled(differentiable):
        end = _canonical(rows, cached, position, score, all_keys, all_values, memory)
    return Ran(output, end, torch.cat(gone) if gone else None)


def _memory(rows: Rows, grouped: Tensor, scale: float) -> Tensor:
    """What the rule keeps of the given state's tokens and, to begin with, of the new ones, [B, K, past + T, M]."""
    (B, K, T, _), old = rows.key.shape, rows.state
    if rows.rule.precompute is not None:
        return rows.rule.precompute(Sequence(grouped, rows.key.detach(), rows.value.detach(), rows.length, scale))
    past = rows.query.new_zeros(*old.positions.shape, rows.rule.memory) if old.memory is None else old.memory
    return torch.cat([past.to(rows.query.dtype), rows.query.new_zeros(B, K, T, rows.rule.memory)], dim=2)


def _canonical(
    rows: Rows, cached: Tensor, position: Tensor, score: Tensor, keys: Tensor, values: Tensor, memory: Tensor
) -> EvictionState:
    """The cached columns, which are in order of position, moved to the front."""
    slots = max(1, int(cached.sum(-1).max()))
    column = (~cached).int().argsort(dim=-1, stable=True)[:, :, :slots]
    kept = cached.gather(2, column)

    def of(x: Tensor) -> Tensor:
        return torch.where(kept[..., None], x.gather(2, column[..., None].expand(-1, -1, -1, x.shape[-1])), 0)

    return EvictionState(
        positions=torch.where(kept, position.gather(2, column), -1),
        scores=of(score[..., None])[..., 0],
        keys=of(keys),
        values=of(values),
        seen=rows.state.seen + rows.length,
        # what was foreseen is of no use to a sequence that goes on
        memory=None if rows.rule.priority_fn is None or rows.rule.precompute is not None else of(memory),
    )
