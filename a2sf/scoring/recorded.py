"""An lm-eval model that looks its answers up, so that lm-eval computes its metrics from what a `Scorer` computed."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM

from a2sf.scoring.requests import key_of_draw, keys_of, value_of
from a2sf.scoring.systems import Answer, Answers


class RecordedLM(LM):
    """Returns the recorded answers of one system; each request must have one.

    Args:
        draw: which of several answers of a document, counted from 0.
    """

    def __init__(self, answers: Answers, draw: int = 0) -> None:
        super().__init__()
        self.answers, self.draw = answers, draw

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(a.value, a.greedy) for a in self._recorded(requests)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [float(a.value) for a in self._recorded(requests)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return [value_of(r.args, a) for r, a in zip(requests, self._recorded(requests), strict=True)]

    def _recorded(self, requests: list[Any]) -> list[Answer]:
        found = [self.answers.answer(key_of_draw(key, self.draw)) for key in keys_of(requests)]
        assert None not in found, "a request was not scored"
        return [a for a in found if a is not None]
