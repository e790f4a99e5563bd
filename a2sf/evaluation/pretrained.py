"""A model that lm-eval names, loaded as the harness loads it."""

from __future__ import annotations

import inspect
import os
import warnings
from typing import Any

from lm_eval.models.huggingface import HFLM

from a2sf.errors import ConfigError, Notice
from a2sf.hf.loading import LoadedModel, ModelSpec, left_alone, load, load_tokenizer

OF_LOADING = ("revision", "dtype", "device", "device_map", "trust_remote_code", "gguf_file", "peft")
NOT_OURS = {
    "parallelize",
    "tp_plan",
    "delta",
    "autogptq",
    "gptqmodel",
    "subfolder",
    "max_memory_per_gpu",
    "max_cpu_memory",
    "offload_folder",
    "use_fast_tokenizer",
}
"""What HFLM does while it loads a model, which it does not here."""


def load_pretrained(pretrained: str, given: dict[str, Any]) -> tuple[LoadedModel, dict[str, Any]]:
    """The model that a path names, loaded with what `given` says of that, and what of `given` is left for HFLM.

    Raises:
        ConfigError: if the model cannot be loaded, or a setting is not for models loaded here.
    """
    known = inspect.signature(HFLM.__init__).parameters
    for key, value in given.items():
        if (key in NOT_OURS and value) or (key not in known and key not in OF_LOADING):
            raise ConfigError(
                key,
                value,
                "it is not for a model that is given by its name; load the model with it and give that as pretrained",
            )
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
    spec = ModelSpec(path, **settings)
    loaded = load(spec)
    if note := left_alone(spec):
        warnings.warn(note, Notice, stacklevel=2)
    left = {k: v for k, v in given.items() if k not in OF_LOADING and k not in NOT_OURS and v is not None}
    if isinstance(name := left.get("tokenizer"), str):
        left["tokenizer"] = load_tokenizer(ModelSpec(name, trust_remote_code=settings.get("trust_remote_code", False)))
    return loaded, left
