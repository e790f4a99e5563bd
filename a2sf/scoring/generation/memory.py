"""The memory that the cache of a generated text takes."""

from __future__ import annotations

from collections.abc import Sequence

from a2sf.hf.memory import ModelSizes
from a2sf.scoring.passes.full_cache_prefix import peak_tokens
from a2sf.scoring.requests import TEXT, Requests
from a2sf.scoring.scorer import Scorer
from a2sf.scoring.systems import Answers


def cache_bytes(scorer: Scorer, requests: Sequence[Requests], answers: Answers) -> dict[str, int]:
    """By a request's key: bytes of the keys and values of its cache at the peak, in the model's dtype.

    What is counted is what the policy retains between two steps, the same for all implementations of it; scores, positions
    and what a batch leaves unused are not counted.
    """
    found: dict[str, int] = {}
    sizes = ModelSizes.of(scorer.model.config)
    each = 2 * sizes.head * sizes.kv_heads * scorer.model.dtype.itemsize  # of a token in one layer
    for of_kind in requests:
        for i, key in enumerate(of_kind.keys if of_kind.kind == TEXT else ()):
            answer = answers.answer(key)
            assert answer is not None
            prompt, system = of_kind.prompt(i), answers.system
            cut = of_kind.cut(i, system, len(prompt.tokens), prompt.length)
            retention = system.retention(len(prompt.tokens) + max(0, prompt.new - 1), cut, scorer.layers)
            new = answer.continuation if answer.tokens is None else len(of_kind.after(i, answer))
            total = len(prompt.tokens) + max(0, new - 1)
            if answer.cached is None:
                held = sum(peak_tokens(r, system.schedule, total, cut, sizes.kv_heads) for r in retention)
            else:  # a threshold decides: what was counted, with what may have waited to be evicted
                at_end = min(total, answer.cached[0] + system.schedule.spare)
                held = len(retention) * max(at_end, min(cut, total) if system.schedule.prompt else 0)
            found[key] = round(held * each)
    return found
