"""Prompts are read once for all systems: packed as scored sequences are, and with the states in which they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.engine.state import EvictionState
from a2sf.hf.attention import NonFiniteError, Plan, attached, running
from a2sf.hf.attention.continued import Continued
from a2sf.hf.attention.mixed import Mixed
from a2sf.hf.attention.named import configs_of
from a2sf.hf.cache.rows import ReadRow
from a2sf.hf.calls.chunks import bounds
from a2sf.hf.calls.logits import logits_in_parts
from a2sf.scoring.passes.long_rows import in_parts, saves
from a2sf.scoring.passes.packing import Pack, pack
from a2sf.scoring.passes.sequences import Model, ScoredSequence, pass_of


@dataclass
class Reading:
    """One pass over prompts.

    Attributes:
        row: what was read; `row.items` are places among the prompts.
        logits: float32 [prompts, vocabulary], what follows each.
        ends: the prompts as rows that continue.
        plans: what computed them; each serves places among the prompts.
    """

    row: Pack
    logits: Tensor
    ends: list[ReadRow]
    plans: Sequence[Plan]


def read_prompts(
    model: PreTrainedModel, about: Model, prompts: Sequence[ScoredSequence], tokens_per_pass: int
) -> Iterator[Reading]:
    """Read prompts in passes of about `tokens_per_pass` computed tokens; the longest come first.

    Raises:
        NonFiniteError: if logits depend on NaN or infinity; its `rows` are places among the prompts.
    """
    for row in pack([p.item() for p in prompts], max_tokens=tokens_per_pass):
        try:
            yield _read(model, about, row, prompts, tokens_per_pass)
        except NonFiniteError as error:  # whose rows are segments
            bad = set(error.rows)
            through = [i for i, path in zip(row.items, row.path, strict=True) if bad.intersection(path)]
            raise NonFiniteError(error.where, error.dtype, through) from error


def _read(
    model: PreTrainedModel, about: Model, row: Pack, prompts: Sequence[ScoredSequence], tokens_per_pass: int
) -> Reading:
    whole, size = pass_of(row, prompts, about), len(row.tokens)
    ends = bounds(size, tokens_per_pass)
    if len(ends) > 1 and not saves(row, ends, prompts, model.config):
        ends = [size]
    last = torch.tensor([int(row.last(which, 1)[0]) for which in range(len(row.items))])
    logits: list[Tensor] = [torch.empty(0)] * len(last)
    parts: list[Continued] = []
    for part in in_parts(whole, ends, keep=True):
        parts += part.reading.plans if isinstance(part.reading, Mixed) else [part.reading]  # type: ignore[arg-type, list-item]
        mine = ((last >= part.begin) & (last < part.end)).nonzero()[:, 0].tolist()
        columns = last[mine].sub(part.begin).unique() if mine else torch.tensor([0])  # a model needs one at least
        with attached(model, configs=configs_of(model)), torch.inference_mode(), running(part.reading):
            made = logits_in_parts(
                model,
                columns.to(about.device),
                input_ids=torch.tensor([row.tokens[part.begin : part.end]], device=about.device),
                position_ids=torch.tensor([row.positions[part.begin : part.end]], device=about.device),
                use_cache=False,
            )
            found = torch.cat([x[0].float() for x in made])
        for which in mine:
            at = int((columns == last[which] - part.begin).nonzero())
            logits[which] = found[at].clone()
    states = _states(parts, prompts, about.layers)
    return Reading(row, torch.stack(logits), [states[i] for i in row.items], whole.plans)


def _states(parts: Sequence[Continued], prompts: Sequence[ScoredSequence], layers: int) -> dict[int, ReadRow]:
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
            of_layers = [
                EvictionState.join_heads([part.states[layer, call, segment] for call in range(n)])
                for layer, n in enumerate(calls)
            ]
            prompt = prompts[i]
            found[i] = ReadRow(len(prompt.read), prompt.prompt, prompt.retention, of_layers, shapes)
    return found
