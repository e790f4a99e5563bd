"""`a2sf doctor`: what it finds wrong, and that it shows no secret."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version

import pytest

import a2sf
from a2sf.commands import doctor
from a2sf.errors import Notice
from a2sf.hf.loading import ModelSpec, local_checkpoint
from tests.conftest import SMOLLM2


def test_a_healthy_machine(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_very-secret")
    monkeypatch.setenv("WANDB_MODE", "offline")
    doctor.main([])
    said = capsys.readouterr().out
    assert "secret" not in said
    assert "there is one for api.wandb.ai" in said
    assert f"{'torch':<18} {version('torch')}" in said
    assert f"{'WANDB_MODE':<18} offline" in said
    assert f"{'numba on cpu':<18} works" in said


def test_converted_models_are_looked_for_where_they_are_put(monkeypatch):
    small = SMOLLM2.removeprefix("pkg://").rpartition("/")[2].removesuffix(".gguf")
    folder = local_checkpoint(ModelSpec(SMOLLM2))
    assert folder.name.startswith(small)
    assert folder.name in doctor._caches([])["converted"]
    monkeypatch.setenv("A2SF_CACHE", str(folder))
    assert doctor._caches([])["converted"] == f"none ({folder})"


def test_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "nothing-at-all>=1", "pytest; extra == 'dev'"])
    monkeypatch.setattr(doctor, "_tried", lambda device, backend: (backend != "auto", "WRONG by 1"))
    with pytest.raises(SystemExit, match="1"):
        doctor.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [
        f"torch {version('torch')} is not >=99, which a2sf needs.",
        "nothing-at-all is not installed; pip install 'nothing-at-all>=1'.",
        "no kernel runs on cpu: WRONG by 1.",
    ]
    assert "pytest" not in found["versions"]


def test_a_kernel_that_computes_something_else(monkeypatch):
    """Trying is comparing: a kernel that runs and is wrong does not work."""
    real = __import__("a2sf").evicting_attention

    def off(*tensors, backend, **more):
        output, state = real(*tensors, backend=backend, **more)
        return (output + 0.1, state) if backend == "numba" else (output, state)

    monkeypatch.setattr("a2sf.engine.functional.evicting_attention", off)
    assert doctor._tried("cpu", "reference")[0]
    works, message = doctor._tried("cpu", "numba")
    assert not works
    assert message.startswith("WRONG by 0.1")


def test_a_kernel_that_another_stands_in_for(monkeypatch):
    right = a2sf.evicting_attention

    def stands_in(*args, **more):
        warnings.warn("The Triton kernel fails its self-check.\nAnd so on", Notice, stacklevel=2)
        return right(*args, **more)

    monkeypatch.setattr(a2sf, "evicting_attention", stands_in)
    assert doctor._tried("cpu", "auto") == (False, "not here: The Triton kernel fails its self-check")
