"""The recursion as one fused Triton kernel, for GPUs.

One program runs one row and KV head from its first token to its last. The tokens it may see live in a buffer of
`budget + 1` slots in global memory, so that the work is O(T * budget * D) and nothing of size T x T exists. All query
heads of a group read a key once.

Triton is optional: without it this module imports, and `available` says no. With `TRITON_INTERPRET=1` in the
environment *before Triton is first imported*, the same kernel runs on the CPU, slowly, which is how it is tested.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from a2sf.engine.levels import Ran, Rows, by_levels
from a2sf.engine.state import Attended, EvictionState, Options, Segments
from a2sf.engine.stepwise import torch_rows
from a2sf.errors import ConfigError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Elements of the [heads, size, slots] product that one step of the slot loop holds in registers: 64 a thread, the most
# that compiles without spilling for the usual head sizes.
TILE_ELEMENTS = 16384
LAUNCH = {
    "num_warps": 8,
    # Slots are overwritten while the kernel runs. One stage keeps every load where it is written; more would let the
    # compiler prefetch, which is only worth trying where the result can be checked on a GPU.
    "num_stages": 1,
    "enable_fp_fusion": True,
}


def available(device: torch.device | None = None) -> bool:
    """Whether the kernel can run: Triton is there, and so is a GPU (`device` is one, if given) or the interpreter."""
    if triton is None:
        return False
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return on_gpu or _interpreted()


def attend_triton(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion on a GPU; arguments and result as in `a2sf.engine.eviction.reference`.

    Raises:
        ConfigError: if Triton is missing, or the tensors are on a device that it does not run on.
    """
    if not available(query.device):
        have = "Triton is not installed" if triton is None else f"the tensors are on {query.device}"
        raise ConfigError("backend", "triton", f"it needs Triton (extra gpu) and a CUDA device, and {have}")
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():  # Triton launches on the current device
        return by_levels(_triton_rows, query, key, value, segments, options, state)


def _interpreted() -> bool:
    return not isinstance(_recursion, triton.JITFunction)


def _jit(function):
    # T changes from call to call: without this, 1 and multiples of 16 would compile kernels of their own
    return triton.jit(do_not_specialize=["T"])(function) if triton is not None else function


