"""Retrieval heads: heads whose strongest attention lies on the very token that is to be copied from far back.

Paper: Wu et al., 2024 (arXiv 2404.15574): a head copies a token of the needle if, as the model is to give that token, its
attention is strongest at that token within the needle. A head's score is the share of the needle's tokens that it copies.
Deviations: the answer is teacher-forced, so that every document counts, whether the model would have found it or not.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a2sf.calibration.capture import Layer, look
from a2sf.errors import UserError
from a2sf.hf.layer_check import layers_of
from a2sf.tasks.needle.utils import documents


@dataclass(frozen=True)
class Needle:
    """A document with its answer behind it.

    Attributes:
        ids: all tokens.
        needle: places of the code's tokens in the text.
        answer: places of the same tokens in the answer, in order.
    """

    ids: tuple[int, ...]
    needle: tuple[int, ...]
    answer: tuple[int, ...]


def needles(tokenizer: Any, count: int, lengths: Sequence[int], seed: int = 0) -> list[Needle]:
    """The first `count` documents of the needle task at `lengths` words of filler, all depths in turns.

    Raises:
        UserError: if the tokenizer does not tell where its tokens are, or cuts a code otherwise in the answer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("the model's tokenizer does not tell where in a text its tokens are; choose another model")
    # a seed that no sweep of the task has: heads are not chosen on the texts that they are scored on
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
            "the model's tokenizer cuts a code otherwise in the answer than in the text; choose another model"
        )
    return Needle(ids, needle, answer)


def scores(model: Any, found: Iterable[Needle]) -> np.ndarray:
    """Retrieval score of every query head, float64 [layers, H], from 0 to 1."""
    hits: Any = 0
    tokens = 0
    for needle in found:
        of_layer: dict[int, Tensor] = {}

        def see(layer: Layer, needle: Needle = needle, of_layer: dict[int, Tensor] = of_layer) -> None:
            of_layer[layer.number] = copied(layer, needle).sum(1)

        look(model, needle.ids, see)
        hits = hits + torch.stack([of_layer[i] for i in range(layers_of(model))]).double().cpu().numpy()
        tokens += len(needle.answer)
    return np.asarray(hits) / tokens


def copied(layer: Layer, needle: Needle) -> Tensor:
    """bool [H, answer]: whether a head's strongest attention, as a token of the answer is due, is where the text has it."""
    asked = torch.tensor([i - 1 for i in needle.answer], device=layer.query.device)
    query = layer.query[0, :, asked].float()  # [H, answer, D]
    key = layer.key[0].float().repeat_interleave(query.shape[0] // layer.key.shape[1], 0)
    logits = query @ key.transpose(1, 2)  # no softmax: the strongest is the strongest
    later = torch.arange(key.shape[1], device=key.device) > asked[:, None]
    at = (logits * layer.scale).masked_fill(later, -torch.inf).argmax(-1).cpu()
    ids, place = torch.tensor(needle.ids), torch.zeros(len(needle.ids), dtype=torch.bool)
    place[list(needle.needle)] = True
    return place[at] & (ids[at] == ids[list(needle.answer)])


def of_kv_heads(found: np.ndarray, kv_heads: int) -> np.ndarray:
    """Scores of key/value heads [layers, K] from those of query heads [layers, H]: the best of each group counts."""
    return found.reshape(len(found), kv_heads, -1).max(-1)


def chosen_heads(found: np.ndarray, count: int) -> list[list[int]]:
    """The `count` heads of the highest scores [layers, K] as `[layer, head]` pairs, the highest first, of equals the first.

    Raises:
        UserError: if there are not so many.
    """
    if not 1 <= count <= found.size:
        raise UserError(
            f"{count} heads cannot be chosen: the model has {found.size} key/value heads; give 1 to {found.size}"
        )
    order = np.argsort(-found, axis=None, kind="stable")[:count]
    return [[int(i), int(h)] for i, h in zip(*np.unravel_index(order, found.shape), strict=True)]


def random_heads(layers: int, kv_heads: int, count: int, seed: int = 0) -> list[list[int]]:
    """As many heads drawn at random, to compare with: `[layer, head]` pairs.

    Raises:
        UserError: if there are not so many.
    """
    every = [[layer, head] for layer in range(layers) for head in range(kv_heads)]
    if not 1 <= count <= len(every):
        raise UserError(f"{count} heads cannot be drawn: the model has {len(every)} key/value heads")
    return sorted(random.Random(seed).sample(every, count))
