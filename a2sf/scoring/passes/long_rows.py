"""Reads a row that is longer than a pass in parts, if that takes less memory although caches are held between the parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from a2sf.hf.attention import Plan, rope_switch
from a2sf.hf.attention.mixed import MixedPass
from a2sf.hf.attention.plan_parts import mixed_parts_of, parts_of
from a2sf.hf.memory import ModelSizes
from a2sf.policies.base import Retention
from a2sf.policies.schedule import Schedule
from a2sf.scoring.passes.packing import Pack
from a2sf.scoring.passes.sequences import ScoredSequence, Sequences


@dataclass(frozen=True)
class Part:
    """Columns `[begin, end)` of a row, and the pass that reads them."""

    begin: int
    end: int
    reading: Plan | MixedPass


def in_parts(reading: Plan | MixedPass, ends: Sequence[int], keep: bool = False) -> Iterator[Part]:
    """A row's pass in parts that end at the columns `ends`; `keep`: whether the final states of sequences are kept."""
    if isinstance(reading, MixedPass):
        passes: list[Any] = mixed_parts_of(reading, ends, keep)
    else:
        passes = [part for part, _ in parts_of(reading, np.arange(ends[-1]), ends, keep)]
    for begin, end, part in zip([0, *ends], ends, passes, strict=False):
        yield Part(begin, end, part)


def parts_save_memory(row: Pack, ends: Sequence[int], sequences: Sequences, config: Any) -> bool:
    """Whether reading a row in parts that end at `ends` takes less memory than at once, by a rough count of numbers."""
    read = [sequences[i] for i in row.items]
    if any(r.needs_future for r in read):
        return False  # an oracle needs the tokens to come, which a part does not know
    if any(len(r.read) > rope_switch(config) for r in read):
        return False  # rotary scaling depends on the longest sequence
    sizes = ModelSizes.of(config)
    per_token = 2 * sizes.kv_heads * sizes.head
    computed = 3 * sizes.hidden + 2 * sizes.intermediate
    largest = max(end - begin for begin, end in zip([0, *ends], ends, strict=False))
    return per_token * cached_at_most(read) < (len(row.tokens) - largest) * computed


def cached_at_most(sequences: Sequence[ScoredSequence]) -> int:
    """The most tokens that the caches of all layers hold between parts; equal states count once."""
    states = {(r.retention, r.schedule, r.prompt, len(r.read)) for r in sequences}
    return sum(_most(k, n, prompt, schedule) for retention, schedule, prompt, n in states for k in retention)


def _most(retention: Retention, tokens: int, prompt: int, schedule: Schedule) -> int:
    if (
        retention.rule.full_heads
        or retention.rule.threshold is not None
        or (schedule.prompt and schedule.then == "keep")
    ):
        return tokens
    most = retention.after(tokens).budget + schedule.spare
    return min(tokens, max(prompt if schedule.prompt else 0, most))
