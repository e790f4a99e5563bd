"""Trained gates in the format of KVzap's models: from a layer's hidden states, a score for each token and key/value head.

Facts of the format, from kvpress 0.5.5 (`KVzapModel`): a folder or repository holds config.json (`model_type` kvzap,
`n_modules`, `input_dim`, `output_dim`, `hidden_dim` or null) and the weights. A layer i is linear (`layers.i.weight` and
`.bias`), or two linear layers with an exact GELU between them (`layers.i.0.*`, `layers.i.2.*`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from a2sf.disk_cache import digest
from a2sf.errors import ConfigError, first_line

if TYPE_CHECKING:  # so that commands which only list policies load neither torch nor the hub's library
    from torch import Tensor

    from a2sf.hub.snapshot import Snapshot

KEY = "policy.gates"
ALLOWED = "give a folder or file of KVzap gates, a hub id (owner/name), or random"
CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pt", ".bin")
SIZES = ("n_modules", "output_dim", "input_dim", "hidden_dim")
"""The entries of config.json, in the order of `GateSizes`."""


@dataclass(frozen=True)
class GateSizes:
    """Of gates: layers and key/value heads of the model, numbers of its hidden states, and of the gate's own inner layer.

    `inner` is None for linear gates.
    """

    layers: int
    heads: int
    hidden: int
    inner: int | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of each tensor."""
        parts = {"": (self.heads, self.hidden)}
        if self.inner is not None:
            parts = {"0.": (self.inner, self.hidden), "2.": (self.heads, self.inner)}
        each = [(f"layers.{i}.{part}", shape) for i in range(self.layers) for part, shape in parts.items()]
        return {f"{p}weight": shape for p, shape in each} | {f"{p}bias": shape[:1] for p, shape in each}


@dataclass(frozen=True)
class Gates:
    """Gates whose files are known, but not read yet.

    Attributes:
        name: the hub id, or the name of the folder or file.
        sizes: for what model they are.
        file: the weights' file; of the hub its name in the repository.
        digest: of the file's content; "" of the hub, where the commit stands for it.
        snapshot: the repository at its commit; None for files on the disk.
    """

    name: str
    sizes: GateSizes
    file: str
    digest: str = ""
    snapshot: Snapshot | None = None

    @property
    def revision(self) -> str:
        """The commit; "" for files on the disk."""
        return "" if self.snapshot is None else self.snapshot.wanted.revision

    @property
    def identity(self) -> dict[str, str]:
        """What identifies the content: the commit of a repository, or the file's digest wherever the file is."""
        return {"name": self.name, "commit": self.revision} if self.revision else {"digest": self.digest}

    def fetch(self) -> Path:
        """The weights' file, which is downloaded if it is on the hub.

        Raises:
            ConfigError: if the hub does not give it.
        """
        return Path(self.file) if self.snapshot is None else self.snapshot.get([self.file]) / self.file

    def scores(self, layer: int, hidden: Tensor) -> Tensor:
        """The scores [K, T] of tokens with hidden states [T, hidden], in their dtype.

        Raises:
            ConfigError: if the weights cannot be read, or differ from what was found before.
        """
        from torch.nn.functional import gelu, linear

        tensors = _read(self)

        def apply(x: Tensor, part: str) -> Tensor:
            name = f"layers.{layer}.{part}"
            return linear(x, tensors[f"{name}weight"].to(x), tensors[f"{name}bias"].to(x))

        linear_only = self.sizes.inner is None
        return (apply(hidden, "") if linear_only else apply(gelu(apply(hidden, "0.")), "2.")).T


def find_gates(given: str, revision: str) -> Gates:
    """The gates that a setting names. Of their files only what shows their sizes is read.

    Args:
        given: a folder, a file (`SUFFIXES`), or `owner/name` on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        ConfigError: if there are none, they are of another format, or there is no such repository or revision.
    """
    place = Path(os.path.expanduser(given))
    if place.is_dir():
        file = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
        if file is None:
            raise ConfigError(KEY, given, f"{ALLOWED}; this folder has no {' or '.join(WEIGHTS)}")
    elif place.is_file():
        if place.suffix not in SUFFIXES:
            raise ConfigError(KEY, given, f"{ALLOWED}; a file's name ends with {', '.join(SUFFIXES)}")
        file = place
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not given.startswith(".") and not given.endswith(SUFFIXES):
        return _on_hub(given, revision)
    else:
        raise ConfigError(KEY, given, f"{ALLOWED}; there is no such folder or file")
    if revision != "main":
        raise ConfigError("policy.revision", revision, f"{given} is on the disk, and has no revisions; leave it out")
    try:
        found = _digest(file)
        shapes = _shapes(file)
    except Exception as error:  # a file of any content; what torch says of it is long, and advises to run its code
        raise ConfigError(KEY, given, f"{file} cannot be read as named tensors ({type(error).__name__})") from error
    return Gates(place.resolve().name, _sizes(shapes, given), str(file), found)


