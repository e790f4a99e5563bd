"""Compiled code is checked before it is used: a few tokens, against plain torch in float64 on the CPU.

No setting of a GPU's precision applies there, so that any difference comes from the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.state import EvictionState, Options
from a2sf.engine.stepwise import torch_rows
from a2sf.engine.tree import PaddedRows, RowResults
from a2sf.policies.base import UNLIMITED
from a2sf.policies.schedule import STEP, Schedule

TOKENS = 12
TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the output, which is rounded to its dtype; scores are float32 always. A product in TF32 or bfloat16 is off by more."""
HUGE = 400.0
"""A key's entries that take all attention, so that what is left underflows once its token is gone."""


def find_fault(run: Callable[..., RowResults], rows: PaddedRows, *, several: bool, columns: int) -> str | None:
    """What is wrong with `run` for calls like `rows`; None: nothing was found.

    Args:
        run: as `a2sf.engine.kernels.gpu.run.run`, in chunks of few tokens.
        rows: of its tensors only sizes, dtype and device matter.
        several: whether more than one token may be evicted in a step.
        columns: of a chunk, which one row of the check needs; 0: nothing is evicted.
    """
    case = _small_case(rows, Schedule("every", every=3) if several else STEP, columns)
    options = Options(rows.query.shape[-1] ** -0.5, return_state=True, trace=True)
    got = run(case, options, [columns] * 3, case.state.counts.tolist())
    want = torch_rows(_on(case, "cpu", torch.float64), options)
    if _retained(got) != _retained(want) or _evicted(got) != _evicted(want):
        return "it retains other tokens than plain torch"
    width = max(x.end.positions.shape[-1] for x in (got, want))
    states = [vars(x.end.pad(width)) for x in (got, want)]
    pairs = [(states[0][name], states[1][name], torch.float32) for name in ("scores", "keys", "values")]
    for i, n in enumerate(case.lengths):
        pairs.append((got.output[i, :, :n], want.output[i, :, :n], rows.query.dtype))
    for a, b, dtype in pairs:
        if not torch.allclose(a.cpu().double(), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]):
            return "its numbers differ from plain torch's"
    return None


def _small_case(rows: PaddedRows, schedule: Schedule, columns: int) -> PaddedRows:
    """Three rows that continue a state: one with many tokens cached, one with few, one whose sums underflow."""
    random = torch.Generator().manual_seed(0)
    K, held = rows.key.shape[1], max(2, columns // 2 - 7) if columns else 73
    positions = torch.full((3, held), -1)
    positions[0] = torch.arange(held)
    positions[1:, :2] = torch.tensor([0, 2])
    filled = (positions >= 0)[:, None].expand(3, K, held)

    def tensor(like: Tensor, tokens: int) -> Tensor:
        return torch.randn(3, like.shape[1], tokens, like.shape[-1], generator=random, dtype=torch.float64)

    state = EvictionState(
        positions=positions[:, None].expand(3, K, held).contiguous(),
        scores=torch.rand(3, K, held, generator=random, dtype=torch.float64) * filled,
        keys=tensor(rows.key, held) * filled[..., None],
        values=tensor(rows.value, held) * filled[..., None],
        seen=torch.tensor([held, 6, 3]),
    )
    state.keys[2, :, 0] = HUGE
    query = tensor(rows.query, TOKENS)
    query[2] = query[2].abs()
    budgets, lengths = [held + 3, 5, 2] if columns else [UNLIMITED] * 3, [TOKENS, TOKENS - 2, TOKENS - 5]
    case = PaddedRows(
        query=query,
        key=tensor(rows.key, TOKENS),
        value=tensor(rows.value, TOKENS),
        length=torch.tensor(lengths),
        budget=torch.tensor(budgets),
        recent=torch.tensor([0, 2, 2]),
        sinks=torch.tensor([held // 2, 1, 0]),
        forgetting_factor=torch.tensor([0.3, 0.7, 0.9], dtype=torch.float64),
        prompt=torch.zeros(3, dtype=torch.int64),
        lengths=lengths,
        budgets=budgets,
        rule=rows.rule,
        schedule=schedule,
        state=state,
    )
    return _on(case, rows.query.device, rows.query.dtype)


def _on(rows: PaddedRows, device: torch.device | str, dtype: torch.dtype) -> PaddedRows:
    """`rows` with tensors, keys and values in `dtype`; scores are never less than float32."""

    def moved(of: Any) -> dict[str, Any]:
        return {n: x.to(device, _dtype(n, x, dtype)) for n, x in vars(of).items() if isinstance(x, Tensor)}

    return replace(rows, **moved(rows), state=replace(rows.state, **moved(rows.state)))


def _dtype(name: str, x: Tensor, dtype: torch.dtype) -> torch.dtype:
    if not x.is_floating_point() or name == "forgetting_factor":
        return x.dtype
    return torch.promote_types(dtype, torch.float32) if name == "scores" else dtype


def _retained(ran: RowResults) -> list[Any]:
    return [[[p for p in head if p >= 0] for head in row] for row in ran.end.positions.tolist()]


def _evicted(ran: RowResults) -> list[Any]:
    return [] if ran.evictions is None else sorted(ran.evictions.tolist())
