"""What a model's config shows without its weights: whether it can be loaded and pruned, and its sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from a2sf.compat.transformers import check_quantizer, refused
from a2sf.errors import ConfigError, first_line
from a2sf.hf.attention.windows import global_layers
from a2sf.hf.files import gguf, weights
from a2sf.hf.files.paths import KEY
from a2sf.hf.loading.checkpoint import files_of, folder_here, gguf_file
from a2sf.hf.loading.spec import ModelSpec
from a2sf.hub import snapshot as hub

CAUSAL_ARCHITECTURES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def check_config(spec: ModelSpec) -> Any | None:
    """Refuse, from its config alone, a model that cannot be loaded or pruned; returns the config, None for a GGUF file.

    Raises:
        ConfigError: if there is no such model, or it is not a causal decoder that AttentionInterface reaches.
    """
    if spec.source.kind == "hub" and spec.source.file:
        if spec.source.file not in (files := hub.snapshot(spec.wanted)).sizes:
            ggufs = sorted(f for f in files.sizes if f.endswith(".gguf"))
            has = f"it has {', '.join(ggufs[:9])}" if ggufs else "it has no GGUF file"
            raise files.refused or ConfigError(KEY, spec.path, f"{spec.source.repo} has no file of that name; {has}")
        return None
    return _config(spec) if gguf_file(spec) is None else None


def _config(spec: ModelSpec) -> Any:
    files = files_of(spec)
    code = spec.trust_remote_code
    texts = weights.find_texts(files, spec.path, code=True)  # the tokenizer is checked later
    folder = files.get([n for n in texts if n == "config.json" or (code and n.endswith(".py"))])
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, auto_map = raw.get("model_type"), raw.get("auto_map") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(KEY, spec.path, f"its config.json cannot be read ({first_line(error)})") from error
    _check_code(auto_map if code else {}, folder, spec.path)
    if settings := raw.get("quantization_config"):  # checked before the weights are fetched
        check_quantizer(settings, KEY, spec.path)
    needs_code = "it comes with code of its own; model.trust_remote_code=true runs it, if you trust its authors"
    if kind not in CONFIG_MAPPING and not (auto_map and code):
        why = weights.version_needed(raw) if kind else "its config.json names no model_type"
        why = needs_code if auto_map else why
        raise ConfigError(KEY, spec.path, why)
    with refused(KEY, spec.path, "its config.json cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(KEY, spec.path, "it is an encoder-decoder; give a causal decoder model")
    names = getattr(config, "architectures", None) or []
    if names and not any(n.endswith(CAUSAL_ARCHITECTURES) for n in names):
        raise ConfigError(KEY, spec.path, f"{names[0]} is not a causal language model; give a decoder model")
    if weights.auto_class(config) is None and not (code and "AutoModelForCausalLM" in auto_map):
        why = f"transformers has no causal language model of type {kind!r}; give a decoder model"
        raise ConfigError(KEY, spec.path, needs_code if "AutoModelForCausalLM" in auto_map else why)
    return config


def _check_code(auto_map: dict[str, Any], folder: Path, path: str) -> None:
    """Refuse code that a config names and that is not beside it: it would be taken from another commit."""
    names = [n for value in auto_map.values() for n in (value if isinstance(value, list) else [value]) if n]
    for name in names:
        elsewhere, _, module = str(name).rpartition("--")
        file = f"{module.rpartition('.')[0]}.py"
        if elsewhere or not (folder / file).is_file():
            where = f"is in {elsewhere}" if elsewhere else "is not there"
            why = f"its code ({file}) {where}; copy it beside the weights, and name it so in auto_map of config.json"
            raise ConfigError(KEY, path, why)


def sizes_of(spec: ModelSpec) -> tuple[int, int | None, int | None]:
    """How many layers the model has, KV heads in each (`kv_heads_of`), and numbers of a hidden state, from its config alone.

    None stands for what the config does not state.

    Raises:
        ConfigError: if there is no such model.
    """
    config = _any_config(spec)
    text = config.get_text_config()
    return int(text.num_hidden_layers), kv_heads_of(config), getattr(text, "hidden_size", None)


def acts_of(spec: ModelSpec) -> tuple[bool, ...]:
    """Of each layer of the model, whether a policy acts on it (`global_layers`), from its config alone.

    Raises:
        ConfigError: if there is no such model.
    """
    return global_layers(_any_config(spec))


def head_size_of(spec: ModelSpec) -> int | None:
    """How many numbers a head's key has, from the model's config alone; None where heads differ, or it does not say.

    Raises:
        ConfigError: if there is no such model.
    """
    text = _any_config(spec).get_text_config()
    stated = {k: v for k, v in vars(text).items() if k.endswith("head_dim") and v is not None}
    if set(stated) - {"head_dim"}:  # such as those of a part of the key, or of some layers
        return None
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else None
    size = stated.get("head_dim", derived)
    return size if isinstance(size, int) else None


def _any_config(spec: ModelSpec) -> Any:
    """The model's config, whatever its files are.

    Raises:
        ConfigError: if there is no such model.
    """
    config, file = check_config(spec), gguf_file(spec)
    return config if file is None else gguf.config_of(file)


def positions_of(spec: ModelSpec) -> int | None:
    """How many tokens the model can read and write at most, from its config alone; None where it does not say.

    Raises:
        ConfigError: if there is no such model.
    """
    text = _any_config(spec).get_text_config()
    stated = (
        getattr(text, key, None) for key in ("n_positions", "max_position_embeddings", "n_ctx")
    )  # as lm-eval reads them
    return next((int(n) for n in stated if isinstance(n, int)), None)


def kv_heads_of(config: Any) -> int | None:
    """KV heads of each layer; None if the config does not state one number."""
    text = config.get_text_config()
    stated = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    return stated if isinstance(stated, int) else None


def config_here(spec: ModelSpec) -> Any | None:
    """A model's config where it can be read without a download, a question to the hub, or a conversion; else None."""
    folder = folder_here(spec)
    if folder is not None and (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    if spec.source.kind != "hub" and (file := gguf_file(spec)) is not None and file.is_file():
        return gguf.config_of(file)
    return None
