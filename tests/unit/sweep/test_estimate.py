"""How many tokens a group will compute: of documents of unequal lengths, and of fewer than were requested."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from a2sf.hf.loading import ModelSpec, load_tokenizer
from a2sf.policies.find import find_policies
from a2sf.sweep.cell import Cell
from a2sf.sweep.planning import rate
from a2sf.sweep.planning.estimate import (
    Measurements,
    WorkEstimate,
    _documents_key,
    _known_lengths,
    _tokens_to_compute,
    estimate,
)
from a2sf.sweep.planning.table import headline
from a2sf.tasks import spec as tasks
from a2sf.tasks.prompting import Prompting
from tests.conftest import SMOLLM2

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def full(limit: int, prompting: Prompting | None = None, shots: int = 0) -> list[Cell]:
    spec, data = ModelSpec(SMOLLM2, device="cpu"), tasks.DataSpec(source="bundle")
    prompting = (prompting or Prompting()).of(False, shots)
    return [Cell("small", spec, find_policies()["full"](), None, "copa", shots, limit, 1, data, prompting=prompting)]


def finished(cell: Cell, n: int, context: int, continuation: int = 3, model: str = "small") -> Any:
    """What `Measurements` reads of a cell with documents of one choice each."""
    known = {"model": model, "dtype": "float32", "task": "copa", "shots": cell.shots, "limit": cell.limit}
    lengths = {"context_tokens": [[context]] * n, "continuation_tokens": [[continuation]] * n}
    return SimpleNamespace(
        cell=known | {"identity": cell.identity},
        result={"documents": {"n": n}, "timing": {"computed_tokens": 10, "seconds": 1.0, "reused_requests": 0}},
        documents=pd.DataFrame(lengths),
    )


def test_a_few_long_documents_count_for_what_they_are():
    lengths = [[(10, 3), (10, 4)]] * 90 + [[(500, 3), (500, 4)]] * 10
    exact = sum(c + 2 + 3 for (c, _), _ in lengths)  # a context once, all tokens but the last of each choice
    assert _tokens_to_compute(full(100), lengths) == pytest.approx(exact, rel=0.05)
    assert _tokens_to_compute(full(50), lengths) == pytest.approx(exact / 2, rel=0.05)


def test_a_task_has_no_more_documents_than_a_cell_found():
    lengths = [[(10, 3)]] * 6
    cells = full(200)
    measured, identity = Measurements(), cells[0].identity
    for limit, n in ((4, 4), (100, 6)):
        measured._add(finished(replace(cells[0], limit=limit), n, 10), {("copa", 0)})
    assert list(measured.sizes.values()) == [6]
    assert measured.sizes.get(_documents_key(identity)) == 6
    assert measured.sizes.get(_documents_key(identity | {"data": {"content": "others"}})) is None
    assert _tokens_to_compute(cells, lengths, 6) == _tokens_to_compute(full(6), lengths) == 6 * 12


def test_a_template_counts_and_lengths_are_those_of_equal_prompting():
    chat = Prompting(chat_template=True)
    tokenizer = load_tokenizer(ModelSpec(SMOLLM2))
    head, tail = chat.tokens_around(tokenizer)
    with_shots, turns = chat.tokens_around(tokenizer, shots=1)
    assert with_shots == head > 3
    assert tail < turns < head + 2 * tail + 10  # the system's message comes once

    def tokens(*stored: tuple[Prompting | None, int], shots: int = 0, prompting: Prompting | None = chat) -> float:
        (cell,) = full(12, prompting, shots)
        measured = Measurements()
        for other, context in stored:
            measured._add(finished(full(12, other, shots)[0], 12, context), {("copa", shots)})
        return (_tokens_to_compute([cell], _known_lengths(cell, measured)[0], 12) or 0) / 12

    shared = 11 / 12 * head  # read once for twelve
    assert tokens((chat, 99)) == pytest.approx(99 + 2 - shared)
    assert tokens((None, 10), (chat, 99)) == pytest.approx(99 + 2 - shared)
    assert tokens((None, 10)) == pytest.approx(10 + head + tail + 2 - shared)
    assert tokens((None, 10), shots=1) == pytest.approx(10 + head + turns + 2 - shared)
    assert tokens((chat, 99), (None, 10), prompting=None) == 10 + 2
    plain = tokens(prompting=None)  # by characters
    assert tokens((chat, 99), prompting=None) == plain
    assert tokens() == pytest.approx(plain + head + tail - shared, rel=0.1)


def test_another_models_template_is_taken_last():
    chat = Prompting(chat_template=True)
    (cell,) = full(12, chat)
    measured = Measurements()
    measured._add(finished(full(12, chat)[0], 12, 99, model="other"), {("copa", 0)})
    assert _known_lengths(cell, measured) == ([[(99, 3)]] * 12, False)
    for model, own in (("another", False), ("small", True)):
        measured._add(finished(full(12)[0], 12, 10, model=model), {("copa", 0)})
        lengths, found = _known_lengths(cell, measured)
        assert 10 < lengths[0][0][0] < 99
        assert found is own


def test_a_model_that_never_ran_here_is_tried_for_a_moment(tmp_path, monkeypatch):
    """The first plan says how long it takes, without weights: by products of the sizes that the config tells."""
    tried = []
    monkeypatch.setattr(
        rate, "_product", lambda size, dtype, device, rows: tried.append(size) or 1e-6 * size[0] * size[1]
    )
    rate.seconds_per_row.cache_clear()
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "model")  # nothing else is there
    spec = ModelSpec(path=str(tmp_path / "model"), dtype="float32", device="cpu")
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)  # of two layers; neither embeddings nor the head
    assert rate.seconds_per_token(spec) == pytest.approx(rate.OVERHEAD * 1e-6 * matrices / rate.TOKENS)
    assert rate.seconds_per_token(spec)
    assert len(tried) == len(set(tried)) == 4
    rate.seconds_per_row.cache_clear()


def test_nothing_is_reported_of_a_model_that_is_not_here_or_whose_tokens_meet_some_matrices(tmp_path):
    assert rate.seconds_per_token(ModelSpec(path="owner/nowhere", revision="a" * 40, device="cpu")) is None
    experts = MixtralConfig(**SIZES, num_local_experts=4)
    assert not rate.matrices(experts)


def test_a_trial_takes_a_moment_and_is_the_shortest_product_in_it(monkeypatch):
    """By a clock on which three products take 30, 10 and 80 milliseconds."""
    clock = iter([0, 0, 0.03, 0.03, 0.03, 0.04, 0.04, 0.04, 0.12, 0.12])
    monkeypatch.setattr(rate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert rate._product((48, 32), torch.float32, torch.device("cpu"), 8) == pytest.approx(0.01)
    assert list(clock) == []


def test_a_plan_says_what_was_tried_and_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("a2sf.sweep.planning.estimate.seconds_per_token", lambda model: 0.5)
    group = full(4)
    monkeypatch.setattr("a2sf.sweep.planning.estimate._tokens_to_compute", lambda *_: 100.0)
    assert estimate([group], tmp_path) == [WorkEstimate(100.0)]
    assert estimate([group], tmp_path, trial=True) == [WorkEstimate(100.0, 50.0, by_trial=True)]


def test_a_task_that_generates_costs_at_most_its_limit_of_tokens(tmp_path, monkeypatch):
    """Without a finished cell: documents times the tokens that a text may have, at the speed of a decoding pass."""
    monkeypatch.setattr("a2sf.sweep.planning.estimate.seconds_per_row", lambda model, rows: 0.25)
    (cell,) = full(6)
    needle = replace(cell, task="needle", shots=0)
    (by_default,) = estimate([[needle, needle]], tmp_path, trial=True)
    new = needle.spec.definition.config["generation_kwargs"]["max_gen_toks"]
    assert by_default == WorkEstimate(2 * 6 * new, 2 * 6 * new * 0.25, by_trial=True, at_most=True)
    limited = replace(needle, prompting=Prompting(gen_kwargs='{"max_gen_toks": 7}'))
    assert estimate([[limited]], tmp_path, trial=True)[0].tokens == 6 * 7
    assert estimate([[needle]], tmp_path) == [WorkEstimate()]  # where nothing is tried, nothing is said
    line = headline(SimpleNamespace(cells=[needle], done=(), pending=[needle]), [[needle]], [by_default], tmp_path)
    assert line.endswith("where text is generated, if all texts reach their limit of tokens")
