"""An lm-eval model that looks its answers up, so that lm-eval computes its metrics from what a `Scorer` computed."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM

from a2sf.scoring.requests import keys_of
from a2sf.scoring.systems import Answer, Answers


class RecordedLM(LM):
    """Returns the recorded answers of one system; each request must have one."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers = answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(a.value, a.greedy) for a in self._recorded(requests)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [float(a.value) for a in self._recorded(requests)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [a.value for a in self._recorded(requests)]

    def _recorded(self, requests: list[Any]) -> list[Answer]:
        found = [self.answers.answer(key) for key in keys_of(requests)]
        assert None not in found, "a request was not scored"
        return [a for a in found if a is not None]
