"""What several parity tests share."""

from __future__ import annotations

import pytest

from a2sf.scoring.lm import PrunedLM
from tests.models import shared
from tests.stand_in import Letters, StandIn


@pytest.fixture
def stand_in(monkeypatch):
    """HFLM takes the stand-in tokenizer as it is."""
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM._create_tokenizer",
        lambda self, *a, **k: setattr(self, "tokenizer", StandIn()),
    )
    monkeypatch.setattr("lm_eval.models.huggingface.configure_pad_token", lambda tokenizer, **_: tokenizer)


@pytest.fixture
def lm(stand_in):
    """A random LLaMA whose tokens are letters; other modules have an `lm` of their own."""
    made = PrunedLM(shared("llama"), tokenizer=Letters(), max_length=200)
    made.tokenizer = Letters()
    return made
