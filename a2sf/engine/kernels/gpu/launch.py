"""The recursion as one fused Triton kernel, for GPUs.

One program runs one row and KV head from its first token to its last, or one row, where its heads share their tokens.
The tokens that it may see lie in a buffer of slots in global memory, one more than the most that a row of the batch retains,
rounded up, so that the work is O(T * budget * D) and nothing of size T x T exists. All query heads of a group read a
key once. What a rule states as data runs here (`knows` in `a2sf.engine.kernels`), step by step or every so many tokens.

Triton is optional: without it this module imports, and `available` says no. With `TRITON_INTERPRET=1` in the
environment *before Triton is first imported*, the same kernel runs on the CPU, slowly, which is how it is tested.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.kernels.gpu.self_check import find_fault
from a2sf.engine.kernels.gpu.step import recursion
from a2sf.engine.priorities import SHARE
from a2sf.engine.state import Attended, Call, EvictionState, Options, Segments
from a2sf.engine.tree import Ran, Rows, by_depth
from a2sf.errors import ConfigError, UnsoundKernelError, first_line
from a2sf.policies.ranking import terms
from a2sf.policies.rule import Rule, TokenFn

try:
    import triton
except ImportError:
    triton = None

TILES = {32: 64, 128: 512, 256: None}
"""Slots that a program reads together, for rows that retain fewer tokens than this: the fastest on an H100."""
LAUNCH = {
    # Slots are overwritten while the kernel runs. One stage leaves every load where it is written; more would let the
    # compiler prefetch across the barriers.
    "num_stages": 1,
    "enable_fp_fusion": True,
}


def available(device: torch.device | None = None) -> bool:
    """Whether the kernel can run: Triton is there, and so is a GPU (`device` is one, if given) or the interpreter."""
    if triton is None:
        return False
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return on_gpu or _interpreted()


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on `device`; None where it can."""
    if available(device):
        return None
    have = "Triton is not installed" if triton is None else f"the tensors are on {device}"
    return f"it needs Triton (extra gpu) and a CUDA device, and {have}"


