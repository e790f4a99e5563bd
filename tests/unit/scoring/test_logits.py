"""Log-probabilities of targets, against torch's own of the complete row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf.scoring.passes.logits import ROWS, log_probabilities


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3 * ROWS["cpu"]),
    vocabulary=st.integers(1, 40),
    n=st.integers(0, 30),
    scale=st.sampled_from([0.0, 1.0, 40.0, 3000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_they_are_those_of_the_whole_row(seed, rows, vocabulary, n, scale, dtype):
    g = torch.Generator().manual_seed(seed)
    # whole numbers, so that many are equal and the first of the largest has to be found
    logits = (torch.randn(rows, vocabulary, generator=g) * scale).round().to(dtype)
    where, targets = (torch.randint(0, high, (n,), generator=g) for high in (rows, vocabulary))
    found, greedy = log_probabilities(logits, where, targets)
    expected = logits.double().log_softmax(-1)[where, targets]
    last_bit = float(logits.abs().max()) * 2**-23  # of a float32 as large as the logits, as their normalizer is
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-5 + last_bit)
    assert greedy.tolist() == (logits.double().argmax(-1)[where] == targets).tolist()


def test_what_is_not_finite_stays_so():
    logits = torch.zeros(4, 5)
    logits[0, 3], logits[1, 2], logits[2, 1] = torch.nan, torch.inf, -torch.inf
    where = torch.tensor([0, 1, 1, 2, 2, 3])
    found, _ = log_probabilities(logits, where, torch.tensor([0, 2, 0, 1, 0, 0]))
    assert torch.isfinite(found).tolist() == [False, False, False, False, True, True]
    assert float(found[4]) == pytest.approx(-torch.log(torch.tensor(4.0)).item())
