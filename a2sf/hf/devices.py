"""The devices of a model: one, or several by a map that accelerate applies.

Under a map each layer runs where its weights are, or where they are moved to. The attention function and the bounded cache
use the device of the queries and keys that they get, so that a layer's cache is on the layer's device.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from a2sf.compat.transformers import execution_device
from a2sf.errors import ConfigError, nearest

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate may choose the devices itself."""
OFFLOADED = ("cpu", "disk")
"""Where weights wait until they are needed, in a map that has GPUs; without one, the CPU computes."""
DEVICE, MAP = "model.device", "model.device_map"


def check(device: str, device_map: str | None) -> None:
    """Refuse what can be no device or no map, or the two together.

    Raises:
        ConfigError: naming the key.
    """
    kind = device
    if device != "auto":
        try:
            kind = torch.device(device).type
        except RuntimeError:
            raise ConfigError(DEVICE, device, "give auto, cpu, cuda or cuda:N") from None
    if device_map is None:
        return
    of_map = read_map(device_map)
    if isinstance(of_map, dict):
        fits = device in ("auto", kind_of(of_map))
    else:
        fits = device in ("auto", "cuda") or (kind == "cpu" and not torch.cuda.is_available())
    if not fits:
        raise ConfigError(DEVICE, device, f"{MAP}={device_map} says where the model goes; leave {DEVICE} at auto")


def check_here(device: str, device_map: str | None) -> None:
    """Refuse GPUs that this machine does not have.

    Raises:
        ConfigError: naming the key.
    """
    gpus = torch.cuda.device_count()
    if device != "auto" and torch.device(device).type == "cuda" and (torch.device(device).index or 0) >= gpus:
        raise ConfigError(DEVICE, device, "this machine has no such GPU; give auto or cpu")
    if device_map is not None and isinstance(of_map := read_map(device_map), dict):
        last = max((d for d in of_map.values() if isinstance(d, int)), default=-1)
        if last >= gpus:
            raise ConfigError(MAP, device_map, f"it names GPU {last}, counted from 0, and this machine has {gpus}")


def resolve(device: str, device_map: str | None) -> str:
    """The device that `auto` stands for; under a map, the kind of device that computes."""
    if device_map is not None and isinstance(of_map := read_map(device_map), dict):
        return kind_of(of_map)
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def kind_of(device_map: dict[str, int | str]) -> str:
    """What computes under a map: cuda, or cpu where it names no GPU."""
    return "cuda" if any(isinstance(d, int) for d in device_map.values()) else "cpu"


def read_map(value: str) -> str | dict[str, int | str]:
    """What `from_pretrained` takes as `device_map`: a name, or module -> GPU's number, `cpu` or `disk`, from a JSON file.

    Raises:
        ConfigError: if it is neither a name that accelerate knows nor such a file.
    """
    if value in MAPS:
        return value
    file = Path(value).expanduser()
    if file.suffix != ".json":
        allowed = f"give null, one of {', '.join(MAPS)}, or a JSON file of modules and devices{nearest(value, MAPS)}"
        raise ConfigError(MAP, value, allowed)
    try:
        return dict(_read(file, file.stat().st_mtime_ns))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ConfigError(MAP, value, f"the file cannot be used ({why})") from error


@cache
def _read(file: Path, changed: int) -> dict[str, int | str]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        raise ValueError('it must be an object such as {"model.embed_tokens": 0, "model.layers.0": "disk"}')
    for module in content:
        if inside := next(
            (m for m in content if m != module and f"{m}.".startswith(f"{module}." if module else "")), None
        ):
            raise ValueError(f"{module or 'the whole model'} holds {inside}, and each part is to be named once")
    return {module: _device(module, device) for module, device in content.items()}


def _device(module: str, device: Any) -> int | str:
    number = str(device).removeprefix("cuda:")
    if number.isdecimal() and not isinstance(device, bool):
        return int(number)  # accelerate takes the first GPU of a map as the main one only where they are numbers
    if device not in OFFLOADED:
        raise ValueError(f"{module} is on {device!r}, which is none of {', '.join(OFFLOADED)} and a GPU's number")
    return str(device)


def spread(device_map: str, room: Path, read: Callable[[dict[str, Any]], PreTrainedModel]) -> PreTrainedModel:
    """A model over several devices.

    Args:
        device_map: a name or a file, as for `read_map`.
        room: a directory for weights that the map keeps on the disk and that are not in safetensors; they are removed
            with the model.
        read: reads the model; its argument are the settings of `from_pretrained` about devices.

    Raises:
        ConfigError: if the map does not fit the model.
    """
    of_map = read_map(device_map)
    (room / "offload").mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=room / "offload")
    try:
        model = read({"device_map": of_map, "offload_folder": folder})
        if isinstance(of_map, dict):
            names = {n for n, _ in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]}
            if unknown := [n for n in of_map if n not in names]:
                why = f"{type(model).__name__} has no part {unknown[0]}{nearest(unknown[0], names)}"
                raise ConfigError(MAP, device_map, why)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        cause = str(error.__cause__)
        if "device_map" in cause:  # which accelerate says of a map that leaves parts out
            raise ConfigError(MAP, device_map, cause.partition("\n")[0].rstrip(".")) from error
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for a model's inputs; for a model on several devices, where accelerate begins to compute.

    The first parameter of such a model may be on the device `meta`, since its values are loaded when they are needed.
    """
    return execution_device(model) or model.device


def devices_of(model: PreTrainedModel) -> list[str]:
    """The devices of a model's parts, such as `0` for a GPU, `cpu` or `disk`; empty for a model without a map."""
    return sorted({str(d) for d in getattr(model, "hf_device_map", {}).values()})
