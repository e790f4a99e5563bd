"""lm-eval's `model_args`: the named model is loaded as `a2sf run` loads it, with every argument of `HFLM`.

Each argument is used, or refused in one sentence; none is ignored.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from a2sf.errors import ConfigError, Notice, nearest
from a2sf.hf.loading import LoadedModel, ModelSpec, left_alone, load, load_tokenizer
from a2sf.hf.loading.tokenizer import check_bos

OF_LOADING = ("revision", "dtype", "device", "device_map", "trust_remote_code", "gguf_file", "peft")
LOAD_IT = "it is not for a model that is given by its name; load the model with it and give that as pretrained"
NOT_OURS = {
    **dict.fromkeys(("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan"), LOAD_IT),
    **dict.fromkeys(("delta", "autogptq", "gptqmodel", "subfolder"), LOAD_IT),
    "use_fast_tokenizer": "transformers 5 has fast tokenizers alone; leave it out",
    "truncation": "a prompt that is too long for the model loses its beginning, as lm-eval has it; leave it out",
    "softmax_dtype": "log-likelihoods are computed in float32; leave it out",
    "mixed_precision_dtype": "give dtype, which is that of the whole model",
}
"""Arguments of HFLM that are refused here if they differ from its defaults -> what to do instead."""


def check_names(given: dict[str, Any], ours: Iterable[str]) -> None:
    """Refuse unknown arguments: HFLM accepts any name, and ignores what it does not know.

    Args:
        given: what is left for it.
        ours: names of our own arguments.

    Raises:
        ConfigError: if there is one, with the nearest name that there is.
    """
    known = {*ours, *OF_LOADING, *inspect.signature(HFLM.__init__).parameters} - {"self", "kwargs"}
    for key, value in given.items():
        if key not in known:
            near = nearest(key, known)
            load = "" if near else "; if it is for loading, load the model with it and give that as pretrained"
            raise ConfigError(key, value, f"the model a2sf has no such argument{near}{load}")


def load_pretrained(pretrained: str, given: dict[str, Any]) -> tuple[LoadedModel, dict[str, Any]]:
    """The model that a path names, loaded with what `given` says of that, and what of `given` is left for HFLM.

    Raises:
        ConfigError: if the model cannot be loaded, or a setting is not for models loaded here.
    """
    _refuse_not_ours(given)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("WORLD_SIZE", os.environ["WORLD_SIZE"], "one process computes a cell; start a single one")
    settings = {key: given[key] for key in OF_LOADING if given.get(key) is not None}
    if "dtype" in settings:
        settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
    if "device" in settings:
        settings["device"] = str(settings["device"])
    if "peft" in settings:
        settings["adapter"] = settings.pop("peft")
    path = "/".join(filter(None, [pretrained, settings.pop("gguf_file", None)]))
    bos = given.get("add_bos_token")
    # a tokenizer that is named apart takes the setting itself
    bos_of_model = None if isinstance(given.get("tokenizer"), str) else bos
    spec = ModelSpec(path, add_bos_token=bos_of_model, **settings)
    loaded = load(spec)
    if note := left_alone(spec):
        warnings.warn(note, Notice, stacklevel=2)
    left = {k: v for k, v in given.items() if k not in OF_LOADING and k not in NOT_OURS and v is not None}
    if isinstance(name := left.get("tokenizer"), str):
        of_code = {"trust_remote_code": settings.get("trust_remote_code", False), "add_bos_token": bos}
        spec = ModelSpec(name, **of_code)
        if "revision" in settings and spec.source.kind == "hub":  # lm-eval has one revision for both
            spec = ModelSpec(name, revision=settings["revision"], **of_code)
        left["tokenizer"] = load_tokenizer(spec)
    return loaded, left


def check_given(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for HFLM besides a model that is loaded already, without those that are None.

    Raises:
        ConfigError: if it contradicts the loaded model, or HFLM would ignore it.
    """
    _refuse_not_ours(given)
    device = given.get("device")
    for key, value, has in (
        ("dtype", str(given.get("dtype") or "auto").removeprefix("torch."), str(model.dtype).removeprefix("torch.")),
        ("device", "auto" if device is None else torch.device(device).type, model.device.type),
        ("gguf_file", given.get("gguf_file") or "auto", "none"),
    ):
        if value not in ("auto", has):
            raise ConfigError(key, given[key], f"the model is loaded already, with {has}; leave it out")
    return {k: v for k, v in given.items() if v is not None}


def check_tokens(lm: HFLM, given: dict[str, Any]) -> None:
    """Refuse what a tokenizer that is made already does not do, and a prefix that is no token of the model's.

    Raises:
        ConfigError: naming the argument.
    """
    if given.get("add_bos_token"):
        check_bos(lm.tokenizer, getattr(lm.tokenizer, "name_or_path", "") or "the model", "add_bos_token")
    prefix = given.get("prefix_token_id")
    size = lm.model.get_input_embeddings().num_embeddings if prefix is not None else 0
    if prefix is not None and (isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 <= prefix < size):
        raise ConfigError("prefix_token_id", prefix, f"give the number of a token, 0 to {size - 1}")


def _defaults() -> dict[str, Any]:
    """HFLM's arguments, and what each is where it is left out."""
    parameters = inspect.signature(HFLM.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


def _refuse_not_ours(given: dict[str, Any]) -> None:
    defaults = _defaults()
    for key, why in NOT_OURS.items():
        value = given.get(key)
        plain = (None, defaults.get(key), *(("float32", torch.float32) if key == "softmax_dtype" else ()))
        if value not in plain:
            raise ConfigError(key, value, why)
