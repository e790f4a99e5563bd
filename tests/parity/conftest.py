"""What several parity tests share."""

from __future__ import annotations

import pytest

from tests.stand_in import StandIn


@pytest.fixture
def stand_in(monkeypatch):
    """HFLM takes the stand-in tokenizer as it is."""
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM._create_tokenizer",
        lambda self, *a, **k: setattr(self, "tokenizer", StandIn()),
    )
    monkeypatch.setattr("lm_eval.models.huggingface.configure_pad_token", lambda tokenizer, **_: tokenizer)
