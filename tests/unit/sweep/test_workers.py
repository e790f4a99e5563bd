"""Each worker computes on the GPU that is its own, and a cell's name does not depend on where the sweep was started."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from a2sf.errors import ConfigError
from a2sf.sweep import workers

BASIC = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
JOBLIB = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "n_jobs": 3}
SLURM = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"}
LOCAL = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"}
RAY = {"_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"}
GPUS_OF_RAY = {"ray": {"remote": {"num_gpus": 0.5}}}


def chosen_device(launcher: dict, device: str, *, gpus: int, monkeypatch) -> str:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    composed = OmegaConf.create({"model": {"device": device}})
    workers.choose_device(OmegaConf.create(launcher), composed)
    return composed.model.device


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize(
    ("launcher", "device", "becomes"),
    [
        (BASIC, "auto", "auto"),
        (BASIC, "cuda:1", "cuda:1"),
        (JOBLIB, "auto", "auto"),
        (SLURM | {"gpus_per_node": 1}, "auto", "cuda"),
        (SLURM | {"gres": "gpu:a100:1"}, "auto", "cuda"),
        (SLURM | {"gpus_per_node": 1}, "cpu", "cpu"),
        (LOCAL | {"gpus_per_node": 1}, "cuda", "cuda"),
        (RAY | GPUS_OF_RAY, "auto", "cuda"),
        (RAY, "cpu", "cpu"),
    ],
    ids=str,
)
def test_what_a_device_is_to_a_job(launcher, device, becomes, gpus, monkeypatch):
    """Also where the machine that starts the sweep has no GPU, as a cluster's login node."""
    assert chosen_device(launcher, device, gpus=gpus, monkeypatch=monkeypatch) == becomes


def test_jobs_without_a_gpu_are_reported_before_they_start(monkeypatch):
    assert chosen_device(RAY, "auto", gpus=0, monkeypatch=monkeypatch) == "cpu"
    with pytest.raises(
        ConfigError, match=r"hydra\.launcher\.ray\.remote\.num_gpus=null .*give 1, or model\.device=cpu"
    ):
        chosen_device(RAY, "auto", gpus=1, monkeypatch=monkeypatch)
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.gpus_per_node=null .*needs a GPU for each worker"):
        chosen_device(LOCAL, "cuda", gpus=0, monkeypatch=monkeypatch)
    with pytest.raises(ConfigError, match=r"model\.device=cuda:1 .*give cuda"):
        chosen_device(SLURM | {"gpus_per_node": 1}, "cuda:1", gpus=2, monkeypatch=monkeypatch)


def test_workers_of_one_machine_take_its_gpus_in_turn(monkeypatch, tmp_path):
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    processes = []  # what each would hold
    for _ in range(3):
        monkeypatch.setattr(workers, "_held", [])
        workers.take_gpu(JOBLIB)
        workers.take_gpu(JOBLIB)  # its next job
        processes.append(workers._held)
    assert taken == [0, 1, 0]
    processes[1][0].release()  # it ends, and another starts
    monkeypatch.setattr(workers, "_held", [])
    workers.take_gpu(JOBLIB)
    assert taken == [0, 1, 0, 1]
    for launcher in (BASIC, SLURM | {"gpus_per_node": 2}, RAY):  # who have theirs by now, as `cuda`
        monkeypatch.setattr(workers, "_held", [])
        workers.take_gpu(launcher)
    assert len(taken) == 4