@_jit
def _recursion(
    query,  # [B, T, H, D], times the scale
    key,  # [B, T, K, D]
    value,  # [B, T, K, V]
    output,  # [B, T, H, V]
    evicted,  # int32 [B, T, K]
    keys,  # [B, K, D, slots], the slot buffer: in and out, in any order of position
    values,  # [B, K, slots, V]
    scores,  # [B, K, slots]
    positions,  # int64 [B, K, slots]
    logits,  # [B, K, G, slots], scratch
    cached,  # int64 [B, K], how many slots are filled at the start: the first ones
    seen,  # int64 [B], as are length, budget, recent, sinks
    length,
    budget,
    recent,
    sinks,
    factor,  # [B]
    T,
    slots,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PADDED_G: tl.constexpr,  # powers of two, masked
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    TILE: tl.constexpr,  # slots at a time while attending,
    WIDE_TILE: tl.constexpr,  # and while scoring
):
    # Threads of the program hand data to each other through global memory, and Triton does not order a store before
    # another thread's load, nor a load before another thread's store. `debug_barrier` does, for all threads of the
    # program, and no other program touches this row and head. Barriers stand wherever a location changes hands.
    here = tl.program_id(0).to(tl.int64)
    row, head = here // K, here % K
    keys += here * D * slots
    values += here * slots * V
    scores += here * slots
    positions += here * slots
    logits += here * slots * G

    first_position = tl.load(seen + row)
    row_length, row_budget = tl.load(length + row), tl.load(budget + row)
    row_recent, row_sinks = tl.load(recent + row), tl.load(sinks + row)
    row_factor = tl.load(factor + row)

    g, d, v = tl.arange(0, PADDED_G), tl.arange(0, PADDED_D), tl.arange(0, PADDED_V)
    real_g, real_d, real_v = g < G, d < D, v < V
    used = tl.load(cached + here)  # slots 0 to used - 1 are filled while a token attends
    slot = used  # where the next token goes: the slot that was vacated last, or a new one

    for t in range(row_length):
        token = row * T + t
        now = first_position + t

        # insert, with score 0
        new_key = tl.load(key + (token * K + head) * D + d, mask=real_d)
        new_value = tl.load(value + (token * K + head) * V + v, mask=real_v)
        tl.store(keys + d * slots + slot, new_key, mask=real_d)
        tl.store(values + slot * V + v, new_value, mask=real_v)
        tl.store(scores + slot, 0.0)
        tl.store(positions + slot, now)
        used = tl.maximum(used, slot + 1)
        tl.debug_barrier()  # the slot is written before it is read

        # attend to the cached tokens: softmax online, logits kept for the scores
        heads = token * K * G + head * G + g
        q = tl.load(query + heads[:, None] * D + d, mask=real_g[:, None] & real_d, other=0.0)
        peak = tl.full([PADDED_G], float("-inf"), q.dtype)
        total = tl.zeros([PADDED_G], q.dtype)
        attended = tl.zeros([PADDED_G, PADDED_V], q.dtype)
        for begin in range(0, used, TILE):
            n = begin + tl.arange(0, TILE)
            filled = n < used
            k_tile = tl.load(keys + d[:, None] * slots + n, mask=real_d[:, None] & filled, other=0.0)
            v_tile = tl.load(values + n[:, None] * V + v, mask=filled[:, None] & real_v, other=0.0)
            logit = tl.where(filled, tl.sum(q[:, :, None] * k_tile, axis=1), float("-inf"))
            tl.store(logits + g[:, None] * slots + n, logit, mask=real_g[:, None] & filled)
            higher = tl.maximum(peak, tl.max(logit, axis=1))  # finite: a tile has a filled slot
            shrink = tl.exp(peak - higher)
            weight = tl.exp(logit - higher[:, None])
            total = total * shrink + tl.sum(weight, axis=1)
            attended = attended * shrink[:, None] + tl.sum(weight[:, :, None] * v_tile, axis=1)
            peak = higher
        tl.store(output + heads[:, None] * V + v, attended / total[:, None], mask=real_g[:, None] & real_v)
        tl.debug_barrier()  # the logits are written before they are read

        # score, and look for the least score among the unprotected, the oldest of equals; per lane first
        least = tl.full([WIDE_TILE], float("inf"), q.dtype)
        oldest = tl.full([WIDE_TILE], 2**62, tl.int64)
        victim = tl.zeros([WIDE_TILE], tl.int64)
        for begin in range(0, used, WIDE_TILE):
            n = begin + tl.arange(0, WIDE_TILE)
            filled = n < used
            logit = tl.load(logits + g[:, None] * slots + n, mask=real_g[:, None] & filled, other=float("-inf"))
            p = tl.exp(logit - peak[:, None]) / total[:, None]
            score = row_factor * tl.load(scores + n, mask=filled, other=0.0) + tl.sum(p, axis=0)
            position = tl.load(positions + n, mask=filled, other=0)
            # Several threads may hold a copy of the same element. All of them read the old score before one writes
            # the new one; a copy that read it later would count this token twice and choose another victim.
            tl.debug_barrier()
            tl.store(scores + n, score, mask=filled)
            free = filled & (position >= row_sinks) & (position <= now - row_recent)
            better = free & ((score < least) | ((score == least) & (position < oldest)))
            least = tl.where(better, score, least)
            oldest = tl.where(better, position, oldest)
            victim = tl.where(better, n, victim)

        # evict
        slot = used
        gone = now * 0 - 1
        if used > row_budget:
            oldest = tl.where(least == tl.min(least, axis=0), oldest, 2**62)
            gone = tl.min(oldest, axis=0)
            slot = tl.max(tl.where(oldest == gone, victim, 0), axis=0)
        tl.store(evicted + token * K + head, gone.to(tl.int32))
        tl.debug_barrier()  # scores are written and read before the next token takes the vacated slot

    if slot < used:
        tl.store(positions + slot, -1)