def attend_triton(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion on a GPU; arguments and result as in `a2sf.engine.eviction.reference`.

    Raises:
        ConfigError: if Triton is missing, or the tensors are on a device that it does not run on.
        UnsoundKernelError: if what Triton compiled fails its self-check, or cannot be compiled.
    """
    if (reason := unavailable(query.device)) is not None:
        raise ConfigError("backend", "triton", reason)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():  # Triton launches on the current device
        found = by_depth(_triton_rows, Call(query, key, value, segments, options, state))
    if found.state is None:
        return found
    return replace(found, state=found.state.trim().contiguous())  # waits for the GPU, so once, and at the end


def _interpreted() -> bool:
    return not isinstance(recursion, triton.JITFunction)


def _triton_rows(rows: Rows, options: Options) -> Ran:
    flags = _flags(rows.rule, rows.key.shape[1], several=rows.schedule.spare > 0 or _above_budget(rows))
    tiles = [_tile(budget + rows.schedule.spare) for budget in rows.budgets]
    if not _interpreted():
        for tile in sorted(set(tiles)):
            check_compiled(rows, flags, tile)
    return _run(rows, options, flags, tiles)


def check_compiled(rows: Rows, flags: dict[str, Any], tile: int) -> None:
    """Check what is compiled for `rows` once per process: compilers have been wrong, and wrong scores look like scores.

    Raises:
        UnsoundKernelError: if it does not give what plain torch gives, or cannot be compiled.
    """
    H, K, D, V = rows.query.shape[1], rows.key.shape[1], rows.query.shape[-1], rows.value.shape[-1]
    constants = _constants(H // K, D, V, tile)
    variant = (rows.query.device, rows.query.dtype, *constants.values(), *flags.values())
    if variant not in _found:
        try:
            fault = find_fault(
                partial(_run, flags=flags, tiles=[tile, tile]), rows, several=flags["HOLES"], tile=constants["TILE"]
            )
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            fault = f"it cannot run ({type(error).__name__}: {first_line(error)})"
        _found[variant] = fault
    if (fault := _found[variant]) is not None:
        what = f"the Triton kernel fails its self-check on {rows.query.device} (Triton {triton.__version__}: {fault})"
        raise UnsoundKernelError(f"{what}; backend=torch does without it.")


_found: dict[tuple[Any, ...], str | None] = {}


def _run(rows: Rows, options: Options, flags: dict[str, Any], tiles: list[int]) -> Ran:
    """One launch for the rows of each tile; `tiles`: one per row. The CPU waits for the GPU only for ages and a trace."""
    B, H, T, D = rows.query.shape
    K, V = rows.key.shape[1], rows.value.shape[-1]
    rule, spare, old = rows.rule, rows.schedule.spare, rows.state
    device, held = rows.query.device, old.counts
    constants = {tile: _constants(H // K, D, V, tile) for tile in sorted(set(tiles))}
    sizes = next(iter(constants.values()))

    # `by_depth` packs time before heads: these transposes copy nothing
    key, value = (x.transpose(1, 2).contiguous() for x in (rows.key, rows.value))
    query = key.new_zeros(B, T, K, sizes["SIZES"], sizes["PADDED_G"])
    query[..., :D, : H // K] = (rows.query * options.scale).view(B, K, H // K, T, D).permute(0, 3, 1, 4, 2)
    output = query.new_zeros(B, T, H, V)

    # The slot buffer: what is cached already, and room for the new tokens, one more than may stay at most. Keys lie 32
    # slots together, size before slot: threads load neighbours, and each sums a logit by itself.
    past = old.positions.shape[-1]
    evicted = torch.full((B, K, past + T, 2), -1, dtype=torch.int32, device=device)  # a token is evicted once
    most = max(1, past, *(min(n + spare, past + length) for n, length in zip(rows.budgets, rows.lengths, strict=True)))
    slots = triton.cdiv(most + 1, max(tiles)) * max(tiles)

    def buffer(x: Tensor, fill: int = 0) -> Tensor:
        """`x` [B, K, past, ...] with `slots` slots."""
        filled = x.new_full((B, K, slots, *x.shape[3:]), fill)
        filled[:, :, :past] = x
        return filled

    keys = key.new_zeros(B, K, slots // 32, sizes["SIZES"], 32)
    if past:
        keys[..., :D, :] = buffer(old.keys.to(key.dtype)).view(B, K, slots // 32, 32, D).transpose(3, 4)
    values = buffer(old.values.to(key.dtype))
    scores = buffer(old.scores.to(key.dtype))
    positions = buffer(old.positions, fill=-1)

    def fixed(number: TokenFn | None) -> tuple[Tensor, Tensor]:
        """`m` or `b` of the new tokens and in the slots; anything, which is not read, where the rule has none."""
        if number is None:
            return scores, scores
        new = (old.seen[:, None] + torch.arange(T, device=device))[:, None].expand(B, K, T)
        of_new, of_held = number(rows.key, rows.value, new), number(old.keys, old.values, old.positions)
        return of_new.to(key.dtype).contiguous(), buffer(of_held.to(key.dtype))

    (weight, weights), (bias, biases) = fixed(rule.weight), fixed(rule.bias)
    factor = rows.forgetting_factor.to(key.dtype).contiguous()
    ages = int((old.seen + rows.length).max()) if rule.mean_over_age else 0
    arguments = (
        query,
        key,
        value,
        weight,
        bias,
        output,
        evicted,
        keys,
        values,
        scores,
        positions,
        weights,
        biases,
        query.new_empty(B, K, slots, sizes["PADDED_G"]),  # powers
        query.new_empty(B, K // flags["HEADS"], slots) if flags["RANKED"] else scores,
        terms(factor[:, None], torch.arange(ages, device=device)).contiguous() if ages else factor,
        held,
        *(x.contiguous() for x in (old.seen, rows.length, rows.budget, rows.recent, rows.sinks)),
        factor,
        T,
        slots,
        spare,
        ages,
        past + T,
        K,
        1,  # one
    )
    for tile, of_tile in constants.items():
        members = torch.tensor([row for row, its in enumerate(tiles) if its == tile])
        grid = (len(members) * K // flags["HEADS"],)
        here = members.to(device, non_blocking=True)
        recursion[grid](here, *arguments, **of_tile, **flags, **LAUNCH, num_warps=_warps(of_tile))

    state = None
    if options.return_state:
        state = EvictionState(
            positions=positions,
            scores=scores,
            keys=keys.transpose(3, 4).reshape(B, K, slots, -1)[..., :D],
            values=values,
            seen=old.seen + rows.length,
        ).compact(most)
    if not options.trace:
        return Ran(output.transpose(1, 2), state)
    is_event = evicted[..., 0] >= 0
    events = torch.cat([is_event.nonzero()[:, :2], evicted[is_event].long()], 1)
    return Ran(output.transpose(1, 2), state, events)


def _above_budget(rows: Rows) -> bool:
    if rows.state.positions.shape[-1] <= min(rows.budgets):
        return False
    return bool((rows.state.counts > rows.budget[:, None]).any())


def _flags(rule: Rule, K: int, several: bool) -> dict[str, Any]:
    """The parts of the kernel that a rule uses; `several`: more than one token may be evicted in a step."""
    ranked = rule.mean_over_age or rule.shared or rule.weight is not None or rule.bias is not None
    return {
        "HEADS": K if rule.shared else 1,
        "HOLES": several,
        "SCORED": rule.scored,
        "COUNTED": rule.count_above_uniform,
        "BY_AGE": rule.mean_over_age,
        "WEIGHTED": rule.weight is not None,
        "BIASED": rule.bias is not None,
        "RANKED": ranked,
        "SHARE": SHARE,
    }


def _tile(capacity: int) -> int:
    """Slots that a program reads together, for a row that retains at most `capacity` tokens between two steps.

    It must not depend on the batch, such as on its largest budget: it sets the order of the sums, and a row's result is the
    same to the last bit in whatever batch it is computed. (A beginning that sequences of several budgets share is summed
    like the sequence that it belongs to.)
    """
    return next(tile for tile, below in TILES.items() if below is None or capacity < below)


def _constants(G: int, D: int, V: int, tile: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    padded_g, padded_d, padded_v = (triton.next_power_of_2(x) for x in (G, D, V))
    at_once = min(16, padded_d)
    return {
        "G": G,
        "D": D,
        "V": V,
        "PADDED_G": padded_g,
        "PADDED_D": padded_d,
        "PADDED_V": padded_v,
        "SIZES": triton.cdiv(D, at_once) * at_once,
        "AT_ONCE": at_once,
        "TILE": max(32, min(tile, 4096 // padded_g)),
    }


def _warps(constants: dict[str, int]) -> int:
    """One for few slots, where only more programs help; else two threads for a slot, and no more than eight logits each."""
    tile = constants["TILE"]
    return min(16, max(1 if tile == 32 else tile // 16, tile * constants["PADDED_G"] // 256))
