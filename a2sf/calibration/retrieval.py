"""Retrieval heads: heads that attend most to the token that the model has to copy from far back.

Paper: Wu et al., 2024 (arXiv 2404.15574): a head copies a token of the needle if its attention is strongest at that token
in the needle when the model has to produce it. The score of a head is the share of the needle's tokens that it copies.
Deviations: the answer is teacher-forced, so that every document counts, even if the model would not have found the
needle.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a2sf.calibration.capture import Captured, capture
from a2sf.errors import UserError
from a2sf.hf.layer_check import layers_of
from a2sf.tasks.needle.utils import documents


@dataclass(frozen=True)
class Needle:
    """A document followed by its answer.

    Attributes:
        ids: token ids of document and answer.
        needle: positions of the code's tokens in the document.
        answer: positions of the same tokens in the answer, in the same order.
    """

    ids: tuple[int, ...]
    needle: tuple[int, ...]
    answer: tuple[int, ...]


def needles(tokenizer: Any, count: int, lengths: Sequence[int], seed: int = 0) -> list[Needle]:
    """Documents of the needle task, at all depths in turns.

    Args:
        tokenizer: a fast tokenizer of transformers.
        count: how many documents.
        lengths: words of filler, in turns.
        seed: seed of the names and codes. They differ from those of every sweep of the task.

    Raises:
        UserError: if the tokenizer gives no positions of its tokens, or splits a code differently in the answer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "the model's tokenizer does not give the positions of its tokens in the text; choose another model"
        )
    # a seed that no sweep uses: heads must not be chosen on the documents that they are scored on
    made = documents(seed=f"retrieval-{seed}", per_cell=count, lengths=tuple(lengths))["test"]
    return [_needle(tokenizer, document) for document in made.select(range(count))]


def _needle(tokenizer: Any, document: dict[str, Any]) -> Needle:
    context, key, value = document["context"], document["key"], document["value"]
    text = f"{context}\n\nQuestion: What is the access code of {key}?\nAnswer: The access code of {key} is {value}"
    read = tokenizer(text, return_offsets_mapping=True)
    places = []
    for start in (text.index(value), text.rindex(value)):
        end = start + len(value)
        places.append(tuple(i for i, (a, b) in enumerate(read["offset_mapping"]) if a < end and b > start))
    ids = tuple(read["input_ids"])
    needle, answer = places
    if [ids[i] for i in needle] != [ids[i] for i in answer]:
        raise UserError(
            "the model's tokenizer splits a code differently in the answer and in the text; choose another model"
        )
    return Needle(ids, needle, answer)


def scores(model: Any, found: Iterable[Needle]) -> np.ndarray:
    """Retrieval score of every query head, float64 [layers, H], from 0 to 1."""
    hits: Any = 0
    tokens = 0
    for needle in found:
        hits_by_layer: dict[int, Tensor] = {}

        def count(layer: Captured, needle: Needle = needle, hits: dict[int, Tensor] = hits_by_layer) -> None:
            hits[layer.number] = copied(layer, needle).sum(1)

        capture(model, needle.ids, count)
        hits = hits + torch.stack([hits_by_layer[i] for i in range(layers_of(model))]).double().cpu().numpy()
        tokens += len(needle.answer)
    return np.asarray(hits) / tokens


def copied(layer: Captured, needle: Needle) -> Tensor:
    """Whether each head copies each token of the answer, bool [H, answer]."""
    before = torch.tensor([i - 1 for i in needle.answer], device=layer.query.device)
    query = layer.query[0, :, before].float()  # [H, answer, D]
    key = layer.key[0].float().repeat_interleave(query.shape[0] // layer.key.shape[1], 0)
    logits = query @ key.transpose(1, 2)  # neither softcap nor softmax would change the order
    later = torch.arange(key.shape[1], device=key.device) > before[:, None]
    at = (logits * layer.options.scale).masked_fill(later, -torch.inf).argmax(-1).cpu()
    ids, in_needle = torch.tensor(needle.ids), torch.zeros(len(needle.ids), dtype=torch.bool)
    in_needle[list(needle.needle)] = True
    return in_needle[at] & (ids[at] == ids[list(needle.answer)])


def of_kv_heads(found: np.ndarray, kv_heads: int) -> np.ndarray:
    """Scores of key/value heads [layers, K], from scores of query heads [layers, H]: the maximum of each group."""
    return found.reshape(len(found), kv_heads, -1).max(-1)


def chosen_heads(found: np.ndarray, count: int) -> list[list[int]]:
    """The `count` heads with the highest scores [layers, K], as `[layer, head]` pairs in descending order.

    Raises:
        UserError: if the model has fewer heads.
    """
    if not 1 <= count <= found.size:
        raise UserError(
            f"{count} heads cannot be chosen: the model has {found.size} key/value heads; give 1 to {found.size}"
        )
    order = np.argsort(-found, axis=None, kind="stable")[:count]
    return [[int(i), int(h)] for i, h in zip(*np.unravel_index(order, found.shape), strict=True)]


def random_heads(layers: int, kv_heads: int, count: int, seed: int = 0) -> list[list[int]]:
    """`count` heads drawn at random, for comparison: `[layer, head]` pairs.

    Raises:
        UserError: if the model has fewer heads.
    """
    every = [[layer, head] for layer in range(layers) for head in range(kv_heads)]
    if not 1 <= count <= len(every):
        raise UserError(f"{count} heads cannot be drawn: the model has {len(every)} key/value heads")
    return sorted(random.Random(seed).sample(every, count))
