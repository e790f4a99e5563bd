"""GGUF files: dequantized once into a plain checkpoint, under the cache directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoTokenizer, GgufConfig

from a2sf import atomic
from a2sf.compat.transformers import refused
from a2sf.disk_cache import cache_directory, digest, stamp
from a2sf.errors import UserError, first_line
from a2sf.hf.files import weights
from a2sf.hf.files.paths import KEY


def checkpoints() -> Path:
    """Where converted checkpoints are, each a directory."""
    return cache_directory() / "checkpoints"


def checkpoint_of(file: Path) -> Path:
    """Where the checkpoint of a GGUF file is, or will be."""
    return checkpoints() / f"{file.stem}-{digest(file)[:12]}"


def converted(file: Path, path: str) -> Path:
    """The checkpoint of a GGUF file, made where there is none yet.

    Args:
        path: what the user called the model.

    Raises:
        ConfigError: if the file cannot be read, or lacks weights.
        UserError: if the cache directory cannot be written.
    """
    target = checkpoint_of(file)
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(target):
                if not target.is_dir():
                    _convert(file, path, target)
        except OSError as error:
            raise UserError(
                f"{target.parent} cannot be written ({error.strerror or first_line(error)}), where the converted model of "
                f"{path} is to be stored; set A2SF_CACHE to a directory that can be written."
            ) from error
    return target


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """Wait for another process that makes `target`; where its lock is not ours to take, both make it."""
    lock = FileLock(f"{target}.lock")
    with ExitStack() as held:
        with suppress(PermissionError):  # another user's file: what is made appears whole, whoever is first
            held.enter_context(lock)
        yield


def _convert(file: Path, path: str, target: Path) -> None:
    with refused(KEY, path, "the GGUF file cannot be read"):
        model, report = weights.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    weights.check_complete(model, report, path)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with atomic.placed(target) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            atomic.open_as_new(temporary)  # safetensors' files are their owner's alone
    except OSError:
        if not target.is_dir():  # not because another process made it first
            raise


def config_of(file: Path) -> Any:
    """transformers' config of a GGUF file."""
    return _config(file, *stamp(file))


@lru_cache(maxsize=8)
def _config(file: Path, *stamp: int) -> Any:
    """Of a file as it is now: reading it takes seconds, because of the vocabulary, and each cell of a grid needs it."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
