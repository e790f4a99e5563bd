"""Several answers of each document: avg@k, pass@k, maj@k and the part of the error that comes from drawing."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf.errors import ConfigError
from a2sf.sweep.samples import chosen_most_often, of_draws, pass_at, sizes
from a2sf.tasks.prompting import Prompting
from tests.tiers import examples


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_j_is_the_share_of_all_choices_of_j_answers_with_a_right_one(right, data):
    j = data.draw(st.integers(1, len(right)))
    chosen = list(combinations(right, j))
    assert pass_at(np.array([right], float), j)[0] == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_the_first_of_the_answers_that_come_most_often():
    assert chosen_most_often(["a", "b", "c", "b", "a"]) == 0
    assert chosen_most_often(["c", "b", "b"]) == 1
    assert sizes(1) == [1]
    assert sizes(4) == [1, 2, 4]
    assert sizes(6) == [1, 2, 4, 6]


def drawn(values, extracted, filtered="get"):
    """Documents of each draw, what was found in their answers, and lm-eval's metrics."""
    name = f"exact_match,{filtered}"
    frames = [pd.DataFrame({"doc_id": [0, 1, 2], f"metric/{name}": v, "metric/other": [1.0, 2.0, 4.0]}) for v in values]
    found = [{filtered: dict(enumerate(e))} for e in extracted]
    plain = {"stderr": None, "n": 3, "higher_is_better": True}
    metrics = [{name: {"value": float(np.mean(v)), **plain}, "other": {"value": 77.0, **plain}} for v in values]
    return frames, found, metrics


def test_metrics_of_four_answers():
    values = [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    extracted = [["x", "y", "u"], ["x", "y", "v"], ["z", "w", "v"], ["x", "y", "u"]]
    frames, found, metrics = drawn(values, extracted)
    documents, made = of_draws(frames[0], frames, found, metrics)
    means = np.array([0.75, 0.0, 0.5])
    assert list(documents["metric/exact_match,get"]) == list(means)
    assert [list(v) for v in documents["draws/metric/exact_match,get"]] == np.array(values).T.tolist()
    assert made["exact_match,get"]["value"] == made["exact_match:avg@4,get"]["value"] == pytest.approx(means.mean())
    assert made["exact_match,get"]["stderr"] == pytest.approx(means.std(ddof=1) / math.sqrt(3))
    within = np.array(values).var(axis=0, ddof=1)
    assert made["exact_match,get"]["stderr_draws"] == pytest.approx(math.sqrt((within / 4).sum() / 9))
    assert made["exact_match:pass@1,get"]["value"] == pytest.approx(means.mean())
    assert made["exact_match:pass@4,get"]["value"] == pytest.approx(2 / 3)
    assert made["exact_match:pass@2,get"]["value"] == pytest.approx((1 + 0 + 5 / 6) / 3)
    assert list(documents["metric/exact_match:maj@4,get"]) == [1.0, 0.0, 0.0]  # u came before v, as often
    assert made["other"] == {"value": 77.0, "stderr": None, "n": 3, "higher_is_better": True}  # no mean over documents


def test_the_variance_of_draws_is_what_repeating_the_draws_shows():
    rng = np.random.default_rng(0)
    p, k, n = rng.uniform(0, 1, 60), 4, 60
    means, parts = [], []
    for _ in range(400):
        values = (rng.uniform(size=(k, n)) < p).astype(float)
        means.append(values.mean())
        frame = [pd.DataFrame({"doc_id": range(n), "metric/m": v}) for v in values]
        metrics = [{"m": {"value": v.mean(), "stderr": 0.0, "n": n, "higher_is_better": True}} for v in values]
        _, made = of_draws(frame[0], frame, [{}] * k, metrics)
        parts.append(made["m"]["stderr_draws"] ** 2)
    assert np.mean(parts) == pytest.approx(np.var(means, ddof=1), rel=0.2)


@pytest.mark.parametrize(
    ("prompting", "of_task", "repeats", "why"),
    [
        (Prompting(samples=4), {"do_sample": False}, 1, r"samples=4 .* all answers would be equal; give a temperature"),
        (Prompting(samples=4), {}, 1, "samples=4 .* all answers would be equal"),
        (Prompting(gen_kwargs='{"temperature": 0.6}'), {}, 1, r"gen_kwargs\.temperature=0\.6 .*; give samples=k too"),
        (Prompting(gen_kwargs='{"do_sample": true}'), {}, None, r"gen_kwargs\.do_sample=True .*; give samples=k too"),
        (Prompting(samples=4), {"temperature": 1.0}, 8, "samples=4 .* itself requests 8 answers"),
    ],
)
def test_a_number_of_answers_that_does_not_fit_is_refused(prompting, of_task, repeats, why):
    with pytest.raises(ConfigError, match=why):
        prompting.check_samples("sums", of_task, repeats)


@pytest.mark.parametrize("k", [0, -3])
def test_less_than_one_answer_is_refused(k):
    with pytest.raises(ConfigError, match=f"samples={k} is not allowed: give the number of answers"):
        Prompting(samples=k)


def test_what_fits_is_taken():
    Prompting(samples=1).check_samples("sums", {"do_sample": False})
    Prompting(samples=4).check_samples("sums", {"temperature": 0.7})
    Prompting(samples=4, gen_kwargs='{"temperature": 0.6}').check_samples("sums", {})
    Prompting().check_samples("sums", {"temperature": 0.7, "do_sample": True}, 1)  # the task's own
    assert Prompting(samples=4, think_end_token="x").of(False, 0) == Prompting()
