"""Every argument of lm-eval's HFLM through the model `a2sf`: the same numbers, or one sentence."""

from __future__ import annotations

import inspect

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import a2sf.lm  # noqa: F401
from a2sf.errors import ConfigError
from a2sf.hf.loading import ModelSpec, load, load_tokenizer
from a2sf.policies.find import find_policies
from a2sf.scoring.lm import PrunedLM
from a2sf.scoring.pretrained import NOT_OURS, OF_LOADING
from a2sf.scoring.requests import Requests
from a2sf.sweep.cell import Cell
from a2sf.sweep.prepare.models import check_prompting
from a2sf.tasks import spec as tasks
from tests.hub.build import write_model
from tests.own_tasks import simple_evaluate

HONOURED = {
    *("tokenizer", "max_length", "add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking"),
    *("chat_template_args", "pretrained", "backend", "batch_size", *OF_LOADING),
}
"""What takes effect here, each tried below or in tests of its own."""
WITHOUT_EFFECT = {"logits_cache", "max_batch_size"}
"""What moves no number of lm-eval's either."""
REQUESTS = [("The capital of France is", " Paris"), ("", "A sentence by itself."), ("one two", " three four")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), tokens=1000)


@pytest.fixture(scope="module")
def model(folder):
    return load(ModelSpec(str(folder), device="cpu")).model


def scores(lm):
    return [a for a, _ in lm.loglikelihood([Instance("loglikelihood", {}, r, i) for i, r in enumerate(REQUESTS)])]


def rolled(lm):
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("some text to be read",), 0)])


def written(lm):
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    return lm.generate_until([Instance("generate_until", {}, ("Once upon a time", settings), 0)])


def test_every_argument_is_honoured_or_refused():
    parameters = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    assert parameters - HONOURED - WITHOUT_EFFECT == set(NOT_OURS)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"prefix_token_id": 17},
        {"prefix_token_id": 17, "add_bos_token": True},
        {"max_length": 12},
        {"think_end_token": "e"},
        {"use_fast_tokenizer": True, "truncation": False, "logits_cache": False},
    ],
    ids=str,
)
def test_the_numbers_are_hflms(folder, given):
    """On the full cache; and that an argument is no more ignored than there."""
    theirs = HFLM(str(folder), device="cpu", dtype="float32", **given)
    ours = PrunedLM(str(folder), device="cpu", dtype="float32", **given)
    assert scores(ours) == pytest.approx(scores(theirs), abs=1e-3)
    assert rolled(ours) == pytest.approx(rolled(theirs), abs=1e-3)
    if "max_length" not in given:
        assert written(ours) == written(theirs)
    if given.get("add_bos_token"):
        named = PrunedLM(str(folder), tokenizer=str(folder), device="cpu", dtype="float32", **given)
        assert scores(named) == pytest.approx(scores(theirs), abs=1e-3)


def test_a_beginning_of_sequence_token_moves_a_score(folder, model, bundle):
    task = tasks.TaskSpec("copa", bundle).build(1)
    found = {}
    for kind in ("hf", "a2sf"):
        for bos in (False, True):
            results = simple_evaluate(
                kind,
                model_args=f"pretrained={folder},dtype=float32,device=cpu,add_bos_token={bos}",
                tasks=[task],
                limit=3,
                bootstrap_iters=0,
            )
            samples = sorted(results["samples"]["copa"], key=lambda s: s["doc_id"])
            found[kind, bos] = [a[0] for s in samples for a in s["filtered_resps"]]
    assert found["a2sf", True] == pytest.approx(found["hf", True], abs=1e-3)
    assert found["a2sf", False] == pytest.approx(found["hf", False], abs=1e-3)
    assert found["a2sf", True] != pytest.approx(found["a2sf", False], abs=1e-2)
    # a tokenizer that is made already is taken as it is, so it has to be one that does it
    with pytest.raises(ConfigError, match=r"add_bos_token=true is not allowed: .* puts no beginning-of-sequence token"):
        PrunedLM(model, tokenizer=load_tokenizer(ModelSpec(str(folder))), add_bos_token=True)
    made = load_tokenizer(ModelSpec(str(folder), add_bos_token=True))
    lm = PrunedLM(model, tokenizer=made, add_bos_token=True)
    assert lm.tok_encode("a") == [made.bos_token_id, *made.encode("a", add_special_tokens=False)]


