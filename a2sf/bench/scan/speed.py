"""What the readable scan (`scan.py`) costs beside the CPU's kernel: per call, while decoding, and in a sweep.

numba is imported when it is needed, because it would count in the processes of `a2sf bench` whose memory is measured.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from a2sf.bench import groups
from a2sf.bench.kernels import CALLS, FACTOR, RATIO, SHAPES, segments_of, tensors
from a2sf.bench.measuring import Figures, alternately
from a2sf.engine.kernels import attend
from a2sf.engine.kernels.registry import Numba
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, AttentionCall, EvictionState, Options
from a2sf.hf.loading import load
from a2sf.policies.a2sf import A2SF
from a2sf.scoring.lm import PrunedLM

CACHED = {"decode_16k": 16384, "decode_1638": 1638, "decode_256": 256}
"""Cached tokens while decoding: all of 16,384, a tenth of them, and few."""
STEPS = 64
"""Tokens of a measurement of decoding; the readable form makes room once in as many."""
DOCUMENTS = 20
SAME = 1e-4
"""A larger difference of an output is not rounding: other tokens are cached."""
TARGETS = {f"scan_over_kernel_{name}": "replaces it at ≤ 1.25" for name in (*SHAPES, *CACHED)}
TARGETS["sweep_with_scan_over_kernel"] = "replaces it at ≤ 1.03"


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the time of the readable form over that of the kernel."""
    from a2sf.bench.scan.columns import attend_in_chunks

    policy = A2SF(forgetting_factor=FACTOR)
    for name, (rows, heads, kv_heads, length) in SHAPES.items():
        q, k, v = tensors(rows, heads, kv_heads, length)
        given = (q, k, v, segments_of(q, int(RATIO * length), policy), Options(scale=q.shape[-1] ** -0.5))
        kernel, scan = (functools.partial(f, *given) for f in (attend, attend_in_chunks))
        _add(figures, name, alternately(CALLS[name], kernel=kernel, scan=scan)[0])
    for name, cached in CACHED.items():
        _add(figures, name, decoding(cached, options.repeats))
    figures.save()
    lm = PrunedLM(load(figures.model).model)
    found = in_a_sweep(lm, DOCUMENTS)
    with_scan = found["sweep"] - found["kernel"] + found["scan"]
    figures.ratios["sweep_with_scan_over_kernel"] = with_scan / found["sweep"]
    figures.details["scan_in_a_sweep"] = found


def _add(figures: Figures, name: str, seconds: dict[str, float]) -> None:
    figures.ratios[f"scan_over_kernel_{name}"] = seconds["scan"] / seconds["kernel"]
    figures.details[f"milliseconds_scan_{name}"] = {n: 1000 * s for n, s in seconds.items()}


def decoding(cached: int, repeats: int) -> dict[str, float]:
    """Seconds of the kernel and of the readable form for `STEPS` tokens, one by one, in one layer with `cached` tokens."""
    from a2sf.bench.scan.columns import Columns
    from a2sf.engine.kernels.cpu import SlotCache

    retention = BatchRetention.of([A2SF(forgetting_factor=FACTOR).keeps(cached)])
    _, keys, values = tensors(1, 9, 3, cached)
    start = EvictionState(
        positions=torch.arange(cached).expand(1, 3, cached),
        scores=torch.rand(1, 3, cached),
        keys=keys,
        values=values,
        seen=torch.tensor([cached]),
    )
    slots = SlotCache(1, 3, 3, cached, 64, 64)
    slots.load(start, FACTOR)
    columns = Columns(retention, start, cached + STEPS, 64**-0.5)
    q, k, v = tensors(1, 9, 3, STEPS)

    def read(one: Any) -> Tensor:
        return torch.cat([one(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(STEPS)], 2)

    kernel = functools.partial(read, functools.partial(slots.attend, retention=retention))
    return alternately(repeats, kernel=kernel, scan=functools.partial(read, columns.read))[0]


def in_a_sweep(lm: PrunedLM, documents: int) -> dict[str, float]:
    """Both do each call of the cells of `demo`, in turns which is first; the cells go on with what the kernel gives.

    Returns:
        Seconds of the `kernel`'s calls, of the same by the readable `scan`, and of the `sweep` with the kernel alone;
        `tokens` that were read, counted in each layer, and at how many of them the `other` form has another output;
        seconds of `comparing` these.
    """
    from a2sf.bench.scan.columns import attend_in_chunks

    spent = {"kernel": 0.0, "scan": 0.0, "comparing": 0.0, "tokens": 0.0, "other": 0.0}
    by_kernel, turn = Numba.attend, [False]

    def both(self: Numba, call: AttentionCall) -> Attended:
        calls: dict[str, Callable[[], Attended]] = {
            "kernel": functools.partial(by_kernel, self, call),
            "scan": functools.partial(attend_in_chunks, *call),
        }
        turn[0] = not turn[0]
        done = {}
        for name in sorted(calls, reverse=turn[0]):
            begun = time.perf_counter()
            done[name] = calls[name]()
            spent[name] += time.perf_counter() - begun
        begun = time.perf_counter()
        spent["tokens"] += int(call.segments.length.sum())
        differs = (done["kernel"].output - done["scan"].output).abs().amax((1, 3)) > SAME
        spent["other"] += int(differs.sum())
        spent["comparing"] += time.perf_counter() - begun
        return done["kernel"]

    with patch.object(Numba, "attend", both):
        groups.run(lm, groups.demo(), groups.DEMO[:1], documents=2)  # warm
        spent.update(dict.fromkeys(spent, 0.0))
        begun = time.perf_counter()
        groups.run(lm, groups.demo(), groups.DEMO, documents=documents)
        seconds = time.perf_counter() - begun
    return spent | {"sweep": seconds - spent["scan"] - spent["comparing"]}
