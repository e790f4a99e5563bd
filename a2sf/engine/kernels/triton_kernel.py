"""The recursion as one fused Triton kernel, for GPUs.

One program runs one row and KV head from its first token to its last, or one row, where its heads share a kept set. The
tokens it may see live in a buffer of `budget + 1` slots in global memory, so that the work is O(T * budget * D) and nothing
of size T x T exists. All query heads of a group read a key once. What a rule states as data runs here (`knows` in
`a2sf.engine.kernels`), step by step or every so many tokens.

Triton is optional: without it this module imports, and `available` says no. With `TRITON_INTERPRET=1` in the
environment *before Triton is first imported*, the same kernel runs on the CPU, slowly, which is how it is tested.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.kernels.triton_step import recursion
from a2sf.engine.levels import Ran, Rows, by_levels, empty_state
from a2sf.engine.priorities import SHARE, terms
from a2sf.engine.state import Attended, EvictionState, Options, Segments
from a2sf.engine.stepwise import torch_rows
from a2sf.errors import ConfigError, UnsoundKernelError
from a2sf.policies.rule import Fixed, Rule
from a2sf.policies.schedule import STEP, Schedule

try:
    import triton
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
        UnsoundKernelError: if what Triton compiled fails its trial.
    """
    if not available(query.device):
        have = "Triton is not installed" if triton is None else f"the tensors are on {query.device}"
        raise ConfigError("backend", "triton", f"it needs Triton (extra gpu) and a CUDA device, and {have}")
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():  # Triton launches on the current device
        return by_levels(_triton_rows, query, key, value, segments, options, state)


def _interpreted() -> bool:
    return not isinstance(recursion, triton.JITFunction)


def _triton_rows(rows: Rows, options: Options) -> Ran:
    if not _interpreted():
        prove(rows)
    return _run(rows, options)