VALUES = {
    "tp_plan": "auto",
    "peft": "x",
    "delta": "x",
    "subfolder": "x",
    "max_memory_per_gpu": 9,
    "max_cpu_memory": 9,
    "offload_folder": "elsewhere",
    "use_fast_tokenizer": False,
    "softmax_dtype": "bfloat16",
    "mixed_precision_dtype": "bfloat16",
}


@pytest.mark.parametrize("key", NOT_OURS)
def test_what_is_not_done_here_is_refused(folder, model, key):
    value = VALUES.get(key, True)
    for pretrained in (str(folder), model):
        with pytest.raises(ConfigError, match=f"{key}={value} is not allowed: "):
            PrunedLM(pretrained, **{key: value})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"dtype": "bfloat16"}, "dtype=bfloat16 is not allowed: the model is loaded already, with float32"),
        ({"device": "meta"}, "device=meta is not allowed: the model is loaded already, with cpu"),
        ({"add_bos_tokn": True}, r"add_bos_tokn=True is not allowed: .*did you mean add_bos_token"),
        ({"prefix_token_id": 1000}, "prefix_token_id=1000 is not allowed: give the number of a token, 0 to 999"),
        ({"prefix_token_id": "x"}, "prefix_token_id=x is not allowed"),
    ],
)
def test_what_a_loaded_model_is_not_is_refused(folder, model, given, why):
    with pytest.raises(ConfigError, match=why):
        PrunedLM(model, tokenizer=load_tokenizer(ModelSpec(str(folder))), **given)


def test_of_a_loaded_model_what_it_is_may_be_stated(folder, model):
    tokenizer = load_tokenizer(ModelSpec(str(folder)))
    lm = PrunedLM(
        model, tokenizer=tokenizer, dtype=torch.float32, device="cpu", truncation=None, softmax_dtype="float32"
    )
    assert lm.max_length == 2048


def test_in_a_sweep_it_is_part_of_a_cell_where_it_is_set(folder, bundle):
    def cell(bos):
        return Cell(
            "m", ModelSpec(str(folder), add_bos_token=bos), find_policies()["full"](), None, "copa", 0, 1, 0, bundle
        )

    plain, with_it, without = map(cell, (None, True, False))
    assert "add_bos_token" not in plain.identity
    assert len({plain.id, with_it.id, without.id}) == 3
    assert (plain.options, with_it.options) == ({}, {"add_bos_token": True})
    check_prompting([with_it], hub=False)


def test_a_tokenizer_without_such_a_token_is_refused_before_the_first_cell(tmp_path, folder, bundle):
    made = load_tokenizer(ModelSpec(str(folder)))
    made.bos_token = None
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    spec = ModelSpec(str(tmp_path), add_bos_token=True)
    cell = Cell("m", spec, find_policies()["full"](), None, "copa", 0, 1, 0, bundle)
    with pytest.raises(
        ConfigError, match=r"model\.add_bos_token=true is not allowed: .* no beginning-of-sequence token"
    ):
        check_prompting([cell], hub=False)


def test_no_prompt_depends_on_how_another_one_begins(folder):
    """lm-eval looks at the first of a batch alone for whether to put the beginning-of-sequence token."""
    lm = PrunedLM(str(folder), device="cpu", dtype="float32", add_bos_token=True, batch_size=2)
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [f"{lm.tokenizer.bos_token}A longer prompt that begins so", "Once upon a time"]
    todo = [Instance("generate_until", {}, (p, settings), i) for i, p in enumerate(prompts)]
    requests = Requests(lm, "generate_until", todo)
    assert [requests.prompt(i).tokens[0] for i in range(2)] == [lm.tokenizer.bos_token_id] * 2
    assert lm.generate_until(todo) == [lm.generate_until([one])[0] for one in todo]
    theirs = HFLM(str(folder), device="cpu", dtype="float32", add_bos_token=True, batch_size=1)
    assert lm.generate_until(todo) == [theirs.generate_until([one])[0] for one in todo]
