"""A model that accelerate spreads over devices scores and generates as it does on one; here the devices are CPU and disk."""

from __future__ import annotations

import json

import pytest
import torch
from lm_eval.api.instance import Instance

from a2sf import A2SF, Budget, PrunedCache, Schedule, pruning
from a2sf.errors import ConfigError, UserError
from a2sf.hf import devices
from a2sf.hf.loading import ModelSpec, load
from a2sf.scoring.lm import PrunedLM
from a2sf.sweep.cell import Cell
from a2sf.tasks.spec import DataSpec
from baselines.h2o import H2O
from tests.hub.build import write_model

GPU = torch.cuda.is_available()
# of three layers the first and the last wait on the disk, as do both ends of the model
LAYERS = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
SOME = {"model.embed_tokens": "disk", **LAYERS, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
ON_GPU = {**SOME, "model.embed_tokens": 0, "model.layers.0": 0, "model.norm": 0, "model.rotary_emb": 0}
POLICIES = [
    (A2SF(forgetting_factor=0.5), Budget(ratio=0.3), None),
    (H2O(), Budget(tokens=6), Schedule("prompt")),
    (H2O(), Budget(ratio=(0.2, 0.5, 0.3)), Schedule("every", every=4)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture(scope="module", params=["tied", "bin"] + ["gpu"] * GPU)
def pair(request, tmp_path_factory):
    """A model as it is, and spread; in safetensors with tied ends, and in a pickle whose weights are stored once more.

    On a machine with a GPU it computes there once, too, with parts on the GPU, in the CPU's memory and on the disk.
    """
    root = tmp_path_factory.mktemp(request.param)
    weights = "bin" if request.param == "bin" else "safetensors"
    folder = write_model(root / "model", weights=weights, tie_word_embeddings=request.param == "tied")
    (root / "map.json").write_text(json.dumps(ON_GPU if request.param == "gpu" else SOME))
    plain = ModelSpec(str(folder), dtype="float32", device="cuda" if request.param == "gpu" else "cpu")
    return load(plain), load(ModelSpec(str(folder), dtype="float32", device_map=str(root / "map.json")))


def test_it_waits_on_the_disk(pair):
    plain, spread = pair
    gpu = plain.model.device.type == "cuda"
    assert gpu or spread.model.device.type == "meta"
    assert devices.input_device(spread.model) == torch.device("cuda:0" if gpu else "cpu")
    assert devices.devices_of(spread.model) == [*["0"] * gpu, "cpu", "disk"]


def test_scores_are_the_same(pair):
    texts = [
        ("The quick brown fox jumps over", " the lazy dog and runs"),
        ("The quick brown fox", " sleeps under a tree"),
    ]
    requests = [Instance("loglikelihood", {}, arguments=t, idx=0, doc_id=0, task_name="t") for t in texts]
    lms = [PrunedLM(loaded.model, tokenizer=loaded.tokenizer) for loaded in pair]
    assert lms[1].device.type == lms[0].device.type
    for policy, budget, schedule in POLICIES:
        answers = []
        for lm in lms:
            lm.use(policy, budget, schedule)
            answers.append(lm.loglikelihood(requests, disable_tqdm=True))
        assert answers[0] == answers[1]


def test_generated_text_and_what_is_kept_are_the_same(pair):
    ids = torch.randint(3, 900, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids, mask = (x.to(devices.input_device(pair[0].model)) for x in (ids, mask))
    for policy, budget, schedule in POLICIES:
        budget = Budget(ratio=budget.ratio, base="context") if budget.ratio else budget
        texts, kept = [], []
        for loaded in pair:
            cache = PrunedCache(loaded.model, policy, budget, schedule=schedule)
            settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            texts.append(loaded.model.generate(ids, attention_mask=mask, cache=cache, **settings))
            kept.append([cache.state(layer).positions for layer in range(3)])
        assert torch.equal(*texts)
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    logits = []
    for loaded in pair:
        with pruning(loaded.model, H2O(), Budget(tokens=5)), torch.no_grad():
            logits.append(loaded.model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
    assert torch.equal(*logits)


def test_lm_eval_generates_with_it(pair):
    arguments = ("The quick brown fox", {"until": ["\n"], "max_gen_toks": 5})
    texts = []
    for loaded in pair:
        lm = PrunedLM(loaded.model, H2O(), Budget(tokens=4), tokenizer=loaded.tokenizer)
        request = Instance("generate_until", {}, arguments=arguments, idx=0, doc_id=0, task_name="t")
        texts.append(lm.generate_until([request], disable_tqdm=True))
    assert texts[0] == texts[1] != [""]


def test_a_name_chooses_the_devices_and_a_cell_is_the_same(folder):
    specs = [ModelSpec(str(folder)), ModelSpec(str(folder), device_map="auto")]
    assert load(specs[1]).model.device.type == specs[1].resolved_device.partition(":")[0]
    cells = [Cell("m", s, H2O(), Budget(ratio=0.2), "copa", 0, 1, 0, DataSpec(source="bundle")) for s in specs]
    assert cells[0].id == cells[1].id
    assert PrunedLM(str(folder), policy="full", device_map="auto").device.type == specs[0].resolved_device


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("autoo", ["device_map=autoo", "balanced", "did you mean auto"]),
        ({"model.embed": 0}, ["model.device_map=", "names GPU 0", "this machine has 0"]),
        ({"": "cuda:3"}, ["names GPU 3"]),
        ({"": "gpu"}, ["is on 'gpu'", "cpu, disk"]),
        ({}, ["must be an object"]),
        (None, ["No such file"]),
        ("{", ["cannot be used"]),
        ({"model.layers": "disk"}, ["does not give any device", "embed_tokens"]),
        ({"": "cpu", "lm_head": "disk"}, ["the whole model holds lm_head"]),
        ({"model.layers": "cpu", "model.layers.1": "disk"}, ["model.layers holds model.layers.1"]),
        ({**SOME, "model.layers.7": "disk"}, ["LlamaForCausalLM has no part model.layers.7"]),
    ],
    ids=str,
)
def test_a_map_that_cannot_be_is_one_sentence(content, parts, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    file = tmp_path / "map.json"
    if content is not None and content != "autoo":
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as raised:
        load(ModelSpec(str(folder), device_map="autoo" if content == "autoo" else str(file)))
    assert "\n" not in str(raised.value)
    for part in ["model.device_map=", *parts]:
        assert part in str(raised.value)


def test_a_map_and_a_device_that_differ_are_refused(tmp_path):
    (tmp_path / "map.json").write_text('{"": "disk"}')
    for device, of_map in (("cuda", str(tmp_path / "map.json")), ("cuda:0", "auto")):
        with pytest.raises(ConfigError, match=f"model.device={device} .*leave model.device at auto"):
            ModelSpec("owner/name", device=device, device_map=of_map)
