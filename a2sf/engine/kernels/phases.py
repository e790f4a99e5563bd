"""Budgets that grow with the text, for kernels that know one number for a segment: each segment in phases of equal numbers.

A phase continues the state that the one before it ends with, as a child continues its parent's; so it is one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from a2sf.engine.state import Attended, AttentionCall, Segments
from a2sf.policies.base import Retention


def by_phases(run: Callable[[AttentionCall], Attended], call: AttentionCall) -> Attended:
    """Segments whose budgets grow, as segments whose budgets do not."""
    segments = call.segments
    seen = () if call.state is None else tuple(call.state.seen.tolist())
    phases = segments.once(("phases", seen), lambda: phases_of(segments, seen))
    return run(call._replace(segments=phases))


def needs_every_step(segments: Segments) -> bool:
    """Whether what a growing sequence evicts at a step does not follow from its state and the numbers of that step.

    So it is where a cut gave every head a share of its own, and for a rule that looks at a whole sequence beforehand.
    """
    return (segments.across_heads and segments.schedule.then != "keep") or segments.rule.precompute is not None


def phases_of(segments: Segments, seen: tuple[int, ...] = ()) -> Segments:
    """Chains of segments in place of `segments`; the states that are returned are those of the last of each chain.

    Args:
        seen: tokens read before each segment without a parent; none: empty caches.
    """
    assert segments.growth is not None
    of: list[int] = []
    start: list[int] = []
    length: list[int] = []
    parent: list[int] = []
    last: list[int] = []  # of each segment, the last of its chain, and the position after it
    end: list[int] = []
    stated: list[Retention | None] = []
    given = iter(seen)
    columns = (segments.start, segments.length, segments.parent)
    for i, (column, n, p) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        first = end[p] if p >= 0 else next(given, 0)
        growth = segments.growth[i]
        phases = [(first, None)] if growth is None else growth.phases(first, max(first + 1, first + n))
        ends = [*(begin for begin, _ in phases[1:]), first + n]
        for k, ((begin, numbers), upto) in enumerate(zip(phases, ends, strict=True)):
            parent.append(len(of) - 1 if k else last[p] if p >= 0 else -1)
            of.append(i)
            start.append(column + begin - first)
            length.append(upto - begin)
            stated.append(numbers)
        last.append(len(of) - 1)
        end.append(first + n)
    chains = segments.select(torch.tensor(of, dtype=torch.int64))
    changed = {name: getattr(chains, name).clone() for name in ("budget", "recent", "sinks")}
    for at, retention in enumerate(stated):
        if retention is not None:
            for name, x in changed.items():
                x[at] = getattr(retention, name)
    final = torch.zeros(len(of), dtype=torch.bool)
    final[last] = True
    places = (torch.tensor(x, dtype=torch.int64) for x in (start, length, parent))
    changed |= dict(zip(("start", "length", "parent"), places, strict=True)) | {"final": final}
    return replace(chains, growth=None, **changed)
