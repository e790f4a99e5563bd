"""The first ten minutes on a GPU: is the compiled eviction right, is it the same in every batch, and how long does it take?

    python scripts/gpu.py          # on a machine with a GPU
    TRITON_INTERPRET=1 python scripts/gpu.py --tiny   # the script itself, anywhere, in a minute

Prints one line for each check and each measurement; copy them to docs/gpu.md with the card's name. The exit status is 1 if a
check failed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from a2sf.engine.eviction import Attended, Options, Segments, reference
from a2sf.engine.kernels.gpu import driver, launch
from a2sf.engine.kernels.gpu.run import attend_triton
from a2sf.engine.retention import BatchRetention
from a2sf.policies.base import Retention
from a2sf.policies.rule import Rule
from a2sf.policies.schedule import STEP, Schedule

# rows, tokens, query heads, KV heads, head size, budget; and what a layer may cost over SDPA
CHECKED = [(4, 100, 9, 3, 64, 20), (2, 300, 8, 2, 128, 40), (2, 700, 9, 3, 64, 140), (1, 1500, 8, 2, 128, 300)]
TIMED = {
    (160, 100, 9, 3, 64, 20): 3,
    (64, 200, 32, 8, 128, 40): 3,
    (16, 1024, 9, 3, 64, 204): 8,
    (1, 4096, 32, 8, 128, 819): 8,
}
RULES = {
    "A": Rule(),
    "b + m A / N, shared": Rule(
        mean_over_age=True,
        shared=True,
        weight=lambda keys, values, positions: values.abs().sum(-1),
        bias=lambda keys, values, positions: keys[..., 0],
    ),
    "nothing scored": Rule(scored=False),
}
SECONDS = 9 * 60


def made(case: tuple[int, ...], device: str, dtype: torch.dtype, rule: Rule = RULES["A"], schedule: Schedule = STEP):
    """Inputs as a model gives them, all rows packed in one."""
    rows, T, H, K, D, budget = case
    random = torch.Generator().manual_seed(0)
    tensors = (torch.randn(1, rows * T, h, D, generator=random).to(device, dtype).transpose(1, 2) for h in (H, K, K))
    kept = [
        Retention(budget=budget, recent=budget // 4, sinks=1, forgetting_factor=0.9, rule=rule) for _ in range(rows)
    ]
    first, none = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    segments = Segments(
        **BatchRetention.of(kept, schedule).retention(), row=none, start=first * T, length=none + T, parent=none - 1
    )
    return (*tensors, segments)


def check(case: tuple[int, ...], device: str, dtype: torch.dtype, rule: str, schedule: Schedule) -> bool:
    """Against the reference in float64, and each row alone against itself in the batch."""
    q, k, v, segments = made(case, device, dtype, RULES[rule], schedule)
    options = Options(q.shape[-1] ** -0.5, return_state=True)
    got = attend_triton(q, k, v, segments, options)
    want = reference(q.double(), k.double(), v.double(), segments, options)
    assert got.state is not None
    assert want.state is not None
    pairs = list(
        zip(got.state.positions.flatten(0, 1).tolist(), want.state.positions.flatten(0, 1).tolist(), strict=True)
    )
    same = sum(sorted(a) == sorted(b) for a, b in pairs)
    error = (got.output.double() - want.output).abs().median().item()
    alone = attend_triton(q, k, v, segments.select(torch.tensor([0])), options)
    T = case[1]
    equal = alone.output[:, :, :T].equal(got.output[:, :, :T])
    fine = equal and same >= 0.9 * len(pairs) and error < (2e-2 if dtype == torch.bfloat16 else 1e-4)
    print(
        f"{'ok   ' if fine else 'WRONG'} {case} {dtype} {rule}, {schedule.name}: kept sets equal {same} of {len(pairs)} "
        f"(near ties may differ), median error {error:.0e}, a row alone equal to the bit: {equal}",
        flush=True,
    )
    return fine


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Median of five, after one that compiles."""
    times = []
    for _ in range(6):
        wait(device)
        begin = time.perf_counter()
        run()
        wait(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(case: tuple[int, ...], most: float, device: str, dtype: torch.dtype) -> None:
    """One layer's attention beside SDPA's, and its launches by themselves."""
    q, k, v, segments = made(case, device, dtype)
    rows, T, H, K = case[:4]
    options = Options(q.shape[-1] ** -0.5)
    ours = milliseconds(lambda: attend_triton(q, k, v, segments, options), device)
    split = [x.unflatten(2, (rows, T))[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    full = milliseconds(lambda: sdpa(*split, gqa=H > K), device)
    parts = launches(lambda: attend_triton(q, k, v, segments, options), device)
    print(
        f"{case} {dtype}: {ours:.3f} ms, SDPA {full:.3f}, ratio {ours / full:.1f} (wanted {most}); {parts}", flush=True
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


def launches(run: Callable[[], Attended], device: str) -> str:
    """Milliseconds of each kind of launch, and how many there are, waiting after each."""
    found: dict[str, list[float]] = {}

    def timed(name: str) -> Callable[..., object]:
        method = getattr(launch.Launches, name)

        def inside(*args: object, **how: object) -> object:
            wait(device)
            begin = time.perf_counter()
            result = method(*args, **how)
            wait(device)
            found.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
            return result

        return inside

    names = ("shares", "scan", "attend", "keep", "received")
    before = {name: getattr(launch.Launches, name) for name in names}
    try:
        for name in names:
            setattr(launch.Launches, name, timed(name))
        run()
    finally:
        for name, method in before.items():
            setattr(launch.Launches, name, method)
    return ", ".join(f"{name} {sum(times):.3f} in {len(times)}" for name, times in found.items())


def prompts(tokens: int, device: str, dtype: torch.dtype) -> None:
    """A prompt without eviction: as SnapKV's, without scores, and as H2O's, with column sums."""
    case = (1, tokens, 32 if tokens > 100 else 4, 8 if tokens > 100 else 2, 128 if tokens > 100 else 16, tokens)
    for name, rule in (("SnapKV's prompt", Rule(scored=False)), ("H2O's prompt", Rule())):
        q, k, v, segments = made(case, device, dtype, rule)
        options = Options(q.shape[-1] ** -0.5, return_state=True)
        ours = milliseconds(lambda s=segments, o=options, x=(q, k, v): attend_triton(*x, s, o), device)
        full = milliseconds(lambda x=(q, k, v): sdpa(*x, gqa=True), device)
        print(f"{name}, {tokens} tokens, {dtype}: {ours:.3f} ms, SDPA {full:.3f}, ratio {ours / full:.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few tokens, on the CPU, in Triton's interpreter")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        print("this machine has no GPU; TRITON_INTERPRET=1 python scripts/gpu.py --tiny runs the script without one")
        return 2
    device, end = "cpu" if tiny else "cuda", time.monotonic() + SECONDS
    print(f"{'interpreter' if tiny else torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    fine = True
    checked = [(2, 20, 6, 2, 16, 6)] if tiny else CHECKED
    cases = [(case, torch.bfloat16, "A", STEP) for case in checked]
    cases += [(checked[0], torch.float32, rule, s) for rule in RULES for s in (STEP, Schedule("every", every=4))]
    for case, dtype, rule, schedule in cases[: 2 if tiny else None]:
        fine &= check(case, device, dtype, rule, schedule)
    for case, most in ({(2, 12, 6, 2, 16, 6): 3} if tiny else TIMED).items():
        if time.monotonic() < end:
            measure(case, most, device, torch.bfloat16)
    if time.monotonic() < end:
        prompts(driver.LONG // 64 if tiny else 16 * driver.LONG, device, torch.bfloat16)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
