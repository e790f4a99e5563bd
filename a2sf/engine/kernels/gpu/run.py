"""The recursion on a GPU: chunks of tokens, of which each is four launches of compiled code (Triton).

`scan.py` explains the launches; `products.py` has those beside the scan, `launch.py` starts them, `driver.py` says
when, and `plan.py` what a chunk is. A row that evicts nothing in a call, such as a prompt before its cut, needs no
scan: its attention is as usual, and its scores are column sums of it. What a rule states as data runs here (`knows` in
`a2sf.engine.kernels`).

Triton is optional: without it this module imports, and `available` says no. With `TRITON_INTERPRET=1` in the
environment *before Triton is first imported*, the same code runs on the CPU, slowly, which is how it is tested.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.kernels.gpu import driver, plan
from a2sf.engine.kernels.gpu.jit import triton
from a2sf.engine.kernels.gpu.launch import Launches, interpreted, scan_constants
from a2sf.engine.kernels.gpu.self_check import find_fault
from a2sf.engine.state import Attended, AttentionCall, EvictionState, Options, Segments
from a2sf.engine.tree import PaddedRows, RowResults, by_depth
from a2sf.errors import ConfigError, UnsoundKernelError, first_line

READ = 0
"""In the place of a number of columns: rows that evict nothing."""


def available(device: torch.device | None = None) -> bool:
    """Whether it can run: Triton is there, and so is a GPU (`device` is one, if given) or the interpreter."""
    if triton is None:
        return False
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    return on_gpu or interpreted()


def unavailable(device: torch.device) -> str | None:
    """Why it cannot run on `device`; None where it can."""
    if available(device):
        return None
    have = "Triton is not installed" if triton is None else f"the tensors are on {device}"
    return f"it needs Triton (extra gpu) and a CUDA device, and {have}"


def too_wide(call: AttentionCall) -> str | None:
    """Why a call's rows hold too many tokens; None where they do not."""
    segments, held = call.segments, 0 if call.state is None else call.state.positions.shape[-1]
    group = call.query.shape[1] // (1 if segments.rule.shared else call.key.shape[1])
    return segments.once(("too wide", held, group), lambda: plan.too_wide(segments, held, segments.ends(), group))


@torch.no_grad()
def attend_triton(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options, state: EvictionState | None = None
) -> Attended:
    """The recursion on a GPU in float32; arguments and result as in `a2sf.engine.eviction.reference`.

    Raises:
        ConfigError: if Triton is missing, or the tensors are on a device that it does not run on, or float64.
        UnsoundKernelError: if what Triton compiled fails its self-check, or cannot be compiled.
    """
    if (reason := unavailable(query.device)) is not None:
        raise ConfigError("backend", "triton", reason)
    if query.dtype == torch.float64:
        raise ConfigError("backend", "triton", "it computes in float32, and these are float64 tensors")
    # half precision is read as it is, but beside a state, whose keys are float32 and may come from elsewhere
    half = query.dtype in (torch.float16, torch.bfloat16) and query.dtype == key.dtype == value.dtype and state is None
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():  # Triton launches on the current device
        call = AttentionCall(query, key, value, segments, options, state)
        found = by_depth(triton_rows, call, query.dtype if half else torch.float32)
    if found.state is None:
        return found
    end = found.state.trim()  # waits for the GPU, so once, and at the end
    end = replace(end, keys=end.keys.float(), values=end.values.float())
    return replace(found, state=end.contiguous())


def triton_rows(rows: PaddedRows, options: Options) -> RowResults:
    """Rows in groups of equal numbers of columns; those that evict nothing are a group too."""
    counts = (rows.state.counts if rows.counts is None else rows.counts).tolist()  # waits for a given state only
    held = tuple(map(tuple, counts))
    groups = rows.once(("columns", held), lambda: [_columns(rows, i, counts[i]) for i in range(len(counts))])
    if not interpreted():
        for N in sorted(set(groups)):
            check_compiled(rows, N, counts)
    return run(rows, options, groups, counts)