def prove(rows: Rows) -> None:
    """Run what was compiled for `rows` on a few tokens, against plain torch, once in a process.

    Triton's compiler has been wrong before (3.5 to 3.7 left every token in the cache), and wrong scores look like scores.

    Raises:
        UnsoundKernelError: if it keeps other tokens, or gives another output.
    """
    H, K, D, V = rows.query.shape[1], rows.key.shape[1], rows.query.shape[-1], rows.value.shape[-1]
    flags = _flags(rows.rule, K, _several(rows))
    variant = (rows.query.device, rows.query.dtype, *_constants(K, H // K, D, V).values(), *flags.values())
    if variant not in _proved:
        trial, options = _trial(rows, Schedule("every", every=3) if flags["HOLES"] else STEP), Options(D**-0.5)
        got, want = _run(trial, options), torch_rows(trial, options)
        width = max(x.state.positions.shape[-1] for x in (got, want))
        same = got.state.pad(width).positions.equal(want.state.pad(width).positions)
        _proved[variant] = same and torch.allclose(got.output, want.output, atol=1e-3, rtol=1e-3)
    if not _proved[variant]:
        raise UnsoundKernelError(
            "backend",
            "triton",
            f"what Triton {triton.__version__} compiled for {rows.query.device} is wrong; give torch",
        )


_proved: dict[tuple[Any, ...], bool] = {}


def _trial(rows: Rows, schedule: Schedule) -> Rows:
    """Two short rows of random numbers under the rule of `rows`, some tokens of which go."""
    random, like = torch.Generator().manual_seed(0), rows.query

    def tensor(x: Tensor) -> Tensor:
        return torch.randn(2, x.shape[1], 12, x.shape[-1], generator=random).to(like)

    def numbers(first: int, second: int) -> Tensor:
        return torch.tensor([first, second], device=like.device)

    key, value = tensor(rows.key), tensor(rows.value)
    return Rows(
        query=tensor(rows.query),
        key=key,
        value=value,
        length=numbers(12, 10),
        budget=numbers(5, 4),
        recent=numbers(0, 2),
        sinks=numbers(1, 0),
        forgetting_factor=torch.tensor([0.3, 1.0], dtype=torch.float64, device=like.device),
        prompt=numbers(0, 0),
        rule=rows.rule,
        schedule=schedule,
        state=empty_state(key, value, rows.rule),
    )


def _run(rows: Rows, options: Options) -> Ran:
    B, H, T, D = rows.query.shape
    K, V = rows.key.shape[1], rows.value.shape[-1]
    rule, spare, old = rows.rule, rows.schedule.spare, rows.state
    device, held = rows.query.device, _held(rows)

    # `by_levels` packs time before heads: these transposes copy nothing
    query, key, value = (x.transpose(1, 2).contiguous() for x in (rows.query * options.scale, rows.key, rows.value))
    output = query.new_zeros(B, T, H, V)

    # The slot buffer: what is cached already, and room for the new tokens, one more than may stay at most. Keys lie
    # size before slot, so that neighbouring threads load neighbouring slots and each sums its logits by itself.
    past = old.positions.shape[-1]
    gone = torch.full((B, K, past + T, 2), -1, dtype=torch.int32, device=device)  # a token goes once
    slots = max(past, int(torch.minimum(rows.budget + spare, past + rows.length).max())) + 1
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

    def fixed(number: Fixed | None) -> tuple[Tensor, Tensor]:
        """`m` or `b` of the new tokens and in the slots; anything, which is not read, where the rule has none."""
        if number is None:
            return scores, scores
        new = (old.seen[:, None] + torch.arange(T, device=device))[:, None].expand(B, K, T)
        of_new, of_held = number(rows.key, rows.value, new), number(old.keys, old.values, old.positions)
        return of_new.to(key.dtype).contiguous(), buffer(of_held.to(key.dtype))

    (weight, weights), (bias, biases) = fixed(rule.weight), fixed(rule.bias)
    factor = rows.forgetting_factor.to(key.dtype)
    ages = int((old.seen + rows.length).max()) if rule.by_age else 0
    flags = _flags(rule, K, _several(rows))
    programs = B * K // flags["HEADS"]

    recursion[(programs,)](
        query,
        key,
        value,
        weight,
        bias,
        output,
        gone,
        keys,
        values,
        scores,
        positions,
        weights,
        biases,
        query.new_empty(B, H, slots),  # logits
        query.new_empty(programs, slots) if flags["RANKED"] else scores,
        terms(factor[:, None], torch.arange(ages, device=device)).contiguous(),
        held,
        *(x.contiguous() for x in (old.seen, rows.length, rows.budget, rows.recent, rows.sinks)),
        factor.contiguous(),
        T,
        slots,
        spare,
        ages,
        past + T,
        **_constants(K, H // K, D, V),
        **flags,
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
    if not options.trace:
        return Ran(output.transpose(1, 2), state)
    went = gone[..., 0] >= 0
    return Ran(output.transpose(1, 2), state, torch.cat([went.nonzero()[:, :2], gone[went].long()], 1))


def _held(rows: Rows) -> Tensor:
    return (rows.state.positions >= 0).sum(-1)


def _several(rows: Rows) -> bool:
    return rows.schedule.spare > 0 or bool((_held(rows) > rows.budget[:, None]).any())


def _flags(rule: Rule, K: int, several: bool) -> dict[str, Any]:
    """The parts of the kernel that a rule asks for; `several`: more than one token may go in a step."""
    ranked = rule.by_age or rule.shared or rule.weight is not None or rule.bias is not None
    return {
        "HEADS": K if rule.shared else 1,
        "HOLES": several,
        "SCORED": rule.scored,
        "COUNTED": rule.counted,
        "BY_AGE": rule.by_age,
        "WEIGHTED": rule.weight is not None,
        "BIASED": rule.bias is not None,
        "RANKED": ranked,
        "SHARE": SHARE,
    }


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
