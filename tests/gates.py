"""Random gates in the format of KVzap's models (`baselines/gates.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def random_gates(layers: int, heads: int, hidden: int, inner: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Tensors by name: linear layers, or MLPs with `inner` numbers between; scores of normal hidden states are about 1."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for i in range(layers):
        parts = {"": (heads, hidden)} if inner is None else {"0.": (inner, hidden), "2.": (heads, inner)}
        for part, (n, m) in parts.items():
            made[f"layers.{i}.{part}weight"] = torch.randn(n, m, generator=g) * m**-0.5
            made[f"layers.{i}.{part}bias"] = 0.1 * torch.randn(n, generator=g)
    return made


def config_of(tensors: dict[str, Tensor]) -> dict[str, object]:
    """The content of config.json of such gates."""
    first, linear = next(iter(tensors.values())), "layers.0.weight" in tensors
    return {
        "architectures": ["KVzapModel"],
        "model_type": "kvzap",
        "dtype": "float32",
        "input_dim": first.shape[1],
        "hidden_dim": None if linear else first.shape[0],
        "output_dim": len(tensors["layers.0.bias" if linear else "layers.0.2.bias"]),
        "n_modules": len({name.split(".")[1] for name in tensors}),
    }


def write_gates(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder as published ones are: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(tensors), indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
