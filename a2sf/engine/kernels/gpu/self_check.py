"""A compiled kernel is checked before it is used: a few tokens, against plain torch in float64 on the CPU.

No setting of a GPU's precision applies there, so that any difference comes from the kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.state import EvictionState, Options
from a2sf.engine.stepwise import torch_rows
from a2sf.engine.tree import Ran, Rows, RunRows
from a2sf.policies.schedule import STEP, Schedule

TOKENS = 12
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-10}
"""A matrix product in TF32 or bfloat16 is off by more."""


def find_fault(run: RunRows, rows: Rows, *, several: bool, tile: int) -> str | None:
    """What is wrong with `run` for calls like `rows`; None: nothing was found.

    Args:
        rows: of its tensors only sizes, dtype and device matter.
        several: whether more than one token may be evicted in a step.
        tile: how many slots the kernel reads together; one row of the check has more.
    """
    case = _small_case(rows, Schedule("every", every=3) if several else STEP, tile)
    options = Options(rows.query.shape[-1] ** -0.5, return_state=True, trace=True)
    got, want = run(case, options), torch_rows(_on(case, "cpu", torch.float64), options)
    if _retained(got) != _retained(want) or _evicted(got) != _evicted(want):
        return "it retains other tokens than plain torch"
    width = max(x.end.positions.shape[-1] for x in (got, want))
    states = [vars(x.end.pad(width)) for x in (got, want)]
    pairs = [(got.output, want.output), *((states[0][name], states[1][name]) for name in ("scores", "keys", "values"))]
    tolerance = TOLERANCE[rows.query.dtype]
    if not all(torch.allclose(a.cpu().double(), b, atol=tolerance, rtol=tolerance) for a, b in pairs):
        return "its numbers differ from plain torch's"
    return None


def _small_case(rows: Rows, schedule: Schedule, tile: int) -> Rows:
    """Two rows that continue a state: one has more than a tile cached, of which the last may be evicted; one is short."""
    random = torch.Generator().manual_seed(0)
    K, held = rows.key.shape[1], tile + 9
    positions = torch.stack([torch.arange(held), torch.full((held,), -1)])
    positions[1, :3] = torch.tensor([0, 2, 3])
    filled = (positions >= 0)[:, None].expand(2, K, held)

    def tensor(like: Tensor, tokens: int) -> Tensor:
        return torch.randn(2, like.shape[1], tokens, like.shape[-1], generator=random, dtype=torch.float64)

    state = EvictionState(
        positions=positions[:, None].expand(2, K, held).contiguous(),
        scores=torch.rand(2, K, held, generator=random, dtype=torch.float64) * filled,
        keys=tensor(rows.key, held) * filled[..., None],
        values=tensor(rows.value, held) * filled[..., None],
        seen=torch.tensor([held, 6]),
    )
    case = Rows(
        query=tensor(rows.query, TOKENS),
        key=tensor(rows.key, TOKENS),
        value=tensor(rows.value, TOKENS),
        length=torch.tensor([TOKENS, TOKENS - 2]),
        budget=torch.tensor([held + 3, 5]),
        recent=torch.tensor([0, 2]),
        sinks=torch.tensor([tile - 4, 1]),
        forgetting_factor=torch.tensor([0.3, 0.7], dtype=torch.float64),
        prompt=torch.zeros(2, dtype=torch.int64),
        lengths=[TOKENS, TOKENS - 2],
        budgets=[held + 3, 5],
        rule=rows.rule,
        schedule=schedule,
        state=state,
    )
    return _on(case, rows.query.device, rows.query.dtype)


def _on(rows: Rows, device: torch.device | str, dtype: torch.dtype) -> Rows:
    def moved(of: Any) -> dict[str, Any]:
        tensors = {name: x for name, x in vars(of).items() if isinstance(x, Tensor)}
        return {n: x.to(device, dtype if x.is_floating_point() else x.dtype) for n, x in tensors.items()}

    return replace(rows, **moved(rows), state=replace(rows.state, **moved(rows.state)))


def _retained(ran: Ran) -> list[Any]:
    return [[[p for p in head if p >= 0] for head in row] for row in ran.end.positions.tolist()]


def _evicted(ran: Ran) -> list[Any]:
    return [] if ran.evictions is None else sorted(ran.evictions.tolist())
