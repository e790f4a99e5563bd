"""Retrieval heads: what counts as copied, and that the list is one that the policy reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from a2sf import make_policy
from a2sf.calibration import retrieval
from a2sf.calibration.capture import Captured
from a2sf.calibration.retrieval import Needle
from a2sf.commands.policy import heads
from a2sf.engine.state import Options
from a2sf.errors import UserError
from tests.hub.build import write_model
from tests.models import small

IDS = (9, 5, 6, 7, 1, 2, 5, 6, 7)
NEEDLE = Needle(IDS, (1, 2, 3), (6, 7, 8))


def looking_at(places: list[int]) -> Captured:
    """A layer of two query heads and one KV head: as each token of the answer is due, head 0 looks at its place of these."""
    T = len(IDS)
    key = torch.eye(T)[None, None]
    query = torch.zeros(1, 2, T, T)
    for token, place in zip(NEEDLE.answer, places, strict=True):
        query[0, 0, token - 1, place] = 5.0
    query[0, 1] = -torch.eye(T)[torch.arange(T)]  # head 1 looks anywhere but at itself
    value = torch.zeros(1, 1, T, T)
    return Captured(0, query, key, value, Options(1.0), torch.zeros(1, 2, T, T))


@pytest.mark.parametrize(
    ("places", "copied"),
    [
        ([1, 2, 3], [True, True, True]),
        ([1, 3, 2], [True, False, False]),  # in the needle, but another token
        ([0, 2, 6], [False, True, False]),  # elsewhere; the same token, but not in the needle
    ],
)
def test_a_token_is_copied_where_the_strongest_attention_lies_on_it(places, copied):
    assert retrieval.copied(looking_at(places), NEEDLE)[0].tolist() == copied


def test_a_place_that_is_later_is_not_looked_at():
    layer = looking_at([1, 2, 8])
    assert retrieval.copied(layer, Needle(IDS, (6, 7, 8), (6, 7, 8)))[0].tolist()[2] is False


def test_scores_are_those_of_the_models_own_attention():
    """The oracle: transformers' eager attention, the argmax of its weights."""
    model = small("llama")
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 12, (40,), generator=g)
    ids[30:34] = ids[5:9]
    needle = Needle(tuple(ids.tolist()), (5, 6, 7, 8), (30, 31, 32, 33))
    found = retrieval.scores(model, [needle, needle])
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model(ids[None], output_attentions=True).attentions
    for number, weight in enumerate(weights):
        at = weight[0, :, 29:33].argmax(-1)
        hit = (at >= 5) & (at < 9) & (ids[at] == ids[30:34])
        assert found[number].tolist() == pytest.approx(hit.double().mean(1).tolist())


def test_needles_say_where_the_code_is():
    from a2sf.hf.loading import ModelSpec, load_tokenizer
    from tests.conftest import SMOLLM2

    tokenizer = load_tokenizer(ModelSpec(SMOLLM2))
    found = retrieval.needles(tokenizer, 4, (40, 80), seed=1)
    assert len(found) == 4
    for needle in found:
        code = tokenizer.decode([needle.ids[i] for i in needle.needle]).strip()
        assert code == tokenizer.decode([needle.ids[i] for i in needle.answer]).strip()
        assert len(code) == 5
        assert code.isdecimal()
        assert needle.answer[-1] == len(needle.ids) - 1
        assert needle.needle[-1] < needle.answer[0] - 10
    assert [n.ids for n in found] == [n.ids for n in retrieval.needles(tokenizer, 4, (40, 80), seed=1)]


def test_the_best_heads_and_as_many_at_random():
    scores = np.array([[0.1, 0.9, 0.0, 0.3], [0.0, 0.2, 0.5, 0.4]])
    assert retrieval.of_kv_heads(scores, 2).tolist() == [[0.9, 0.3], [0.2, 0.5]]
    assert retrieval.chosen_heads(retrieval.of_kv_heads(scores, 2), 3) == [[0, 0], [1, 1], [0, 1]]
    drawn = retrieval.random_heads(5, 3, 4, seed=2)
    assert drawn == retrieval.random_heads(5, 3, 4, seed=2) != retrieval.random_heads(5, 3, 4, seed=3)
    assert len({tuple(pair) for pair in drawn}) == 4
    for choose in (lambda n: retrieval.chosen_heads(scores, n), lambda n: retrieval.random_heads(2, 4, n)):
        with pytest.raises(UserError, match="the model has 8 key/value heads"):
            choose(9)


def test_the_command_writes_lists_that_the_policy_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "tiny")
    heads.main(["--model", str(model), "--documents", "2", "--lengths", "30", "--count", "2", "--out", "h/mine.json"])
    said = capsys.readouterr().out
    for name in ("mine.json", "mine-random.json"):
        listed = json.loads(Path("h", name).read_text())
        policy = make_policy("heads", heads=f"h/{name}")
        policy.check(3, 2)
        assert [list(pair) for pair in policy.heads] == listed
        assert len(listed) == 2
        assert name in said
    assert Path("h/mine.png").stat().st_size > 1000
    assert len(Path("h/mine.csv").read_text().splitlines()) == 1 + 3 * 4
