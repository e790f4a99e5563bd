"""A model and its tokenizer, downloaded, loaded and checked."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from a2sf.disk_cache import cache_directory
from a2sf.errors import ConfigError
from a2sf.hf import devices
from a2sf.hf.exactness import check_exact
from a2sf.hf.files import adapter as adapters
from a2sf.hf.files import weights
from a2sf.hf.files.paths import KEY
from a2sf.hf.loading.checkpoint import files_of, fingerprint, folder_here, local_checkpoint, tokenizer_folder
from a2sf.hf.loading.config import check_config
from a2sf.hf.loading.spec import DTYPES, ModelSpec, pin
from a2sf.hf.loading.tokenizer import PROBE, read_tokenizer
from a2sf.hub import snapshot as hub


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be scored.

    Attributes:
        fingerprint: that of what was loaded.
        adapter: the same of the adapter; None: there is none.
        format: which kind of file the weights were read from: safetensors, bin or gguf.
    """

    model: PreTrainedModel
    tokenizer: Any
    fingerprint: str | None
    format: str = "safetensors"
    adapter: str | None = None


@dataclass(frozen=True)
class Download:
    """What of a model is not in the hub's cache yet."""

    spec: ModelSpec
    snapshot: hub.Snapshot
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes to come."""
        return sum(self.snapshot.sizes.get(n, 0) for n in self.names)

    def run(self, stop: threading.Event | None = None) -> None:
        """Fetch it, until `stop` is set; complete files are not fetched again.

        Raises:
            ConfigError: if the hub does not give it.
        """
        self.snapshot.get(self.names, stop)


def prepare(spec: ModelSpec) -> list[Download]:
    """Check a model and its adapter as far as possible without their weights; returns what is still to fetch.

    Raises:
        ConfigError: as `check_config`; or if files are missing or not whole.
    """
    found = [_prepare(spec)]
    if spec.added is not None:
        names = spec.added.names()
        if (snapshot := spec.added.snapshot) and (left := snapshot.missing(names)):
            found.append(Download(spec, snapshot, tuple(left)))
    return [d for d in found if d is not None]


def _prepare(spec: ModelSpec) -> Download | None:
    check_config(spec)
    source = spec.source
    if source.kind in ("package", "file"):
        return None
    files = files_of(spec)
    if source.file:
        names: tuple[str, ...] = (source.file,)
    else:
        found = weights.find_weights(files, spec.path)
        names = (*weights.find_texts(files, spec.path, spec.trust_remote_code), *found.all)
        if not isinstance(files, hub.Snapshot):
            weights.check_whole(Path(spec.path), found, spec.path)
    if isinstance(files, hub.Snapshot) and (left := files.missing(names)):
        return Download(spec, files, tuple(left))
    return None


def adapter_of(spec: ModelSpec) -> dict[str, Any]:
    """The entry `adapter` that identifies the adapter; no entry if there is none.

    The entry is None for a local model with an adapter beside it that is not used: results that were computed with the
    adapter are not to be taken for the model's own.
    """
    if (added := spec.added) is not None:
        return {"adapter": {"path": added.path, "weights": added.fingerprint()}}
    is_beside = spec.source.kind == "directory" and (Path(spec.path) / adapters.CONFIG).exists()
    return {"adapter": None} if is_beside else {}


def left_alone(spec: ModelSpec) -> str | None:
    """One sentence about an adapter that lies beside a model on this machine and is not used; None if there is none."""
    folder = Path(spec.source.path).parent if spec.source.kind == "file" else folder_here(spec)
    return None if spec.adapter or folder is None else adapters.beside(folder)


def load_tokenizer(spec: ModelSpec) -> Any:
    """A model's tokenizer, without the model.

    Raises:
        ConfigError: if it has none, or it cannot be loaded.
    """
    return _tokenizer(tokenizer_folder(spec), spec)


def tokenizer_here(spec: ModelSpec) -> Any | None:
    """A model's tokenizer where it can be read without a download, a question to the hub, or a conversion; else None.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    folder = folder_here(spec)
    return _tokenizer(folder, spec) if folder is not None and folder.is_dir() else None


def _tokenizer(folder: Path, spec: ModelSpec) -> Any:
    return read_tokenizer(folder, spec.path, trust_remote_code=spec.trust_remote_code, add_bos_token=spec.add_bos_token)


def load(spec: ModelSpec) -> LoadedModel:
    """Load a model and its tokenizer, and check that it has all its weights and that pruning it is exact.

    Raises:
        ConfigError, UnsupportedModel: if it cannot be loaded or pruned.
    """
    spec.check_here()
    spec, _ = pin(spec)
    check_config(spec)
    folder = local_checkpoint(spec)
    found = weights.find_weights(weights.Folder(folder), spec.path)
    tokenizer = _tokenizer(folder, spec)
    ids = tokenizer(PROBE)["input_ids"]
    if spec.device_map is None:
        model = _read(folder, found, spec, None).to(spec.resolved_device)  # type: ignore[arg-type]
    else:
        model = devices.spread(spec.device_map, cache_directory(), lambda placed: _read(folder, found, spec, placed))
    if not ids or max(ids) >= model.get_input_embeddings().num_embeddings:
        raise ConfigError(
            KEY, spec.path, "its tokenizer is not the model's: it gives tokens that the model does not know"
        )
    model.eval()
    if (added := spec.added) is not None:
        added.add_to(model)
    check_exact(model)
    is_gguf = spec.source.kind in ("package", "file") or bool(spec.source.file)
    of_adapter = None if added is None else added.fingerprint()
    return LoadedModel(model, tokenizer, fingerprint(spec), "gguf" if is_gguf else found.format, of_adapter)


def _read(folder: Path, found: weights.Weights, spec: ModelSpec, placement: dict[str, Any] | None) -> PreTrainedModel:
    dtype = DTYPES[spec.resolved_dtype]
    return weights.read(folder, found, dtype, spec.path, spec.trust_remote_code, placement)
