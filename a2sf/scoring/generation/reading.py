"""Prompts are read once for all systems: in rows as scored sequences are, and with the states in which they end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.engine.state import EvictionState
from a2sf.hf.attention import NonFiniteError, Plan
from a2sf.hf.attention.mixed import MixedPass
from a2sf.hf.attention.plan_parts import PlanPart
from a2sf.hf.cache.rows import ReadRow
from a2sf.scoring.passes.looks import LookingRow, rows_of
from a2sf.scoring.passes.packing import Pack
from a2sf.scoring.passes.sequences import PassSettings, ScoredSequence, pass_of


@dataclass
class Reading:
    """Passes over prompts that were read together.

    Attributes:
        row: what was read; `row.sequences` says what is retained of each prompt, by its place among the prompts.
        packs: the rows of it without what policies looked at.
        logits: float32 [prompts, vocabulary], what follows each of `row.items`.
        ends: the prompts as rows that continue.
        plans: what computed them; each serves places among the prompts.
    """

    row: LookingRow
    packs: Sequence[Pack]
    logits: Tensor
    ends: list[ReadRow]
    plans: Sequence[Plan]


def read_prompts(
    model: PreTrainedModel, settings: PassSettings, prompts: Sequence[ScoredSequence], tokens_per_pass: int, room: int
) -> Iterator[Reading]:
    """Read prompts in passes of about `tokens_per_pass` computed tokens; the longest come first.

    Args:
        room: tokens for whose states there is memory in all layers, where policies look at prompts before they are cut.

    Raises:
        NonFiniteError: if logits depend on NaN or infinity; its `rows` are places among the prompts.
        PolicyError: as `LookingRow.decide`.
    """
    for packs in rows_of(range(len(prompts)), prompts, model, tokens_per_pass, room):
        read = LookingRow.of(packs, prompts, settings.device)
        try:
            yield _read(model, settings, read, packs, tokens_per_pass)
        except NonFiniteError as error:  # whose rows are segments
            raise NonFiniteError(error.where, error.dtype, read.blamed(error.rows)) from error


def _read(
    model: PreTrainedModel, settings: PassSettings, read: LookingRow, packs: Sequence[Pack], tokens_per_pass: int
) -> Reading:
    row, whole = read.row, pass_of(read.row, read.sequences, settings)
    prompts = [which for which, i in enumerate(row.items) if i >= 0]
    last = torch.tensor([int(row.last(which, 1)[0]) for which in prompts])
    logits: list[Tensor] = [torch.empty(0)] * len(last)
    parts: list[PlanPart] = []
    for number, part in enumerate(read.parts(whole, tokens_per_pass, model, keep=True)):
        parts += part.reading.plans if isinstance(part.reading, MixedPass) else [part.reading]  # type: ignore[arg-type, list-item]
        mine = ((last >= part.begin) & (last < part.end)).nonzero()[:, 0].tolist()
        columns = last[mine].unique()
        with read.logits(number, part, columns, model) as logits_of:
            found = torch.cat([x[0].float() for x in logits_of])
        for which in mine:
            logits[which] = found[int((columns == last[which]).nonzero())].clone()
    states = _states(parts, read.sequences, settings.layers)
    return Reading(read, packs, torch.stack(logits), [states[i] for i in read.items], whole.plans)


def _states(parts: Sequence[PlanPart], sequences: Mapping[int, ScoredSequence], layers: int) -> dict[int, ReadRow]:
    """By the place of a prompt, the row that it becomes."""
    found: dict[int, ReadRow] = {}
    for part in {id(p.plan): p for p in parts}.values():
        plan = part.plan
        assert plan is not None
        calls = [sum(1 for at in part.shapes if at[0] == layer) for layer in range(layers)]
        shapes = []
        for layer, n in enumerate(calls):
            of_calls = [part.shapes[layer, call] for call in range(n)]
            shapes.append(
                {"heads": [k for k, _, _ in of_calls], "group": [g for _, g, _ in of_calls], "window": of_calls[0][2]}
            )
        for i, segment in zip(plan.serves, plan.ends, strict=True):
            if i < 0:
                continue
            of_layers = [
                EvictionState.join_heads([part.states[layer, call, segment] for call in range(n)])
                for layer, n in enumerate(calls)
            ]
            prompt = sequences[i]
            found[i] = ReadRow(len(prompt.read), prompt.prompt, prompt.retention, of_layers, shapes)
    return found
