"""The memory that the cache of a generated text takes."""

from __future__ import annotations

from collections.abc import Sequence

from a2sf.policies.base import Retention
from a2sf.policies.schedule import Schedule
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
            found[key] = _peak(scorer, retention, system.schedule, len(prompt.tokens) + max(0, new - 1), cut)
    return found


def _peak(scorer: Scorer, retention: Sequence[Retention], schedule: Schedule, total: int, cut: int) -> int:
    """The bytes at the peak of `total` tokens that are read; `cut` of them come before the cut of the prompt schedule."""
    config = scorer.model.config.get_text_config()
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = scorer.kv_heads or config.num_attention_heads
    each = 2 * D * heads * scorer.model.dtype.itemsize
    return round(sum(peak_tokens(r, schedule, total, cut, heads) for r in retention) * each)
