"""A checkpoint's files: which hold the weights, whether they are complete, and whether every parameter was read.

safetensors are preferred to PyTorch's pickles, which torch's safe loader reads. Nothing here runs code that comes with a
file, and no service is used to convert one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from a2sf.compat.transformers import expected_missing, was_read
from a2sf.errors import ConfigError, first_line
from a2sf.hf.files import adapter
from a2sf.hub.refusals import chain

KEY = "model.path"
INDEX = ".index.json"
FORMATS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
"""Format -> the file that transformers reads, in the order they are looked for; `<file>.index.json` if it is in shards."""
TEXTS = {".json", ".model", ".txt", ".jinja", ".tiktoken", ".bpe", ".spm", ".codes", ".vocab"}
"""Of tokenizers, configs and chat templates."""
OF_TRAINING = {"trainer_state.json", "train_results.json", "eval_results.json", "all_results.json", "README.txt"}
VOCABULARIES = re.compile(
    r"tokenizer\.json|tekken\.json|vocab\.\w+|.*\.(model|tiktoken|spm|codes|vocab)|.*vocab.*\.(json|txt)|dict\.txt"
)
OTHERS = {
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".pth": "PyTorch, under another name",
    ".pt": "PyTorch, under another name",
    ".bin": "PyTorch, under another name",
    ".safetensors": "safetensors, under another name",
}
POINTER = b"version https://git-lfs"
SHOWN = 3


class Files(Protocol):
    """A checkpoint's files, wherever they are."""

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def refused(self) -> ConfigError | None: ...

    def get(self, names: Iterable[str]) -> Path: ...


@dataclass(frozen=True)
class Folder:
    """The files of a local directory."""

    directory: Path
    refused = None

    @property
    def sizes(self) -> dict[str, int]:
        list(self.directory.iterdir())  # raises where it cannot be looked into, as glob does not
        files = [*self.directory.glob("*"), *self.directory.glob("*/*")]
        return {f.relative_to(self.directory).as_posix(): f.stat().st_size for f in files if f.is_file()}

    def get(self, names: Iterable[str]) -> Path:
        return self.directory


@dataclass(frozen=True)
class Weights:
    """Which files hold a checkpoint's weights.

    Attributes:
        format: safetensors or bin.
        index: the file that says which shard holds what; None for a single file.
        files: the weights' files.
    """

    format: str
    index: str | None
    files: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.files, self.index) if self.index else self.files


def find_weights(files: Files, path: str) -> Weights:
    """Which files to read the weights from; of the index, if there is one, the contents are needed.

    Raises:
        ConfigError: if there are none that can be read, or a shard is missing.
    """
    sizes = files.sizes
    for name, file in FORMATS.items():
        if file in sizes:
            return Weights(name, None, (file,))
        if file + INDEX in sizes:
            shards = _shards(files.get([file + INDEX]) / (file + INDEX), path)
            if missing := [s for s in shards if s not in sizes]:
                why = f"of its {len(shards)} files of weights {len(missing)} are missing ({_some(missing)})"
                raise files.refused or ConfigError(KEY, path, f"{why}; complete the directory or choose another model")
            return Weights(name, file + INDEX, shards)
    raise files.refused or ConfigError(KEY, path, _no_weights(sizes))


def find_texts(files: Files, path: str, code: bool) -> tuple[str, ...]:
    """Config, tokenizer, chat templates and, where it may run, code that comes with the weights.

    Raises:
        ConfigError: if there is no config or no tokenizer.
    """
    sizes = files.sizes
    if "config.json" not in sizes:
        raise files.refused or ConfigError(KEY, path, _no_weights(sizes) if sizes else "it is empty")
    found = [n for n in sizes if _is_text(n) or (code and n.endswith(".py"))]
    if not code and not any(VOCABULARIES.fullmatch(n) for n in found):
        raise files.refused or ConfigError(
            KEY, path, "it has no tokenizer; copy the tokenizer's files of the model it was made from to it"
        )
    return tuple(sorted(found))


def identifying(files: Files, path: str) -> list[str]:
    """The names of a local directory's files that could change a number: texts, modelling code, and the weights."""
    sizes = files.sizes
    names = {n for n in sizes if _is_text(n) or n.endswith(".py")}
    with suppress(ConfigError):  # it is reported when the model is checked
        names.update(find_weights(files, path).all)
    return sorted(n for n in names if n in sizes)


