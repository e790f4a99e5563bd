"""Replay files: what they say, what is refused, and that the engine evicts what a recording says and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2sf.engine.kernels import attend
from a2sf.engine.replay import Recorded, Replay, of_traces, read, write
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Options, Segments
from a2sf.engine.trace import Trace, steps_of
from a2sf.errors import ConfigError, UserError
from a2sf.policies.base import Retention
from a2sf.policies.rule import Recording, Rule

PROMPT, TEXT = [5, 6, 7, 8], [9, 10, 11]  # six tokens are read
CUTS = [
    {"step": 3, "kept": [0, 2, 3]},
    {"step": 5, "layer": 1, "head": 0, "kept": [0, 5]},
    {"step": 4, "layer": 1, "head": 0, "kept": [0, 3, 4]},
]


def body(**more: Any) -> dict[str, Any]:
    names = ("prompt", "text", "cuts", "evicted_at", "loglikelihoods")
    document = {"task": "t", "document": 4, "prompt": PROMPT, "text": TEXT, "cuts": CUTS}
    document |= {k: more.pop(k) for k in names if k in more}
    document = {k: v for k, v in document.items() if v is not None}
    made = {"format": "kv-replay", "version": 1, "model": "m", "layers": 2, "kv_heads": 2, "system": "other"}
    return made | {"documents": [document]} | more


def of(tmp_path: Path, content: Any) -> Replay:
    file = tmp_path / "r.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read(file)


def test_cuts_say_when_each_position_was_evicted(tmp_path):
    (document,) = of(tmp_path, body()).documents
    common = [6, 3, 6, 6, 6, 6]
    assert document.evicted_at.tolist() == [[common, common], [[6, 3, 4, 5, 5, 6], common]]
    assert document.read == (5, 6, 7, 8, 9, 10)
    assert document.cached()[1, 0].tolist() == [1, 2, 3, 3, 3, 2]
    assert document.cached()[0, 1].tolist() == [1, 2, 3, 3, 4, 5]


def test_a_file_gives_back_what_was_written(tmp_path):
    first = of(tmp_path, body(loglikelihoods=[-1, -2.5, -0.25]))
    write(tmp_path / "again.json", first)
    second = read(tmp_path / "again.json")
    (a,), (b,) = first.documents, second.documents
    assert np.array_equal(a.evicted_at, b.evicted_at)
    assert (a.prompt, a.text, a.task, a.document, a.loglikelihoods) == (b.prompt, b.text, "t", 4, (-1, -2.5, -0.25))
    assert (second.model, second.layers, second.kv_heads, second.system) == ("m", 2, 2, "other")


LONG = [[[0] * 7] * 2] * 2
STEPS = [[[9] * 6] * 2] * 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "file=.*: it is no JSON"),
        ("[]", 'file=.*"format": "kv-replay"'),
        (body(version=2), "version=2 is not allowed: this version of a2sf reads version 1"),
        (body(layers=0), "layers=0 is not allowed: give a whole number at least 1"),
        (body(kv_heads=True), "kv_heads=True"),
        (body(budget=3), r"budget=3 is not allowed: there are only the keys format, version"),
        (body(documents=[]), "documents=list is not allowed: give a list of at least one text"),
        (body(prompt=[]), r"documents\[0\].prompt=list is not allowed: give a list of at least one token"),
        (body(text=[-1]), r"documents\[0\].text=list"),
        (body(cuts=None), r"documents\[0\]=neither is not allowed: give either cuts or evicted_at"),
        (body(evicted_at=STEPS), r"documents\[0\]=cuts and evicted_at"),
        (body(more="long " * 30), "more=(long ){8}… is not allowed"),
        (body(loglikelihoods=[-1.0]), r"loglikelihoods=1 numbers is not allowed: .* each of the text's 3 tokens"),
        (body(loglikelihoods="none"), r"loglikelihoods=none is not allowed: .* each of the text's 3 tokens"),
        (
            body(loglikelihoods=[-1.0, 5.0, 0.0]),
            r"loglikelihoods\[1\]=5.0 is not allowed: .* finite number of at most 0",
        ),
        (body(loglikelihoods=[-1.0, 0.0, "x"]), r"loglikelihoods\[2\]=x is not allowed"),
        (body(cuts=[{"step": 7, "kept": []}]), r"cuts\[0\].step=7 .* from 0 to 6: the text ends with token 6"),
        (body(cuts=[{"step": 1, "layer": 2, "kept": []}]), r"layer=2 .* from 0 to 1: the model of this file has 2"),
        (body(cuts=[{"step": 1, "head": 2, "kept": []}]), r"head=2 .* the model of this file has 2"),
        (body(cuts=[{"step": 3, "kept": [0, 4]}]), r"kept=4 is not allowed: step 3 cannot retain a later position"),
        (body(cuts=[{"step": 3, "kept": [0, 9]}]), r"kept=9 is not allowed: positions are from 0 to 6"),
        (body(cuts=[{"step": 3, "kept": [-1]}]), r"kept=-1 is not allowed: positions are from 0 to 6"),
        (body(cuts=[{"step": 3, "kept": [2, 0, 2]}]), r"kept=2 is not allowed: each position is retained once"),
        (body(cuts=[{"step": 3, "kept": "all"}]), r"kept=str is not allowed: give a list of positions"),
        (
            body(cuts=[{"step": 2, "kept": [0]}, {"step": 3, "kept": [0, 1, 3]}]),
            r"cuts\[1\].kept=1 is not allowed: it comes back at step 3, after step 2 evicted it; 3 positions are "
            "retained and 2 are cached",
        ),
        (
            body(cuts=[{"step": 2, "kept": [0]}, {"step": 2, "layer": 1, "head": 1, "kept": [0]}]),
            r"step=2 is not allowed: another cut of layer 1, KV head 1 has this step",
        ),
        (
            body(cuts=None, evicted_at=[[[9] * 6]]),
            r"shape \[1, 1, 6\] .* each of 2 layers, 2 KV heads and the 6 tokens",
        ),
        (body(cuts=None, evicted_at=[[[0.5] * 6] * 2] * 2), "evicted_at=a list of shape"),
        (body(cuts=None, evicted_at=LONG), r"evicted_at\[0\]\[0\]\[1\]=0 .* position 1 is not cached before step 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, content, says):
    with pytest.raises(ConfigError) as raised:
        of(tmp_path, content)
    assert re.search(says, str(raised.value))
    assert "\n" not in str(raised.value)


def test_traces_of_an_earlier_version_have_no_tokens():
    steps, mass = np.full((1, 1, 3), 3, np.int32), np.zeros((1, 1, 3), np.float32)
    new = Trace(7, ("a", "b", "c"), 2, steps, mass, mass, np.array([4, 5, 6, 7]))
    about = {"task": "t", "model": "m", "weights": "w", "system": "s"}
    (document,) = of_traces([new], **about).documents
    assert (document.prompt, document.text, document.document) == ((4, 5), (6, 7), 7)
    with pytest.raises(UserError, match="earlier version, which stored no tokens"):
        of_traces([Trace(7, ("a", "b", "c"), 2, steps, mass, mass)], **about)
    with pytest.raises(UserError, match="no trace"):
        of_traces([], **about)


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 30), backend=st.sampled_from(["reference", "torch", "auto"]))
def test_the_engine_evicts_what_a_recording_says(seed, tokens, backend):
    """Against attention with a mask that is made from the recording; read at once, and in two parts."""
    g = torch.Generator().manual_seed(seed)
    K, G, D = 2, 2, 8
    q = torch.randn(1, K * G, tokens, D, generator=g)
    k, v = torch.randn(2, 1, K, tokens, D, generator=g)
    at = torch.arange(tokens)
    steps = at + torch.randint(0, tokens + 1, (K, tokens), generator=g)
    rule = Rule(scored=False, recording=Recording(steps))
    retention = BatchRetention.of([Retention(budget=tokens, rule=rule)])
    options = Options(D**-0.5, return_state=True, trace=True)

    def run(begin: int, end: int, state: Any = None) -> Any:
        part = (x[:, :, begin:end] for x in (q, k, v))
        segments = Segments.of_rows(retention, torch.tensor([end - begin]))
        return attend(*part, segments, options, state, backend=backend)

    sees = (at <= at[:, None]) & (steps[:, None] >= at[:, None])  # [K, queries, keys]
    logits = q.unflatten(1, (K, G)) @ k[:, :, None].transpose(-1, -2) * D**-0.5
    p = logits.masked_fill(~sees[None, :, None], -torch.inf).softmax(-1)
    expected = (p @ v[:, :, None]).flatten(1, 2)
    at_once = run(0, tokens)
    torch.testing.assert_close(at_once.output, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(steps_of(at_once)[0].long(), steps.clamp(max=tokens))
    kept = [set(x[x >= 0].tolist()) for x in at_once.state.positions[0]]
    assert kept == [set(at[s >= tokens].tolist()) for s in steps]
    if tokens > 1:
        half = tokens // 2
        first = run(0, half)
        second = run(half, tokens, first.state)
        torch.testing.assert_close(torch.cat([first.output, second.output], 2), expected, atol=2e-5, rtol=1e-4)


def test_a_recording_fits_its_heads_and_tokens_alone():
    with pytest.raises(ValueError, match="a recording ranks nothing"):
        Rule(recording=Recording(torch.zeros(2, 3)))
    q = torch.randn(1, 2, 4, 8)
    wrong = ((torch.full((1, 4), 9), "has 1 key/value heads, and the layer 2"), (torch.full((2, 3), 9), "ends after 3"))
    for steps, says in wrong:
        rule = Rule(scored=False, recording=Recording(steps))
        segments = Segments.of_rows(BatchRetention.of([Retention(budget=4, rule=rule)]), torch.tensor([4]))
        with pytest.raises(ValueError, match=says):
            attend(q, q, q, segments, Options(1.0))


def test_a_recorded_text_knows_its_cache():
    document = Recorded("", 0, (1, 2), (3, 4), np.array([[[0, 2, 3]]], np.int32))
    assert document.cached().tolist() == [[[0, 1, 1]]]
