"""Loading a model and its tokenizer: a hub id, a local directory, or a GGUF file (on disk or inside an installed package).

A GGUF file is dequantized once into a plain checkpoint under the cache directory (`A2SF_CACHE`, default ~/.cache/a2sf).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from a2sf.errors import ConfigError
from a2sf.hf.exactness import check_exact

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
PACKAGE = "pkg://"
IDENTIFYING_FILES = {".safetensors", ".json", ".model", ".txt", ".py"}
"""Of a local directory: weights, config, tokenizer, modelling code."""
CAUSAL_ARCHITECTURES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class ModelSpec:
    """Which model to run and how.

    Attributes:
        path: hub id, local directory, local `.gguf` file, or `pkg://package/file.gguf` for one in an installed package.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU) or a name in `DTYPES`.
        device: auto (a GPU if there is one) or a torch device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run modelling code that comes with the weights.

    Raises:
        ConfigError: if a value is not allowed.
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"
    revision: str = "main"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError("model.dtype", self.dtype, f"give auto or one of {', '.join(DTYPES)}")
        if self.device != "auto":
            try:
                device = torch.device(self.device)
            except RuntimeError:
                raise ConfigError("model.device", self.device, "give auto, cpu, cuda or cuda:N") from None
            if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                raise ConfigError("model.device", self.device, "this machine has no such GPU; give auto or cpu")

    @property
    def resolved_device(self) -> str:
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    @property
    def resolved_dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "float32" if torch.device(self.resolved_device).type == "cpu" else "bfloat16"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be scored. `fingerprint` is that of what was loaded."""

    model: PreTrainedModel
    tokenizer: Any
    fingerprint: str | None


def cache_directory() -> Path:
    """Where converted checkpoints are kept."""
    return Path(os.environ.get("A2SF_CACHE", Path.home() / ".cache" / "a2sf"))


def gguf_file(path: str) -> Path | None:
    """The GGUF file that `path` names, or None if it names something else.

    Raises:
        ConfigError: if it names a package or file that is not there.
    """
    if path.startswith(PACKAGE):
        package, _, name = path.removeprefix(PACKAGE).partition("/")
        spec = importlib.util.find_spec(package)  # found, not imported: such packages may need native libraries
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError("model.path", path, f"the package {package} is not installed; `make setup` installs it")
        file = Path(spec.submodule_search_locations[0]) / name
    elif path.endswith(".gguf"):
        file = Path(path)
    else:
        return None
    if not file.is_file():
        raise ConfigError("model.path", path, "there is no such file")
    return file


def local_checkpoint(spec: ModelSpec) -> str:
    """`spec.path` as something transformers loads: a GGUF file is converted (once) to a directory."""
    file = gguf_file(spec.path)
    return spec.path if file is None else str(_converted(file))


def _converted(file: Path) -> Path:
    digest = _file_digest(file)[:12]
    target = cache_directory() / "models" / f"{file.stem}-{digest}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            try:
                model.save_pretrained(temporary)
                AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(temporary)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def check_config(spec: ModelSpec) -> None:
    """Refuse, from its config alone, a model that cannot be loaded or pruned.

    Raises:
        ConfigError: if there is no such model, or it is not a causal decoder that AttentionInterface reaches.
    """
    if gguf_file(spec.path) is not None:
        return
    try:
        config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        if Path(spec.path).exists():
            why = f"the directory holds no model that transformers can load ({_first_line(error)})"
        else:
            why = f"there is no such local directory, and the hub did not give it ({_first_line(error)})"
        raise ConfigError("model.path", spec.path, why) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError("model.path", spec.path, "it is an encoder-decoder; give a causal decoder model")
    names = getattr(config, "architectures", None) or []
    if names and not any(n.endswith(CAUSAL_ARCHITECTURES) for n in names):
        raise ConfigError("model.path", spec.path, f"{names[0]} is not a causal language model; give a decoder model")


def layers_of(spec: ModelSpec) -> int:
    """How many layers the model has, from its config alone.

    Raises:
        ConfigError: if there is no such model.
    """
    check_config(spec)
    file = gguf_file(spec.path)
    if file is None:
        common = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        config = AutoConfig.from_pretrained(spec.path, **common)
    else:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    return int(config.get_text_config().num_hidden_layers)


def load(spec: ModelSpec) -> LoadedModel:
    """Load a model and its tokenizer, from safetensors only, and check that pruning it is exact.

    Raises:
        ConfigError, UnsupportedModel: if it cannot be loaded or pruned.
    """
    check_config(spec)
    path = local_checkpoint(spec)
    common = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[spec.resolved_dtype], use_safetensors=True, **common
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    except (OSError, ValueError) as error:
        raise ConfigError("model.path", spec.path, f"it cannot be loaded: {_first_line(error)}") from error
    model = model.to(spec.resolved_device).eval()  # type: ignore[arg-type]
    check_exact(model)
    return LoadedModel(model, tokenizer, fingerprint(spec))


def fingerprint(spec: ModelSpec) -> str | None:
    """What identifies the weights and the tokenizer without loading them; None if a hub's model was never looked up here.

    A hash of the contents of the GGUF file or of a local directory's files; for a hub id, the commit.
    """
    file = gguf_file(spec.path)
    if file is not None:
        return _file_digest(file)[:16]
    directory = Path(spec.path)
    if not directory.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
        return Path(config).parent.name[:16] if isinstance(config, str) else None
    files = sorted(f for f in directory.iterdir() if f.suffix in IDENTIFYING_FILES and f.is_file())
    digests = [f"{f.name} {_file_digest(f)}" for f in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def identify(spec: ModelSpec) -> None:
    """Look a hub's model up if it never was, so that `fingerprint` knows it from here on.

    Raises:
        ConfigError: if there is no such model, or it is not a causal decoder.
    """
    if fingerprint(spec) is None:
        check_config(spec)


def _file_digest(file: Path) -> str:
    """SHA-256 of a file's contents, remembered by path, size and time of change."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    known = cache_directory() / "digests" / key[:32]
    if known.exists() and len(text := known.read_text()) == 64:
        return text
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        temporary = known.with_name(f"{known.name}.{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(known)
    except OSError:
        pass  # only a shortcut
    return digest


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
