"""The memory that the cache of a generated text takes."""

from __future__ import annotations

from collections.abc import Sequence

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
                held = sum(peak_tokens(r, system.schedule, total, cut, _heads(scorer)) for r in retention)
            else:  # a threshold decides: what was counted, with what may have waited to be evicted
                at_end = min(total, answer.cached[0] + system.schedule.spare)
                held = len(retention) * max(at_end, min(cut, total) if system.schedule.prompt else 0)
            found[key] = round(held * _bytes(scorer))
    return found


def _heads(scorer: Scorer) -> int:
    """KV heads of a layer."""
    heads: int = scorer.kv_heads or scorer.model.config.get_text_config().num_attention_heads
    return heads


def _bytes(scorer: Scorer) -> int:
    """Bytes of a token's keys and values in one layer."""
    config = scorer.model.config.get_text_config()
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * D * _heads(scorer) * scorer.model.dtype.itemsize
