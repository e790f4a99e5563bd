"""Which GPU each worker of a launcher computes on, and with how many threads.

Slurm and Ray give a job GPUs of its own and hide the others; joblib's workers see all of them, and each takes one.
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


def asked_gpus(launcher: Any) -> tuple[str, bool] | None:
    """The key by which a launcher's jobs get GPUs of their own, and whether it is set; None: they see this machine's.

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


def settle_device(launcher: Any, composed: DictConfig) -> None:
    """Say in a composed configuration what `model.device` is for a launcher's jobs, whatever this machine has.

    A cell's name depends on it, so that a job must not find out by itself.

    Raises:
        ConfigError: if the jobs get no GPU and are to use one, or the jobs' only GPU is given another number.
    """
    asked = asked_gpus(launcher)
    if asked is None:
        return
    (key, given), device = asked, str(composed.model.device)
    if device == "auto":
        if not given and torch.cuda.is_available():
            why = "this machine has a GPU and its workers would have none; give 1, or model.device=cpu"
            raise ConfigError(key, "null", why)
        composed.model.device = "cuda" if given else "cpu"
    elif device.startswith("cuda:"):
        raise ConfigError("model.device", device, "a worker sees only the GPU that it is given; give cuda")
    elif device == "cuda" and not given:
        raise ConfigError(key, "null", "model.device=cuda needs a GPU for each worker; give 1")


def take_gpu(launcher: Mapping[str, Any]) -> None:
    """Let a worker process of joblib's have a GPU as its current one, which `cuda` means: the first that is free.

    More workers than GPUs share them evenly. It is taken until the process ends, by a lock that ends with it.
    """
    there = torch.cuda.device_count()
    if there < 2 or _held or not launcher.get("n_jobs"):
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
    torch.cuda.set_device(slot % there)


def share_cores(launcher: Any) -> None:
    """Let workers side by side on one machine share its cores instead of each taking all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = launcher.get("n_jobs") or 1
    per_worker = cores // (cores if workers < 0 else workers)  # joblib
    per_worker = launcher.get("cpus_per_task") or per_worker  # submitit
    per_worker = OmegaConf.select(launcher, "ray.remote.num_cpus") or per_worker  # ray
    if per_worker < cores:
        torch.set_num_threads(max(1, int(per_worker)))
