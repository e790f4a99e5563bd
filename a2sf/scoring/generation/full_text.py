"""How likely the full cache's own texts are under a pruned cache, each read once with the text given (teacher forcing).

A generated text says little about how far a pruned cache is from the full one: after the first token that differs the two
write about different things. Here all systems read the same text, token by token what the full cache wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from a2sf.hf.exactness import require_exact
from a2sf.scoring.passes.run import Pending
from a2sf.scoring.requests import Requests
from a2sf.scoring.scorer import Scorer
from a2sf.scoring.systems import Answers, System

Found = dict[str, tuple[float, int]]
"""By a request's key: the log-likelihood of the full cache's text, in nats, and its tokens."""


def full_texts(
    scorer: Scorer, requests: Requests, texts: Mapping[str, Sequence[int]], systems: Sequence[System]
) -> list[Found | Exception]:
    """The log-likelihoods of the full cache's texts under each of some systems, or why a system cannot compute them.

    Args:
        requests: those that generate text.
        texts: by a request's key, the tokens that the full cache wrote; empty ones, and those that do not fit the model's
            positions after their prompt, are left out.
    """
    require_exact(scorer.model)
    answers = [scorer.answers(system) for system in systems]
    pending = [p for one in answers for p in _pending(scorer, requests, texts, one)]
    found: dict[int, Found] = {id(one): {} for one in answers}
    for done in scorer.passes(pending).run(pending):
        for p, value, *_ in done.scores:
            found[id(p.answers)][requests.keys[p.request]] = value, len(p.sequence.targets)
    return [one.error or found[id(one)] for one in answers]


def _pending(scorer: Scorer, requests: Requests, texts: Mapping[str, Sequence[int]], answers: Answers) -> list[Pending]:
    """What one system reads; its budgets are those with which it generates."""
    found: list[Pending] = []
    for i, key in enumerate(requests.keys):
        text = tuple(texts.get(key, ()))
        if text and len(requests.prompt(i).tokens) + len(text) <= scorer.lm.max_length:
            found.append(Pending(answers, scorer.text_sequence(requests, i, text, answers.system), i))
    return found