def _is_text(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder not in ("", "additional_chat_templates") or file in OF_TRAINING or file.startswith("."):
        return False
    return Path(file).suffix in TEXTS and not file.endswith(INDEX)


def _no_weights(sizes: Mapping[str, int]) -> str:
    ggufs = sorted(n for n in sizes if n.endswith(".gguf"))
    if ggufs:
        return f"it holds GGUF files; name one of them ({_some(ggufs)}), as in owner/name/{ggufs[0]}"
    if "adapter_config.json" in sizes:
        return "it holds an adapter, not a whole model; give its base model as model.path and this as model.adapter"
    if "config.json" not in sizes:
        return "it holds no model (there is no config.json)"
    others = {
        what: n for n in sorted(sizes) if (what := OTHERS.get(Path(n).suffix)) and not n.startswith("training_args")
    }
    has = f"; it has {', '.join(f'{n} ({what})' for what, n in others.items())}" if others else ""
    return f"it holds no weights that can be read ({' or '.join(FORMATS.values())}, or their shards){has}"


def _shards(index: Path, path: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except OSError as error:
        raise unreadable(error, path, index) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            KEY, path, f"{index.name} does not say where the weights are ({first_line(error)})"
        ) from error


def unreadable(error: OSError, path: str, file: Path) -> ConfigError:
    """The refusal of a model for a file or directory that the system does not let us read."""
    return ConfigError(KEY, path, f"{error.filename or file} cannot be read ({error.strerror or first_line(error)})")


def check_whole(folder: Path, weights: Weights, path: str) -> None:
    """Refuse files that are empty, cut off or only pointers, as their beginnings show.

    Raises:
        ConfigError: naming the file.
    """
    for name in weights.files:
        file = folder / name
        try:
            with file.open("rb") as stream:
                pointer = stream.read(len(POINTER)) == POINTER
            if not pointer and weights.format == "safetensors":
                with safetensors.safe_open(str(file), framework="pt"):
                    pass
        except OSError as error:
            raise unreadable(error, path, file) from error
        except safetensors.SafetensorError as error:
            why = f"{name} is not a whole safetensors file ({first_line(error)})"
            raise ConfigError(KEY, path, f"{why}; delete {file} and get it again") from error
        if pointer:
            raise ConfigError(KEY, path, f"{name} is a Git LFS pointer, not the weights; run `git lfs pull` there")
        if file.stat().st_size == 0:
            raise ConfigError(KEY, path, f"{name} is empty; delete {file} and get it again")


def read(
    folder: Path,
    weights: Weights,
    dtype: torch.dtype,
    path: str,
    code: bool,
    placement: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model with the weights of a local directory, every parameter read from there.

    Args:
        placement: settings of `from_pretrained` about devices (`device_map`, `offload_folder`); None: all on the CPU.

    Raises:
        ConfigError: if it cannot be read, or the weights are not those of this model.
    """
    check_whole(folder, weights, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True)
        model, report = from_pretrained(
            folder,
            auto_class(config) or AutoModelForCausalLM,
            dtype=dtype,
            trust_remote_code=code,
            local_files_only=True,
            use_safetensors=weights.format == "safetensors",
            weights_only=True,
            **(placement or {}),
        )
    except Exception as error:
        raise ConfigError(KEY, path, _unreadable(error, weights)) from error
    check_complete(model, report, path, _held(folder, weights) if placement else frozenset())
    return model


def _held(folder: Path, weights: Weights) -> frozenset[str]:
    """The names of the parameters in safetensors files; empty for others."""
    held: set[str] = set()
    for name in weights.files if weights.format == "safetensors" else ():
        with safetensors.safe_open(str(folder / name), framework="pt") as file:
            held.update(file.keys())
    return frozenset(held)


def auto_class(config: Any) -> Any:
    """transformers' class for models of this config, which read text alone or images besides; None: it has none."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None


def from_pretrained(
    folder: Path, auto: Any = AutoModelForCausalLM, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' own, with its report of what was loaded, for `check_complete`."""
    # shapes that do not fit are reported there, all of them and with their names
    reporting = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded: Any = auto.from_pretrained(folder, **reporting, **adapter.NOWHERE, **settings)
    return loaded


def _unreadable(error: Exception, weights: Weights) -> str:
    text = " ".join(str(e) for e in chain(error))
    if weights.format == "bin" and ("weights_only" in text.lower() or "Weights only load failed" in text):
        return (
            "its pytorch_model.bin holds more than tensors, and reading that would run code that comes with it; "
            "have its authors save it as safetensors"
        )
    what = (
        "its weights cannot be read" if isinstance(error, OSError | RuntimeError | EOFError) else "it cannot be loaded"
    )
    return f"{what} ({type(error).__name__}: {first_line(error)})"


def check_complete(
    model: PreTrainedModel, report: Mapping[str, Any], path: str, held: frozenset[str] = frozenset()
) -> None:
    """Refuse weights that are not those of this model, by transformers' report of what it loaded.

    Args:
        report: of `from_pretrained`.
        held: names in the files, for parameters that accelerate keeps elsewhere until they are needed.

    Raises:
        ConfigError: if a parameter was not in the file (but one tied to another), its shape differs, or the file holds
            parts of layers that this model does not have.
    """
    name = type(model).__name__
    absent = sorted({*report["missing_keys"], *_left_out(model, held)})
    if mismatched := sorted(report["mismatched_keys"]):
        shown = [
            f"{key}: {tuple(stored)} in the file, {tuple(needed)} in the model" for key, stored, needed in mismatched
        ]
        raise ConfigError(
            KEY, path, f"{len(shown)} parameters have another shape than config.json says ({_some(shown, '; ')})"
        )
    if absent:
        why = f"its files lack {len(absent)} of the parameters of {name} ({_some(absent)}), which would be random"
        if report["unexpected_keys"]:
            why += f", and hold {_some(sorted(report['unexpected_keys']))} instead"
        raise ConfigError(KEY, path, f"{why}; config.json and the weights are not of one model, or a file is missing")
    if foreign := sorted(k for k in report["unexpected_keys"] if _belongs_to_a_layer(model, k)):
        raise ConfigError(
            KEY,
            path,
            f"its files hold {len(foreign)} parameters for which {name} has no place ({_some(foreign)}), so that it would "
            "compute something else; config.json is not that of these weights",
        )
    _keep_untied(model)


def _left_out(model: PreTrainedModel, held: frozenset[str]) -> list[str]:
    """Parameters that were not read, and that transformers does not report since the model's class says so."""
    patterns = expected_missing(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    # transformers marks what it has read, and accelerate replaces what it keeps elsewhere
    marked = {n: was_read(p) or (p.device.type == "meta" and n in held) for n, p in model.named_parameters()}
    if not any(marked.values()):
        return []
    return [n for n, read in marked.items() if not read and n not in tied and any(re.search(p, n) for p in patterns)]


def _belongs_to_a_layer(model: PreTrainedModel, key: str) -> bool:
    """Whether a name that the model does not have belongs where it would change what is computed.

    That is beside the parameters of a module, in a part that the model's layers lack, or in an additional layer. Heads for
    other purposes, towers for images and the like have names elsewhere.
    """
    parts = key.split(".")
    extra = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0  # for drafting
    module: torch.nn.Module = model
    inside = False
    start = 0
    if not hasattr(model, parts[0]) and model.base_model is not model:
        module = model.base_model  # a file may leave out the first name
    for i, part in enumerate(parts[:-1]):
        if isinstance(module, torch.nn.ModuleList) and part.isdecimal() and int(part) >= len(module):
            return int(part) >= len(module) + extra or not extra
        inner = getattr(module, part, None)
        if not isinstance(inner, torch.nn.Module):
            return inside and i >= start
        inside = inside or isinstance(module, torch.nn.ModuleList)
        module = inner
    return any(True for _ in module.parameters(recurse=False))


def _keep_untied(model: PreTrainedModel) -> None:
    """If the config ties two parameters and the file holds two different ones, the file is right: correct the config.

    Otherwise code that ties the weights by the config again, as lm-eval does, would replace one by the other.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if set(tied) - set(model.all_tied_weights_keys):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _some(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    more = f"{separator}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more


def version_needed(config: Mapping[str, Any]) -> str:
    """What to say of a model type that the installed transformers does not know."""
    made = config.get("transformers_version")
    newer = f"; it was saved with {made}, so `pip install -U transformers`" if made else "; a newer one may"
    return f"transformers {transformers.__version__} does not know models of type {config.get('model_type')!r}{newer}"
