"""The recursion on plain tensors, without a model: shapes as in `a2sf.engine.eviction`."""

from __future__ import annotations

import torch
from torch import Tensor

from a2sf.engine.eviction import EvictionState, Options, Segments
from a2sf.engine.kernels import attend


def evicting_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    budget: int | Tensor,
    recent: int | Tensor,
    sinks: int | Tensor = 0,
    forgetting_factor: float | Tensor,
    scale: float | None = None,
    lengths: Tensor | None = None,
    state: EvictionState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, EvictionState]:
    """Causal attention over a cache that token pruning keeps at `budget` tokens per KV head.

    Every row may follow a policy and budget of its own; a row's result never depends on the other rows.

    Args:
        query: [B, H, T, D], any floating dtype.
        key: [B, K, T, D] and
        value: [B, K, T, V]; `H` is a multiple of `K` (grouped-query attention shares one kept set per KV head).
        budget, recent, sinks: int, or int tensor [B]: `C`, `r`, `s` of docs/semantics.md.
        forgetting_factor: float, or float tensor [B], in [0, 1].
        scale: factor on the logits; default `D ** -0.5`.
        lengths: int tensor [B], the rows' own lengths if they are right-padded; output past a row's length is 0.
        state: continue from here; None: empty caches.
        backend: `auto`, or the name of one of `a2sf.engine.kernels.BACKENDS`.

    Returns:
        output [B, H, T, V] in the query's dtype, and the state after each row's last token.

    Raises:
        ValueError: if shapes do not fit, or a number is out of range.
    """
    _check_shapes(query, key, value)
    B, _, T, D = query.shape

    def per_row(name: str, x: int | float | Tensor, dtype: torch.dtype) -> Tensor:
        given = torch.as_tensor(x, dtype=dtype).cpu()
        if given.ndim and given.shape != (B,):
            raise ValueError(f"{name} must be one number or a tensor of {B}, one per row; got {tuple(given.shape)}")
        return given.expand(B).contiguous()

    integers = {"budget": budget, "recent": recent, "sinks": sinks, "lengths": T if lengths is None else lengths}
    C, r, s, length = (per_row(n, x, torch.int64) for n, x in integers.items())
    factor = per_row("forgetting_factor", forgetting_factor, torch.float64)
    if bool((C < 1).any() or (r < 0).any() or (s < 0).any() or (r + s > C).any()):
        raise ValueError("every row needs budget >= 1, recent >= 0, sinks >= 0 and recent + sinks <= budget")
    if not bool(((factor >= 0) & (factor <= 1)).all()):
        raise ValueError("every row's forgetting_factor must lie in [0, 1]")
    if bool((length < 0).any() or (length > T).any()):
        raise ValueError(f"every row's length must lie between 0 and the {T} tokens given")
    if state is not None and state.seen.shape[0] != B:
        raise ValueError(f"the state holds {state.seen.shape[0]} rows, the query {B}")

    rows = Segments(
        row=torch.arange(B),
        start=torch.zeros(B, dtype=torch.int64),
        length=length,
        parent=torch.full((B,), -1),
        budget=C,
        recent=r,
        sinks=s,
        forgetting_factor=factor,
    )
    options = Options(scale=D**-0.5 if scale is None else scale, return_state=True)
    attended = attend(query, key, value, rows, options, state, backend=backend)
    assert attended.state is not None
    return attended.output, attended.state


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not (query.ndim == key.ndim == value.ndim == 4):
        raise ValueError(f"query, key and value must have 4 dimensions [batch, heads, tokens, size]: {shapes}")
    fits = key.shape[:3] == value.shape[:3] and key.shape[0] == query.shape[0] and key.shape[2:] == query.shape[2:]
    if not fits or key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(f"shapes do not fit, or the query heads are not a multiple of the KV heads: {shapes}")
