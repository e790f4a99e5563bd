"""The eviction recursion: the readable reference that every kernel is checked against.

For each token: insert, attend, score, evict (docs/semantics.md). Shapes as in `a2sf.engine.state`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from a2sf.engine.priorities import (
    added_scores,
    function_priorities,
    merged,
    pooled_scores,
    rule_priorities,
    step_fields,
    to_evict,
    to_evict_across_heads,
    token_numbers,
)
from a2sf.engine.state import Attended as Attended
from a2sf.engine.state import AttentionCall, joined_queries, last_queries, remembered
from a2sf.engine.state import EvictionState as EvictionState
from a2sf.engine.state import Options as Options
from a2sf.engine.state import Segments as Segments
from a2sf.engine.state import accumulation_dtype as accumulation_dtype
from a2sf.engine.tree import PaddedRows, RowResults, by_depth
from a2sf.errors import UserError
from a2sf.policies.model.softmax import PLAIN, Softmax
from a2sf.policies.rule import Sequence, Step


def reference(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion, one token at a time over all rows and heads: slow and readable; the kernels are tested against it.

    Gradients flow through the attention; the choice of the retained tokens has none. Arguments as in `AttentionCall`.
    """
    differentiable = wants_gradient(query, key, value, state, options.softmax)
    if differentiable and segments.rule.merge_fn is not None:
        raise UserError("a policy that merges what it evicts has no gradient; call it under torch.no_grad()")
    call = AttentionCall(query, key, value, segments, options, state)
    return by_depth(partial(_reference_rows, differentiable), call)


def wants_gradient(
    query: Tensor, key: Tensor, value: Tensor, state: EvictionState | None = None, softmax: Softmax = PLAIN
) -> bool:
    """Whether an input of a call needs a gradient."""
    inputs = [query, key, value, *([] if state is None else [state.keys, state.values])]
    inputs += [] if softmax.learned_sinks is None else [softmax.learned_sinks]
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


