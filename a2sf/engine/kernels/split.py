"""Splits a call that a kernel does not support into simpler calls: heads that differ; prompts and what follows them.

`run` attends a simpler call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from a2sf.engine.kernels.prompts import Run, by_prompt
from a2sf.engine.retention import full_heads_of
from a2sf.engine.state import Attended, AttentionCall, EvictionState, Segments
from a2sf.errors import ConfigError
from a2sf.policies.rule import ACCUMULATED
from a2sf.policies.slots import head_slots


def splitter_for(segments: Segments) -> Callable[[Run, AttentionCall], Attended] | None:
    """How a call is split into simpler ones; None where it cannot be."""
    rule, schedule = segments.rule, segments.schedule
    if rule.heads:
        return by_head_settings
    if rule.recording is not None:
        return None
    if rule.full_heads and not rule.calls:
        return by_heads
    if rule.precompute is not None or (rule.memory and rule.memory_fn is None):
        return None  # its function is called at every step
    # where the cut gave every head a share of its own, each later step depends on the prompt
    return by_prompt if schedule.prompt and not (segments.across_heads and schedule.then != "keep") else None


def by_heads(run: Run, call: AttentionCall) -> Attended:
    """The heads that retain everything, and the others by the rest of their rule."""
    segments, K = call.segments, call.key.shape[1]
    return _by_group(run, segments.once(("full heads", K), lambda: _full_and_others(segments, K)), call)


def _full_and_others(segments: Segments, K: int) -> list[tuple[Tensor, Segments]]:
    """Of `K` heads those that retain everything, and the others, with their segments."""
    full = torch.zeros(K, dtype=torch.bool)
    full[full_heads_of(segments.rule, K)] = True
    everything = segments.unlimited(ACCUMULATED)
    others = replace(segments, rule=replace(segments.rule, full_heads=()))
    return [(heads.nonzero()[:, 0], part) for heads, part in ((full, everything), (~full, others)) if heads.any()]


def by_head_settings(run: Run, call: AttentionCall) -> Attended:
    """Heads with numbers of their own (`Rule.heads`), those that have the same ones together.

    Raises:
        ConfigError: if the rule is for another number of key/value heads.
    """
    segments, rule, K = call.segments, call.segments.rule, call.key.shape[1]
    if len(rule.heads) != K:
        raise ConfigError("policy", f"{len(rule.heads)} heads", f"the layer has {K} key/value heads")
    return _by_group(run, segments.once("heads of equal numbers", lambda: _equal_heads(segments, K)), call)


def _equal_heads(segments: Segments, K: int) -> list[tuple[Tensor, Segments]]:
    """Heads that have the same numbers, with segments that have these."""
    rule = segments.rule
    slots = torch.tensor([head_slots(rule.heads, C) for C in segments.budget.tolist()]).view(-1, K, 3)
    same: dict[object, list[int]] = {}
    # equal heads may get other slots at a larger budget, as shares are rounded
    by_place = segments.growth is not None and len({head.share for head in rule.heads}) > 1
    for h, head in enumerate(rule.heads):
        settings = (head, h if by_place else 0) if segments.growth else (head.forgetting_factor, head.mean_over_age)
        same.setdefault((settings, slots[:, h].numpy().tobytes()), []).append(h)
    groups = []
    for at in same.values():
        budget, recent, sinks = slots[:, at[0]].clone().unbind(1)
        factor = torch.full_like(segments.forgetting_factor, rule.heads[at[0]].forgetting_factor)
        plain = replace(rule, heads=(), mean_over_age=rule.heads[at[0]].mean_over_age)
        of_heads = replace(segments, budget=budget, recent=recent, sinks=sinks, forgetting_factor=factor, rule=plain)
        if segments.growth is not None:
            growth = tuple(None if g is None else g.of_head(at[0]) for g in segments.growth)
            of_heads = replace(of_heads, growth=growth)
        groups.append((torch.tensor(at), of_heads))
    return groups


def _by_group(run: Run, groups: list[tuple[Tensor, Segments]], call: AttentionCall) -> Attended:
    """Groups of key/value heads, int64 [n] each with its segments, as one layer; every head is in one group."""
    query, key, value, _, options, state = call
    size = query.shape[1] // key.shape[1]
    done = []
    for kv, segments in groups:
        q = (kv[:, None] * size + torch.arange(size)).flatten()
        before = None if state is None else state.heads(kv)
        done.append(
            (kv, q, run(AttentionCall(query[:, q], key[:, kv], value[:, kv], segments, options.heads(kv), before)))
        )
    kv_back, q_back = torch.cat([kv for kv, _, _ in done]).argsort(), torch.cat([q for _, q, _ in done]).argsort()
    ran = [attended for _, _, attended in done]
    output = torch.cat([a.output for a in ran], 1)[:, q_back]
    final = None
    if options.return_state:
        final = EvictionState.join_heads([a.state for a in ran if a.state is not None], kv_back)
    if not options.trace:
        return Attended(output, final)
    evicted = torch.cat([a.evicted for a in ran if a.evicted is not None], 1)[:, kv_back]
    cuts = [
        torch.stack([c[:, 0], kv.to(c.device)[c[:, 1]], *c[:, 2:].T], 1)
        for kv, _, a in done
        if (c := a.cuts) is not None
    ]
    return Attended(output, final, evicted, torch.cat(cuts))
