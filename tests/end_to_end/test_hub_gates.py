"""Trained gates of the hub, over loopback: at a known commit, refused in one sentence, fetched before the first cell."""

from __future__ import annotations

import json
import os
import re
from functools import partial

import pytest
import torch

from a2sf.store.runs import load_sweep
from tests.gates import random_gates, write_gates
from tests.hub import cases
from tests.hub.build import write_model
from tests.hub.server import Hub
from tests.hub.store import Store
from tests.models import LLAMA_LIKE
from tests.started import called

SIZES = (LLAMA_LIKE["num_hidden_layers"], LLAMA_LIKE["num_key_value_heads"], LLAMA_LIKE["hidden_size"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A hub with gates of two commits, and what calls a function with an empty cache that knows of it."""
    root = tmp_path_factory.mktemp("hub")
    with Hub(Store(root / "store")) as hub:
        repository = hub.store.model("org/KVzap-mlp")
        first = repository.commit_folder(write_gates(root / "first", random_gates(*SIZES, inner=8)))
        second = repository.commit_folder(write_gates(root / "second", random_gates(*SIZES, inner=8, seed=1)))
        hub.store.model("org/wide").commit_folder(write_gates(root / "wide", random_gates(3, 2, 48)))
        hub.store.model("org/llama").commit_folder(write_model(root / "llama", tokens=1000))
        broken = random_gates(*SIZES) | {"layers.0.bias": torch.zeros(5)}
        hub.store.model("org/broken").commit_folder(write_gates(root / "broken", broken))
        hub.store.model("org/empty").commit({"config.json": json.dumps({"model_type": "kvzap"})})
        hub.store.model("org/sizes").commit({"config.json": '{"model_type": "kvzap"}', "model.safetensors": "x"})
        environment = {**os.environ, **hub.environment(root / "home"), "HF_HUB_ETAG_TIMEOUT": "3"}
        yield hub, partial(called, environment=environment), root, first, second


def test_gates_of_the_hub_are_at_one_commit_and_fetched_when_they_are_needed(world):
    hub, ask, _, first, second = world
    hub.requests()
    assert ask(cases.gates, "org/KVzap-mlp") == {
        "name": "org/KVzap-mlp",
        "commit": second,
        "revision": second,
    }
    assert not [r for r in hub.requests() if "model.safetensors" in r]  # config.json says the sizes
    for commit, seed in ((first, 0), (second, 1)):
        tensors = random_gates(*SIZES, inner=8, seed=seed)
        inner = torch.nn.functional.gelu(tensors["layers.0.0.weight"].sum(1) + tensors["layers.0.0.bias"])
        want = tensors["layers.0.2.weight"] @ inner + tensors["layers.0.2.bias"]
        found = ask(cases.gates, "org/KVzap-mlp", commit, fetch=True)
        assert found["commit"] == commit
        torch.testing.assert_close(torch.tensor(found["scores"])[:, 0], want)
    hub.requests()
    ask(cases.gates, "org/KVzap-mlp", first, fetch=True)
    assert hub.requests() == []  # all is in the cache


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("org/nothing", "main", r"policy\.gates=org/nothing cannot be loaded: .*no model of that name"),
        (
            "org/KVzap-mlp",
            "v9",
            r"policy\.revision=v9 cannot be loaded: org/KVzap-mlp has no such branch, tag or commit",
        ),
        ("org/llama", "main", r"policy\.gates=org/llama is not allowed: it is a model of type llama, not kvzap"),
        ("org/empty", "main", r"it holds no KVzap gates: it lacks model\.safetensors or pytorch_model\.bin"),
        ("org/sizes", "main", r"its config\.json does not state n_modules, output_dim, input_dim, hidden_dim"),
        ("org/broken", "main", r"its weights are not those of its config\.json"),
    ],
)
def test_what_is_refused_is_one_sentence(world, name, revision, said):
    _, ask, *_ = world
    message = ask(cases.gates, name, revision, fetch=True)
    assert isinstance(message, str)
    assert re.search(said, message), message
    assert len(message.splitlines()) == 1


def test_a_sweep_fetches_gates_first_and_names_their_commit(world, tmp_path):
    hub, ask, root, first, second = world
    common = [f"model.path={root / 'llama'}", "policy=kvzap", "policy.window=2", "tasks=[copa]", "data=bundle"]
    common += ["limit=2", "model.device=cpu", f"runs_dir={tmp_path}", "budget.ratio=0.5"]
    hub.requests()
    wide = ask(cases.evaluate, *common, "policy.gates=org/wide")
    assert wide.code == 1
    assert "policy.gates=org/wide is not allowed: they read hidden states of 48 numbers" in wide.err
    assert len(wide.err.strip().splitlines()) == 1
    assert not [r for r in hub.requests() if "model.safetensors" in r]
    for revision in (first, "main"):
        done = ask(cases.evaluate, *common, "policy.gates=org/KVzap-mlp", f"policy.revision={revision}")
        assert done.code == 0, done.err
    for more in ("policy.threshold=0", "policy.equal_slots=true"):
        done = ask(cases.evaluate, *common, "policy.gates=org/KVzap-mlp", more)
        assert done.code == 0, done.err
    cells = load_sweep(tmp_path / "single")
    commits = [c.cell["identity"]["policy_settings"]["gates"]["commit"] for c in cells]
    assert sorted(commits) == sorted([first, second, second, second])
    assert len({c.cell["id"] for c in cells}) == 4
    again = ask(cases.evaluate, *common, "policy.gates=org/KVzap-mlp", f"policy.revision={first}")
    assert "1 done, 0 to run" in again.out
    null = ask(cases.evaluate, *common)
    assert null.code == 1
    assert "policy.gates=None is not allowed: give a folder or file" in null.err