def _columns(rows: PaddedRows, row: int, held: list[int]) -> int:
    """The columns of a row's chunks; `READ` if it evicts nothing. They set the order of sums: the batch has no say."""
    numbers = max(held), rows.lengths[row], rows.budgets[row], rows.schedule.spare
    if not plan.evicts(*numbers):
        return READ
    N = plan.columns(*numbers)
    assert N is not None, "a call that is too wide"
    return N


def run(
    rows: PaddedRows, options: Options, groups: list[int], held: list[list[int]], most: int | None = None
) -> RowResults:
    """Run each group. `groups`: each row's columns, `held`: its heads' tokens, `most`: tokens of a chunk."""
    launches, heads = Launches(driver.batch_of(rows, options.scale)), rows.query.shape[1]
    done: list[tuple[list[int], RowResults]] = []
    for N in sorted(set(groups)):
        members = [row for row, its in enumerate(groups) if its == N]
        if N != READ:
            for part in _parts(rows, members, N, heads):
                group = driver.Group.of(rows, part, held)
                done.append((part, driver.evict(launches, group, N, most or plan.most_tokens(N, heads), options)))
            continue
        # by SDPA: long rows, from their beginning, whose scores nobody asks for
        scored = options.return_state and rows.rule.scored
        long = [i for i in members if not scored and rows.lengths[i] >= driver.LONG and max(held[i]) == 0]
        for part, alone in ((long, True), ([i for i in members if i not in long], False)):
            if part:
                done.append((part, driver.read(launches, driver.Group.of(rows, part, held), options, alone=alone)))
    return _together(launches.batch.output.flatten(2, 3).transpose(1, 2), done, options)


def _parts(rows: PaddedRows, members: list[int], N: int, heads: int) -> list[list[int]]:
    """Rows that evict, in launches: as many in one as the scratch of their shares allows."""
    members = sorted(members, key=lambda i: -rows.lengths[i])  # rows of similar length together
    tokens = min(plan.most_tokens(N, heads), N, rows.lengths[members[0]])
    size = max(1, plan.SCRATCH // (tokens * N * heads * 4)) if rows.rule.scored else len(members)
    return [members[i : i + size] for i in range(0, len(members), size)]


def _together(output: Tensor, done: list[tuple[list[int], RowResults]], options: Options) -> RowResults:
    """What groups gave, in the order of the rows."""
    order = torch.tensor([row for part, _ in done for row in part]).argsort()
    counts = torch.cat([ran.counts for _, ran in done if ran.counts is not None])[order]
    state = None
    if options.return_state:
        state = EvictionState.stack([ran.end for _, ran in done])
        state = state if len(done) == 1 and order.equal(torch.arange(len(order))) else state.select(order)
    evictions = [ran.evictions for _, ran in done if ran.evictions is not None]
    return RowResults(output, state, torch.cat(evictions) if options.trace else None, counts)


def check_compiled(rows: PaddedRows, N: int, held: list[list[int]]) -> None:
    """Check what is compiled for `rows` once per process: compilers have been wrong, and wrong scores look like scores.

    Raises:
        UnsoundKernelError: if it does not give what plain torch gives, or cannot be compiled.
    """
    (H, D), (K, V), rule = rows.query.shape[1::2], (rows.key.shape[1], rows.value.shape[-1]), rows.rule
    several = rows.schedule.spare > 0 or any(max(h) > budget for h, budget in zip(held, rows.budgets, strict=True))
    constants = scan_constants(rule, K, H // K, D, N, several and N != READ)
    variant = (rows.query.device, rows.query.dtype, V, *constants.values())
    if variant not in _found:
        try:
            fault = find_fault(partial(run, most=5), rows, several=several, columns=N)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            fault = f"it cannot run ({type(error).__name__}: {first_line(error)})"
        _found[variant] = fault
    if (fault := _found[variant]) is not None:
        what = f"the Triton kernel fails its self-check on {rows.query.device} (Triton {triton.__version__}: {fault})"
        raise UnsoundKernelError(f"{what}; backend=torch does without it.")


_found: dict[tuple[Any, ...], str | None] = {}
