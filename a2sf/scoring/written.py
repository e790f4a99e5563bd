"""What is stored of a generated text besides the text: its tokens, and the memory that its cache took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from a2sf.policies.base import Retention
from a2sf.policies.schedule import Schedule
from a2sf.scoring.passes.full_cache_prefix import peak_tokens
from a2sf.scoring.requests import TEXT, Requests
from a2sf.scoring.scorer import Scorer
from a2sf.scoring.systems import Answers

TOKENS, BYTES = "generated_tokens", "cache_bytes"


def described(scorer: Scorer, requests: Sequence[Requests], answers: Answers) -> dict[str, dict[str, Any]]:
    """By a request's key, columns of its document: the text's tokens as the tokenizer gives them, and `cache_bytes`."""
    found: dict[str, dict[str, Any]] = {}
    for of_kind in requests:
        for i, key in enumerate(of_kind.keys if of_kind.kind == TEXT else ()):
            answer = answers.answer(key)
            assert answer is not None
            prompt, system = of_kind.prompt(i), answers.system
            cut = of_kind.cut(i, system, len(prompt.tokens), prompt.length)
            retention = system.retention(len(prompt.tokens) + max(0, prompt.new - 1), cut, scorer.layers)
            read = len(prompt.tokens) + max(0, answer.continuation - 1)
            found[key] = {
                TOKENS: [int(t) for t in scorer.lm.tok_encode(answer.value, add_special_tokens=False)],
                BYTES: cache_bytes(scorer, retention, system.schedule, read, cut),
            }
    return found


def cache_bytes(scorer: Scorer, retention: Sequence[Retention], schedule: Schedule, total: int, prompt: int) -> int:
    """Bytes of the keys and values of one sequence's cache when it is largest, in the model's dtype.

    What is counted is what the policy retains between two steps, the same for all implementations of it; scores, positions
    and what a batch leaves unused are not counted.

    Args:
        total: tokens that are read.
        prompt: tokens before the cut of the prompt schedule.
    """
    config = scorer.model.config.get_text_config()
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = scorer.kv_heads or config.num_attention_heads
    each = 2 * D * heads * scorer.model.dtype.itemsize
    return round(sum(peak_tokens(r, schedule, total, prompt, heads) for r in retention) * each)
