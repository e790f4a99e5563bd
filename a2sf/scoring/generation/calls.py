"""Texts by transformers' own `generate`, batch by batch: for settings that are more than a choice of the next token (beams).

Rows of a batch are generated until all of them have ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from a2sf.engine.kernels import backends_run
from a2sf.errors import UserError
from a2sf.hf.attention import NonFiniteError, UnsupportedModel
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.scoring.generation.ends import EOS, LENGTH, STOP
from a2sf.scoring.generation.row import Row

ROWS = 8
"""Texts of a batch where `batch_size` is auto."""


def by_generate(
    lm: Any, rows: Sequence[Row], settings: dict[str, Any], make_cache: Any, most: int | None
) -> Iterator[list[Row]]:
    """Generate the texts of all rows of one system; yields those of a batch, as they are finished.

    Args:
        settings: of generation, as transformers has them.
        make_cache: an empty cache for rows.
        most: rows of a batch; None: a few.
    """
    size = most or ROWS
    for at in range(0, len(rows), size):
        batch = rows[at : at + size]
        with backends_run() as ran:
            try:
                _generate(lm, batch, settings, make_cache(batch))
            except NonFiniteError as error:
                raise NonFiniteError(error.where, error.dtype, [at + r for r in error.rows]) from error
        for row in batch:
            row.answers.ran |= ran
        yield list(batch)


def _generate(lm: Any, batch: Sequence[Row], settings: dict[str, Any], cache: PrunedCache) -> None:
    prompts = [row.sequence.read for row in batch]
    width = max(map(len, prompts))
    pad = lm.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=lm.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    most, stop = width + batch[0].limit, list(batch[0].ends.stop)
    try:
        made = lm._model_generate(context=ids, attention_mask=mask, max_length=most, stop=stop, cache=cache, **settings)
    except NonFiniteError as error:
        copies = max(1, cache.batch_size // len(batch))  # beams, or several texts of one prompt
        raise NonFiniteError(error.where, error.dtype, sorted({r // copies for r in error.rows})) from error
    if cache.seen is None:
        raise UnsupportedModel(
            f"{type(lm.model).__name__} did not use the pruned cache that generate() gave it; choose another model"
        )
    if len(made) != len(batch):
        raise UserError("several texts of one prompt (num_return_sequences) cannot be scored by lm-eval; give samples")
    full = made.shape[1] >= most
    for row, tokens in zip(batch, made[:, width:].tolist(), strict=True):
        eos = row.ends.eos
        row.tokens = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))]
        text = lm.tok_decode(row.tokens, skip_special_tokens=False)
        ended = not full or any(s in text for s in stop)
        row.finish = EOS if row.tokens[-1] in eos else STOP if ended else LENGTH
        row.answers.counts.computed += int(cache.seen.sum()) / len(batch)
