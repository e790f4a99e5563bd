"""Which GPU a launcher's worker uses, and how many threads.

Slurm and Ray assign GPUs to a job and hide the others. joblib's workers see all GPUs, so each of them locks one.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from a2sf.errors import ConfigError

_held: list[FileLock] = []


def gpu_request(launcher: Any) -> tuple[str, bool] | None:
    """The key that requests GPUs for each job of a launcher, and whether it is set; None: jobs use this machine's GPUs.

    Args:
        launcher: the configuration `hydra.launcher`.
    """
    target = str(launcher.get("_target_"))
    if "ray" in target:
        return "hydra.launcher.ray.remote.num_gpus", bool(OmegaConf.select(launcher, "ray.remote.num_gpus"))
    if "submitit" in target:
        given = [launcher.get("gpus_per_node"), launcher.get("gpus_per_task"), "gpu" in str(launcher.get("gres"))]
        return "hydra.launcher.gpus_per_node", any(given)
    return None


def choose_device(launcher: Any, composed: DictConfig) -> None:
    """Replace `model.device=auto` in a composed configuration by the device that a launcher's jobs will have.

    A cell's name depends on the device, so that it must be known before the jobs start.

    Raises:
        ConfigError: if the jobs get no GPU and are to use one, or if the device is a GPU's number, which jobs do not see.
    """
    request = gpu_request(launcher)
    if request is None:
        return
    (key, given), device = request, str(composed.model.device)
    if device == "auto":
        if not given and torch.cuda.is_available():
            why = "this machine has a GPU, but its workers would not; give 1, or model.device=cpu"
            raise ConfigError(key, "null", why)
        composed.model.device = "cuda" if given else "cpu"
    elif device.startswith("cuda:"):
        raise ConfigError("model.device", device, "a worker sees only the GPU that it is assigned; give cuda")
    elif device == "cuda" and not given:
        raise ConfigError(key, "null", "model.device=cuda needs a GPU for each worker; give 1")


def take_gpu(launcher: Mapping[str, Any]) -> None:
    """Make the first free GPU the current one (`cuda`) of a joblib worker.

    A file lock holds the GPU until the process ends. If there are more workers than GPUs, they share them evenly.
    """
    gpus = torch.cuda.device_count()
    if gpus < 2 or _held or not launcher.get("n_jobs"):
        return
    among = hashlib.sha256(os.environ.get("CUDA_VISIBLE_DEVICES", "").encode()).hexdigest()[:8]
    folder = Path(tempfile.gettempdir()) / f"a2sf-gpus-{getpass.getuser()}-{among}"
    folder.mkdir(exist_ok=True)
    slot = 0
    while not _held:
        lock = FileLock(folder / f"{slot}.lock", timeout=0)
        try:
            lock.acquire()
            _held.append(lock)
        except Timeout:
            slot += 1
    torch.cuda.set_device(slot % gpus)


def share_cores(launcher: Any) -> None:
    """Divide the cores of a machine among the workers that run on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = launcher.get("n_jobs") or 1
    per_worker = cores // (cores if workers < 0 else workers)  # joblib
    per_worker = launcher.get("cpus_per_task") or per_worker  # submitit
    per_worker = OmegaConf.select(launcher, "ray.remote.num_cpus") or per_worker  # ray
    if per_worker < cores:
        torch.set_num_threads(max(1, int(per_worker)))
