"""The benchmarks compare equal work, and keep what they measured."""

from __future__ import annotations

import pytest
import torch

from a2sf import evicting_attention
from a2sf.bench import kernels
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
        kernels, "measure", lambda figures, repeats: figures.ratios.update(loop_over_kernel_T100=float(repeats))
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
    parts = (kernels.TARGETS, bench.harness.TARGETS, bench.groups.TARGETS, bench.decode.TARGETS, bench.prompt.TARGETS)
    assert len(bench.TARGETS) == sum(map(len, parts))


def test_a_gpus_figures_are_not_mixed_with_a_cpus(tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    file.write_text('{"ratios": {"loop_over_kernel_T100": 3.0}, "device": "NVIDIA H100"}')
    monkeypatch.setattr(kernels, "measure", lambda figures, repeats: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=r"--out=.* was measured on NVIDIA H100, and this is a CPU"):
        bench.main(["--only", "kernel", "--out", str(file)])
    with pytest.raises(ConfigError, match=r"model\.device=cuda:9"):
        bench.main(["--only", "kernel", "--device", "cuda:9"])
