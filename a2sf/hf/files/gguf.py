"""GGUF files: dequantized once into a plain checkpoint, under the cache directory."""

from __future__ import annotations

import shutil
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoTokenizer, GgufConfig

from a2sf.errors import ConfigError, first_line
from a2sf.hf.files import weights
from a2sf.hf.files.cache import cache_directory, digest
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
    """
    target = checkpoint_of(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                model, told = weights.from_pretrained(
                    file.parent,
                    gguf_file=file.name,
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                )
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            except Exception as error:
                why = f"the GGUF file cannot be read ({type(error).__name__}: {first_line(error)})"
                raise ConfigError(KEY, path, why) from error
            weights.check_complete(model, told, path)
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            try:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def config_of(file: Path) -> Any:
    """transformers' config of a GGUF file."""
    stat = file.stat()
    return _config(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _config(file: Path, size: int, changed: int) -> Any:
    """Of a file as it is: its vocabulary is read with it, which takes seconds, and a grid asks for each of its cells."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