@torch.inference_mode(False)
@torch.no_grad()
def _reference_rows(differentiable: bool, rows: PaddedRows, options: Options) -> RowResults:
    query, device, rule, old = rows.query, rows.query.device, rows.rule, rows.state
    B, H, T, D = query.shape
    K, past = rows.key.shape[1], old.positions.shape[-1]
    with torch.set_grad_enabled(differentiable):
        grouped = query.reshape(B, K, H // K, T, D)
        all_keys = torch.cat([old.keys, rows.key], dim=2)
        all_values = torch.cat([old.values, rows.value], dim=2)
    retention = rows.per_head(K, query.dtype)

    # one column per token that is or may come to be cached: the given state's, then the new ones
    new = (old.seen[:, None] + torch.arange(T, device=device))[:, None].expand(B, K, T)
    position = torch.cat([old.positions, new], dim=2)
    cached = torch.cat([old.positions >= 0, torch.zeros_like(new, dtype=torch.bool)], dim=2)
    score = torch.cat([old.scores.to(query.dtype), query.new_zeros(B, K, T)], dim=2)
    memory = _memory(rows, grouped.detach(), options)
    queries = joined_queries(rule, old.queries, grouped.detach()) if rule.queries else None
    real = torch.cat([old.positions, rows.positions], dim=2)  # -1 for padding
    weight, bias = token_numbers(rule, all_keys.detach(), all_values.detach(), real)

    output = query.new_zeros(B, H, T, rows.value.shape[-1])
    evictions = []
    for t in range(T):
        n = past + t + 1  # columns that exist by now
        now = new[:, :1, t : t + 1]
        if rows.growth is not None:
            here_now = old.seen + (rows.length - 1).clamp(min=0, max=t)
            retention = rows.at(here_now).per_head(K, query.dtype)
        active = (t < rows.length)[:, None, None]  # rows that have a token here
        # insert, with score 0
        cached[:, :, n - 1 : n] = active
        here = cached[:, :, :n].clone()
        with torch.set_grad_enabled(differentiable):
            keys, values = (x[:, :, :n].where(here[..., None], 0) for x in (all_keys, all_values))
            # attend to the cached tokens
            logits = torch.einsum("bkgd,bknd->bkgn", grouped[:, :, :, t], keys) * options.scale
            p = options.softmax(logits[:, :, :, None], ~here[:, :, None, None])[:, :, :, 0]
            p = p.masked_fill(~here[:, :, None], 0)
            attended = torch.einsum("bkgn,bknv->bkgv", p, values).reshape(B, H, -1)
            output[:, :, t] = torch.where(active, attended, 0)
        p, keys, values = p.detach(), keys.detach(), values.detach()
        # score
        count = here.sum(-1, keepdim=True)
        fresh = retention.forgetting_factor * score[:, :, :n] + added_scores(rule, p, count)
        score[:, :, :n] = torch.where(active & here & retention.scores_now(now), fresh, score[:, :, :n])
        # rank
        positions = position[:, :, :n].where(here, -1)
        shown = score[:, :, :n].where(here, 0), memory[:, :, :n].where(here[..., None], 0)
        window = None if queries is None else queries[:, :, :, t + 1 : t + 1 + rule.queries]
        step = Step(p, keys, values, positions, here, now, *shown, window, **step_fields(retention, options, positions))
        excess = torch.where(active, retention.excess(count, now), 0)
        free = retention.unprotected(positions, here, now) & active
        if rule.cut is not None:
            pooled_score = pooled_scores(retention, step, free)
            score[:, :, :n] = torch.where(active & retention.at_cut(now), pooled_score, step.scores)
            step = replace(step, scores=score[:, :, :n].clone())
        if rule.priority_fn is not None:
            priority, remembered_now = function_priorities(retention, step, free, excess)
            memory[:, :, :n] = torch.where(active[..., None], remembered_now, memory[:, :, :n])
        else:
            priority = rule_priorities(
                retention, step, None if weight is None else weight[:, :, :n], None if bias is None else bias[:, :, :n]
            )
        # evict the smallest priorities among the unprotected, ties: the oldest first
        out = to_evict(rule, priority, positions, free, excess)
        if rule.recording is not None:
            out = rule.recording.evicted(step) & active
        if retention.across_heads:
            out = torch.where(
                active & retention.at_cut(now), to_evict_across_heads(retention, priority, step, free), out
            )
        cached[:, :, :n] &= ~out
        if rule.merge_fn is not None and bool(out.any()):
            changed = merged(retention, step, out)
            stays = cached[:, :, :n, None] & out.any(-1).any(1)[:, None, None, None]
            with torch.set_grad_enabled(differentiable):
                all_keys, all_values = (
                    torch.cat([x.where(stays, before[:, :, :n]), before[:, :, n:]], 2)
                    for x, before in zip(changed, (all_keys, all_values), strict=True)
                )
            weight, bias = token_numbers(rule, all_keys.detach(), all_values.detach(), real)
        row, head, column = out.nonzero(as_tuple=True)
        evictions.append(torch.stack([row, head, torch.full_like(row, t), position[row, head, column]], 1))
    with torch.set_grad_enabled(differentiable):
        end = EvictionState(
            positions=position.where(cached, -1),
            scores=score,
            keys=all_keys,
            values=all_values,
            seen=old.seen + rows.length,
            memory=None if remembered(rule) is None else rows.blank_if_finished(memory),
            queries=rows.blank_if_finished(last_queries(rule, old.queries, grouped.detach(), rows.length)),
        ).compact()
    return RowResults(output, end, torch.cat(evictions) if evictions else None)


def _memory(rows: PaddedRows, grouped: Tensor, options: Options) -> Tensor:
    """The rule's memory of the given state's tokens and, at the start, of the new ones, [B, K, past + T, M]."""
    (B, K, T, _), old = rows.key.shape, rows.state
    if rows.rule.precompute is not None:
        seen = grouped, rows.key.detach(), rows.value.detach(), rows.length
        return rows.rule.precompute(Sequence(*seen, options.scale, options.softmax))
    past = rows.query.new_zeros(*old.positions.shape, rows.rule.memory) if old.memory is None else old.memory
    return torch.cat([past.to(rows.query.dtype), rows.query.new_zeros(B, K, T, rows.rule.memory)], dim=2)
