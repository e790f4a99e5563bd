"""From logits to scores: the log-probability of each target, and whether it is the token that greedy decoding chooses."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = {"cpu": 8}
"""Rows taken at a time by device: on a processor as many as its cache holds, with one kernel for maximum, exponentials
and sum; 3 to 12 times as fast as `logsumexp` and `argmax` of 64 rows (one thread, 49,152 columns, float32 and bfloat16)."""
MANY = 256


def log_probabilities(logits: Tensor, where: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, float32 [n], and whether it is its row's first largest logit, bool [n].

    A result that depends on NaN or infinity is not finite. A logit of -infinity counts only where it is a target's.

    Args:
        logits: [rows, vocabulary], any floating dtype.
        where: int64 [n], the row that each target is of; a row may have several.
        targets: int64 [n].
    """
    largest = logits.amax(-1).float()
    normalizer = torch.empty_like(largest)
    rows = ROWS.get(logits.device.type, MANY)
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows].float().log_softmax(-1)
        # the largest logit is close to the normalizer, so that only the last bit of their difference is rounded
        normalizer[start : start + rows] = largest[start : start + rows] - part.amax(-1)
    chosen = logits[where, targets].float()
    greedy = chosen == largest[where]
    # of several largest the first: looked for where the target is among them
    at = greedy.nonzero()[:, 0]
    greedy[at] = logits[where[at]].float().argmax(-1) == targets[at]
    return chosen - normalizer[where], greedy