@lru_cache
def _on_hub(repo: str, revision: str) -> Gates:
    """Looked up once, so that all cells of a sweep have the same commit."""
    from a2sf.hub.refusals import Wanted
    from a2sf.hub.snapshot import snapshot

    found = snapshot(Wanted(repo, revision=revision, key=KEY, revision_key="policy.revision"))
    file = next((name for name in WEIGHTS if name in found.sizes), None)
    if file is None or CONFIG not in found.sizes:
        lacks = CONFIG if file else " or ".join(WEIGHTS)
        raise found.refused or ConfigError(KEY, repo, f"it holds no KVzap gates: it lacks {lacks}")
    try:
        config = json.loads((found.get([CONFIG]) / CONFIG).read_text(encoding="utf-8"))
        if config["model_type"] != "kvzap":
            raise ConfigError(KEY, repo, f"it is a model of type {config['model_type']}, not kvzap; {ALLOWED}")
        sizes = [config.get(key) for key in SIZES]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(KEY, repo, f"its {CONFIG} is not that of KVzap gates ({first_line(error)})") from error
    if not all(isinstance(n, int) and n > 0 for n in (sizes if sizes[3] is not None else sizes[:3])):
        raise ConfigError(KEY, repo, f"its {CONFIG} does not state {', '.join(SIZES)} as whole numbers")
    return Gates(repo, GateSizes(*sizes), file, snapshot=found)


def _sizes(shapes: Mapping[str, tuple[int, ...]], given: str) -> GateSizes:
    """What gates with tensors of these shapes are for.

    Raises:
        ConfigError: if these are not the tensors of gates.
    """
    layers = len({m[1] for name in shapes if (m := re.match(r"layers\.(\d+)\.", name))})
    with suppress(KeyError, ValueError):
        if "layers.0.weight" in shapes:
            heads, hidden = shapes["layers.0.weight"]
            found = GateSizes(layers, heads, hidden)
        else:
            (inner, hidden), (heads, _) = shapes["layers.0.0.weight"], shapes["layers.0.2.weight"]
            found = GateSizes(layers, heads, hidden, inner)
        if found.shapes == shapes:
            return found
    form = "layers.N.weight and .bias of one shape, or layers.N.0 and layers.N.2"
    raise ConfigError(KEY, given, f"{ALLOWED}; this has other tensors than KVzap gates ({form})")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a file; of safetensors only the header is read."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return {name: tuple(x.shape) for name, x in _tensors(file).items()}


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not all(isinstance(x, torch.Tensor) for x in found.values()):
        raise ValueError("it holds something else than named tensors")
    return dict(found)


def _digest(file: Path) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a file's content."""
    return digest(file)[:16]


@lru_cache(maxsize=2)
def _read(gates: Gates) -> dict[str, Tensor]:
    """The tensors of gates.

    Raises:
        ConfigError: if they cannot be read, are not finite, or changed since they were found.
    """
    file = gates.fetch()
    try:
        changed = gates.snapshot is None and _digest(file) != gates.digest
        tensors = _tensors(file)
        finite = all(bool(x.isfinite().all()) for x in tensors.values())
    except Exception as error:
        raise ConfigError(
            KEY, gates.name, f"{file} cannot be read as named tensors ({type(error).__name__})"
        ) from error
    if changed or {name: tuple(x.shape) for name, x in tensors.items()} != gates.sizes.shapes:
        why = (
            "it changed after it was first read; start again"
            if changed
            else f"its weights are not those of its {CONFIG}"
        )
        raise ConfigError(KEY, gates.name, why)
    if not finite:
        raise ConfigError(KEY, gates.name, "some of its weights are not finite")
    return tensors