def _triton_rows(rows: Rows, options: Options) -> Ran:
    B, H, T, D = rows.query.shape
    K, V = rows.key.shape[1], rows.value.shape[-1]
    device, held = rows.query.device, (rows.state.positions >= 0).sum(-1)
    if held.numel() and bool((held > rows.budget[:, None]).any()):
        return torch_rows(rows, options)  # the kernel evicts one token a step, and here more go at once

    # `by_levels` packs time before heads: these transposes copy nothing
    query, key, value = (x.transpose(1, 2).contiguous() for x in (rows.query * options.scale, rows.key, rows.value))
    output = query.new_zeros(B, T, H, V)
    evicted = torch.full((B, T, K), -1, dtype=torch.int32, device=device)

    # The slot buffer: what is cached already, and room for the new tokens, one more than the budget at most. Keys lie
    # size before slot, so that neighbouring threads load neighbouring slots and each sums its logits by itself.
    old = rows.state
    past = old.positions.shape[-1]
    slots = max(past, int(torch.minimum(rows.budget, past + rows.length).max())) + 1
    slots = triton.cdiv(slots, 16) * 16  # aligned rows of keys

    def buffer(x: Tensor, fill: int = 0) -> Tensor:
        """`x` [B, K, past, ...] with `slots` slots."""
        filled = x.new_full((B, K, slots, *x.shape[3:]), fill)
        filled[:, :, :past] = x
        return filled

    keys = buffer(old.keys.to(key.dtype)).transpose(2, 3).contiguous()
    values = buffer(old.values.to(key.dtype))
    scores = buffer(old.scores.to(key.dtype))
    positions = buffer(old.positions, fill=-1)

    _recursion[(B * K,)](
        query,
        key,
        value,
        output,
        evicted,
        keys,
        values,
        scores,
        positions,
        query.new_empty(B, H, slots),  # logits
        held,
        *(x.contiguous() for x in (old.seen, rows.length, rows.budget, rows.recent, rows.sinks)),
        rows.forgetting_factor.to(key.dtype).contiguous(),
        T,
        slots,
        **_constants(K, H // K, D, V),
        **LAUNCH,
    )

    # canonical form: ascending positions, empty slots last
    kept_slots = max(1, int((positions >= 0).sum(-1).max()))
    order = positions.masked_fill(positions < 0, 2**62).argsort(dim=-1)[:, :, :kept_slots]
    positions = positions.gather(2, order)

    def cached_of(x: Tensor) -> Tensor:
        picked = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))
        return torch.where(positions[..., None] >= 0, picked, 0)

    state = EvictionState(
        positions=positions,
        scores=cached_of(scores[..., None])[..., 0],
        keys=cached_of(keys.transpose(2, 3)),
        values=cached_of(values),
        seen=old.seen + rows.length,
    )
    gone = None
    if options.trace:
        evicted = evicted.transpose(1, 2)
        gone = torch.cat([(evicted >= 0).nonzero(), evicted[evicted >= 0][:, None].long()], 1)
    return Ran(output.transpose(1, 2), state, gone)


def _constants(K: int, G: int, D: int, V: int) -> dict[str, int]:
    """What the kernel is compiled for.

    The tiles must not depend on the batch, such as on its largest budget: they set the order of the sums, and a row's
    result is the same to the last bit in whatever batch it is computed.
    """
    padded_g, padded_d, padded_v = (triton.next_power_of_2(x) for x in (G, D, V))
    return {
        "K": K,
        "G": G,
        "D": D,
        "V": V,
        "PADDED_G": padded_g,
        "PADDED_D": padded_d,
        "PADDED_V": padded_v,
        "TILE": min(64, max(1, TILE_ELEMENTS // (padded_g * max(padded_d, padded_v)))),
        "WIDE_TILE": min(512, max(1, 4096 // padded_g)),
    }
