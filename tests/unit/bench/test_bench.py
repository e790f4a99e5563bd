"""The benchmarks compare equal work, and keep what they measured."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import time

import pytest
import torch

from a2sf import evicting_attention
from a2sf.bench import kernels, policies, process
from a2sf.bench.measuring import Figures, alternately
from a2sf.commands import bench
from a2sf.errors import ConfigError


def test_the_per_token_loop_computes_what_the_kernel_does():
    q, k, v = kernels.tensors(2, 4, 4, 40)  # published code evicts by query head
    loop = kernels.per_token_loop(q, k, v, 9, 0.3)
    ours, _ = evicting_attention(q, k, v, budget=9, recent=0, forgetting_factor=0.3)
    torch.testing.assert_close(loop, ours, atol=1e-5, rtol=1e-4)


def test_things_are_timed_in_turns():
    order: list[str] = []
    seconds, results = alternately(2, a=lambda: order.append("a") or 1, b=lambda: order.append("b") or 2)
    assert order == ["a", "b"] * 3  # once to warm up
    assert results == {"a": 1, "b": 2}
    assert all(s >= 0 for s in seconds.values())


def test_one_part_keeps_what_the_others_measured(tmp_path, monkeypatch, capsys):
    file = tmp_path / "new" / "bench.json"
    before = Figures(file, {"decode_speedup_4k_r20": 1.5}, {"decode": [1]})
    before.save()
    monkeypatch.setattr(
        kernels, "measure", lambda figures, options: figures.ratios.update(loop_over_kernel_T100=float(options.repeats))
    )
    bench.main(["--only", "kernel", "--repeats", "7", "--out", str(file)])
    after = Figures(file)
    after.read()
    assert after.ratios == {"decode_speedup_4k_r20": 1.5, "loop_over_kernel_T100": 7.0}
    assert after.details["decode"] == [1]
    said = capsys.readouterr().out
    assert "7.000" in said
    assert "≥ 12" in said


def test_every_target_is_named_once():
    assert len(bench.TARGETS) == sum(len(part.TARGETS) for part in bench.PARTS.values())


def test_a_gpus_figures_are_not_mixed_with_a_cpus(tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    file.write_text('{"ratios": {"loop_over_kernel_T100": 3.0}, "device": "NVIDIA H100"}')
    monkeypatch.setattr(kernels, "measure", lambda figures, options: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=r"--out=.* was measured on NVIDIA H100, and this is a CPU"):
        bench.main(["--only", "kernel", "--out", str(file)])
    with pytest.raises(ConfigError, match=r"model\.device=cuda:9"):
        bench.main(["--only", "kernel", "--device", "cuda:9"])


def test_processor_time_is_that_of_the_process_alone():
    """Not of the clock, nor of another process."""
    spent, seconds = process.spent("import time; time.sleep(0.5)")
    assert spent < seconds
    assert seconds >= 0.5
    with pytest.raises(subprocess.CalledProcessError):
        process.spent("raise SystemExit(3)")


def test_busy_processes_are_busy_and_end():
    with process.busy(2) as others:
        time.sleep(0.3)
        assert all(o.poll() is None for o in others)
    assert all(o.poll() is not None for o in others)


def test_start_up_and_a_busy_machine_are_compared_in_turns(tmp_path, monkeypatch):
    """Each thing is measured as often, and the ratios are of medians."""
    calls: list[tuple[str, str | None]] = []

    def spent(code, *arguments, **environment):
        what = "imports" if not arguments else "tiny" if any("model.path" in a for a in arguments) else "sweep"
        calls.append((what, environment.get("GOMP_SPINCOUNT")))
        beside = 1.2 if running else 1.0
        return {"imports": 4.0, "tiny": 5.0, "sweep": 10.0 * beside}[what], 10.0 if environment else 9.0

    running: list[int] = []

    @contextlib.contextmanager
    def busy(count):
        running.append(count)
        yield []
        running.clear()

    monkeypatch.setattr(process, "spent", spent)
    monkeypatch.setattr(process, "busy", busy)
    monkeypatch.setattr(process, "tiny_model", lambda folder: None)
    figures = Figures(tmp_path / "bench.json")
    process.measure(figures, argparse.Namespace(repeats=2))
    assert figures.ratios == pytest.approx(
        {"start_up_over_imports": 1.25, "processor_time_busy_over_alone": 1.2, "sweep_alone_over_spinning": 0.9}
    )
    assert sorted({c for c in calls if c[1]}) == [("sweep", process.SPINNING["GOMP_SPINCOUNT"])]


def test_every_policy_is_measured_under_its_schedules(tmp_path, monkeypatch):
    """Against A2SF step by step, and against the full cache after one cut."""
    cells = []
    monkeypatch.setattr(policies, "load", lambda model: argparse.Namespace(model=None, tokenizer=None))
    monkeypatch.setattr(policies, "PrunedLM", lambda *_, **__: None)
    monkeypatch.setattr(policies, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(policies, "_cell", lambda lm, *system: cells.append(system))
    figures = Figures(tmp_path / "bench.json")
    policies.measure(figures, argparse.Namespace(repeats=1))
    assert set(policies.TARGETS) <= set(figures.ratios)
    for policy in policies.measurable().values():
        step = "step" in policy.schedules and not policy.keeps(64).rule.calls
        assert {s.when for p, _, s in cells if p == policy} >= ({"step"} if step else set()) | {"prompt"} & {
            *policy.schedules
        }
    assert all(b is not None and b.base == ("context" if s.prompt else "total") for p, b, s in cells if p.evicts)
    assert "kvzip_prompt_cell_over_full" in figures.ratios  # measured without a target: it reads each prompt twice
    assert "kvzip_prompt_cell_over_full" not in policies.TARGETS
    assert {f"{p}_prompt_cell_over_full" for p in ("kvzap", "cake", "simlayerkv")} <= set(policies.TARGETS)
