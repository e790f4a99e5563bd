"""A model has the weights that its files hold, all of them, or is refused with a sentence; .bin as well as safetensors."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from a2sf.errors import ConfigError
from a2sf.hf.loading import ModelSpec, fingerprint, load, load_tokenizer, prepare, sizes_of, tokenizer_here
from a2sf.hub import snapshot as hub
from tests.architectures import SUPPORTED
from tests.conftest import SMOLLM2
from tests.hub.build import tokenizer_files, write_model
from tests.models import LLAMA_LIKE
from tests.own_tasks import simple_evaluate


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """kind -> a complete checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llama": write_model(root / "llama", tokens=1000),
        "tied": write_model(root / "tied", tokens=1000, tie_word_embeddings=True),
        "opt": write_model(root / "opt", "opt", tokens=1000, weights="bin"),
    }


@pytest.fixture
def checkpoint(sources, tmp_path):
    """Makes a copy to damage; `tensors` and `settings` change the weights and config.json."""

    def make(kind="llama", tensors=None, **settings) -> Path:
        folder = tmp_path / kind
        folder.mkdir()
        for file in sources[kind].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if tensors is not None:
            weights = load_file(folder / "model.safetensors")
            tensors(weights)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        return folder

    return make


def spec(folder: Path, **more: object) -> ModelSpec:
    return ModelSpec(str(folder), device="cpu", dtype="float32", **more)  # type: ignore[arg-type]


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        load(spec(folder))
    text = str(raised.value)
    assert text.startswith(f"model.path={folder}")
    assert len(text.splitlines()) == 1
    return text


def shard(folder: Path, name: str) -> list[str]:
    """Split a checkpoint's file in two with an index; gives the names of the shards."""
    file = folder / name
    safe = name.endswith(".safetensors")
    weights = load_file(file) if safe else torch.load(file)
    keys = sorted(weights)
    stem, suffix = name.rsplit(".", 1)
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for part, target in zip((keys[::2], keys[1::2]), names, strict=True):
        tensors = {k: weights[k].clone() for k in part}
        save_file(tensors, folder / target, metadata={"format": "pt"}) if safe else torch.save(tensors, folder / target)
    where = {k: names[i % 2] for i, k in enumerate(keys)}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    file.unlink()
    return names


@pytest.mark.parametrize("kind", ["llama", "tied", "opt"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_parameter_is_that_of_the_file(checkpoint, kind, sharded):
    folder = checkpoint(kind)
    name = "pytorch_model.bin" if kind == "opt" else "model.safetensors"
    expected = torch.load(folder / name) if kind == "opt" else load_file(folder / name)
    if sharded:
        shard(folder, name)
    loaded = load(spec(folder))
    got = loaded.model.state_dict()
    assert expected.keys() <= got.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
    assert loaded.format == ("bin" if kind == "opt" else "safetensors")


def test_safetensors_come_before_a_pickle(checkpoint, sources):
    folder = checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert load(spec(folder)).format == "safetensors"


LAYER = "model.layers.1.mlp.up_proj.weight"


def without_a_layer(weights):
    for key in [k for k in weights if k.startswith("model.layers.2.")]:
        del weights[key]


def under_other_names(weights):
    for key in list(weights):
        weights[f"transformer.{key}"] = weights.pop(key)


def without_the_embedding(weights):
    del weights["model.embed_tokens.weight"]


def without_the_head(weights):
    del weights["lm_head.weight"]


def with_biases(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def with_norms(weights):
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)


def with_a_layer_more(weights):
    for key in [k for k in weights if k.startswith("model.layers.2.")]:
        weights[key.replace("layers.2", "layers.3")] = weights[key].clone()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.pop(LAYER), f"lack 1 of the parameters of LlamaForCausalLM .{LAYER}"),
        (without_a_layer, "lack 9 of the parameters .*and 6 more"),
        (under_other_names, "lack 30 .*hold transformer.lm_head.weight"),
        (without_the_embedding, "lack 1 .*embed_tokens"),
        (without_the_head, "lack 1 .*lm_head"),
        (
            lambda w: w.update({LAYER: torch.ones(47, 32)}),
            r"another shape .*\(47, 32\) in the file, \(48, 32\) in the model",
        ),
        (with_biases, "no place .*q_proj.bias"),
        (with_norms, "no place .*q_norm.weight"),
        (with_a_layer_more, r"no place .*layers\.3"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(checkpoint, change, why):
    message = refused(checkpoint(tensors=change))
    assert re.search(why, message), message


def test_a_tied_model_without_either_of_the_two_is_refused(checkpoint):
    assert "lack" in refused(checkpoint("tied", tensors=without_the_embedding))


def test_what_lies_beside_the_decoder_is_no_fault(checkpoint):
    def change(weights):
        weights["v_head.summary.weight"] = torch.ones(1, 32)
        weights["model.vision_tower.layers.0.weight"] = torch.ones(2)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    load(spec(checkpoint(tensors=change)))


def test_two_different_matrices_are_not_tied_by_a_config_that_says_so(checkpoint):
    """transformers reads both; lm-eval ties them once more by the config, which would put one in the other's place."""
    from a2sf.scoring.lm import PrunedLM

    folder = checkpoint(tie_word_embeddings=True)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    loaded = load(spec(folder))
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    assert torch.equal(lm.model.lm_head.weight, head)
    assert not torch.equal(lm.model.model.embed_tokens.weight, head)


def test_a_missing_parameter_is_refused_even_if_the_class_allows_it(checkpoint, monkeypatch):
    """Modelling code that comes with weights often lists its head so, which would be random."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"lm_head\.weight"])
    assert "lm_head" in refused(checkpoint(tensors=without_the_head))


@pytest.mark.parametrize("size", [0, 4, 4000])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_file_that_is_not_whole_is_refused_by_name(checkpoint, kind, size):
    folder = checkpoint(kind)
    (file,) = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
    file.write_bytes(file.read_bytes()[:size])
    message = refused(folder)
    assert "weights" in message or file.name in message
    if kind == "llama":
        with pytest.raises(ConfigError, match=file.name):
            prepare(spec(folder))  # before anything slow


def test_a_pointer_in_place_of_the_weights_is_reported(checkpoint):
    folder = checkpoint()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in refused(folder)


@pytest.mark.parametrize(("kind", "name"), [("llama", "model.safetensors"), ("opt", "pytorch_model.bin")])
def test_a_missing_shard_is_named(checkpoint, kind, name):
    folder = checkpoint(kind)
    lost = shard(folder, name)[1]
    (folder / lost).unlink()
    assert lost in refused(folder)
    (folder / f"{name}.index.json").write_text("{}")
    assert "does not say where" in refused(folder)


class Runs:
    """What unpickling this would do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(checkpoint, tmp_path, old):
    folder, ran = checkpoint("opt"), tmp_path / "ran"
    evil = {"model.decoder.embed_tokens.weight": Runs(ran)}
    stream = io.BytesIO()
    torch.save(evil, stream, _use_new_zipfile_serialization=not old)
    (folder / "pytorch_model.bin").write_bytes(stream.getvalue())
    assert "would run code" in refused(folder)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Runs(ran)))
    assert ran.exists()  # it could have


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model.safetensors": None}, "no weights"),
        ({"model.safetensors": None, "tf_model.h5": b"x"}, r"no weights .*tf_model.h5 \(TensorFlow\)"),
        ({"model.safetensors": None, "model.fp16.safetensors": b"x"}, "model.fp16.safetensors"),
        ({"model.safetensors": None, "a.gguf": b"x"}, "name one of them .a.gguf"),
        ({"config.json": None}, "no config.json"),
        ({"config.json": None, "adapter_config.json": b"{}"}, "an adapter"),
        ({"config.json": b"{"}, "config.json cannot be read"),
        ({"config.json": b"[]"}, "config.json cannot be read"),
        ({"config.json": b"{}"}, "names no model_type"),
        ({"config.json": b'{"model_type": "bert"}'}, "tokenizer|bert|causal"),
        ({"config.json": b'{"model_type": "vit"}'}, "no causal language model"),
        (
            {"config.json": b'{"model_type": "llama9", "transformers_version": "9.0"}'},
            "llama9.*saved with 9.0.*pip install",
        ),
        ({"config.json": b'{"model_type": "m", "auto_map": {"AutoConfig": "c.C"}}'}, "model.trust_remote_code=true"),
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "no tokenizer"),
        ({"tokenizer.json": None}, "no tokenizer"),
        ({"tokenizer.json": b"{"}, "tokenizer cannot be loaded"),
    ],
)
def test_each_kind_of_file_that_is_no_model_has_its_message(checkpoint, change, why):
    folder = checkpoint()
    for name, content in change.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    message = refused(folder)
    assert re.search(why, message), message


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "unheard_of"])
def test_quantised_weights_without_their_library_are_reported_before_they_are_read(checkpoint, method):
    folder = checkpoint(quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    with pytest.raises(ConfigError, match=rf"quantised \({method}\)"):
        prepare(spec(folder))


@pytest.mark.parametrize(
    ("where", "why"), [("c.C", r"c\.py\) is not there"), ("org/other--c.C", r"c\.py\) is in org/other")]
)
def test_code_that_does_not_come_with_the_weights_is_reported(checkpoint, where, why):
    folder = checkpoint(model_type="own", auto_map={"AutoConfig": where, "AutoModelForCausalLM": where})
    with pytest.raises(ConfigError, match=why):
        load(spec(folder, trust_remote_code=True))


def test_a_tokenizer_of_a_larger_vocabulary_is_reported(checkpoint):
    def smaller(weights):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[key] = weights[key][:50].clone()

    assert "its tokenizer is not the model's" in refused(checkpoint(tensors=smaller, vocab_size=50))


def test_only_what_is_read_identifies_a_directory(checkpoint):
    folder = checkpoint("opt")
    first = fingerprint(spec(folder))
    for name in (
        "trainer_state.json",
        "optimizer.pt",
        "training_args.bin",
        "notes.md",
        "checkpoint-5/pytorch_model.bin",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert fingerprint(spec(folder)) == first
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, folder / "pytorch_model.bin")
    assert fingerprint(spec(folder)) != first


def write_gguf(file: Path, *leave_out: str) -> Path:
    """A random Llama as a GGUF file with the SmolLM2 vocabulary's first tokens."""
    vocabulary = json.loads(tokenizer_files()["tokenizer.json"].read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)[:300]
    size, inner, layers = LLAMA_LIKE["hidden_size"], LLAMA_LIKE["intermediate_size"], 2
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in vocabulary["merges"]]
    writer.add_token_merges([" ".join(m) for m in pairs if "".join(m) in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd.weight": (len(tokens), size),
        "output_norm.weight": (size,),
        "output.weight": (len(tokens), size),
    }
    for i in range(layers):
        square = {f"blk.{i}.attn_{n}.weight": (size, size) for n in ("q", "k", "v", "output")}
        wide = {f"blk.{i}.ffn_{n}.weight": (inner, size) for n in ("gate", "up")}
        rest = {f"blk.{i}.ffn_down.weight": (size, inner)}
        norms = {f"blk.{i}.{n}_norm.weight": (size,) for n in ("attn", "ffn")}
        shapes |= square | wide | rest | norms
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name not in leave_out:
            writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_grid_reads_the_sizes_of_a_gguf_file_once_and_again_when_it_changes(tmp_path, monkeypatch):
    """Each cell with numbers per layer asks; a real vocabulary takes seconds."""
    file = write_gguf(tmp_path / "model.gguf")
    read, real = [], AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: read.append(a) or real(*a, **k))
    assert [sizes_of(spec(file)) for _ in range(3)] == [sizes_of(spec(file))] * 3
    assert len(read) == 1
    os.utime(file, ns=(1, 1))
    sizes_of(spec(file))
    assert len(read) == 2


def test_a_gguf_file_that_lacks_a_tensor_is_refused_and_not_kept(tmp_path, monkeypatch):
    complete = write_gguf(tmp_path / "whole.gguf")
    lacks = write_gguf(tmp_path / "lacks.gguf", "blk.1.ffn_up.weight")
    monkeypatch.setenv("A2SF_CACHE", str(tmp_path / "cache"))  # now: SmolLM2's tokenizer is in the usual one
    assert load(spec(complete)).format == "gguf"
    for _ in range(2):  # nothing was kept of the first
        assert "layers.1.mlp.up_proj" in refused(lacks)
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    assert "GGUF file cannot be read" in refused(tmp_path / "no.gguf")


def test_lm_eval_loads_a_model_by_name_with_the_same_checks(checkpoint, bundle):
    import a2sf.lm  # noqa: F401
    from a2sf.scoring.lm import PrunedLM
    from a2sf.tasks import spec as tasks

    folder = checkpoint("opt")
    task = tasks.TaskSpec("copa", bundle).build(0)
    # as the README has it, on a machine that may have no GPU: lm-eval's own default is cuda
    evaluated = simple_evaluate(
        "a2sf", model_args=f"pretrained={folder}/,policy=h2o,budget_ratio=0.5", tasks=[task], limit=2, bootstrap_iters=0
    )
    assert evaluated["results"]["copa"]["acc,none"] in (0.0, 0.5, 1.0)
    lm = PrunedLM(str(folder), dtype=torch.bfloat16, device="cpu", max_length=128)
    assert (lm.model.dtype, lm.max_length, lm.weights_format) == (torch.bfloat16, 128, "bin")
    assert PrunedLM(str(folder)).model.dtype == torch.float32  # as the sweeps
    other = PrunedLM(str(folder), tokenizer=str(folder))
    assert other.tok_encode("a b") == lm.tok_encode("a b")
    for key, value in (
        ("parallelize", True),
        ("subfolder", "x"),
        ("load_in_4bit", True),
        ("tp_plan", "auto"),
    ):
        with pytest.raises(ConfigError, match=f"{key}={value} .*give that as pretrained"):
            PrunedLM(str(folder), **{key: value})
    with pytest.raises(ConfigError, match="no such GPU"):
        PrunedLM(str(folder), device="cuda:99")


def test_lm_eval_refuses_what_the_sweeps_refuse(checkpoint):
    from a2sf.scoring.lm import PrunedLM

    folder = checkpoint(tensors=without_a_layer)
    with pytest.raises(ConfigError, match="lack 9 of the parameters"):
        PrunedLM(str(folder))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_model_that_reads_images_too_is_loaded_and_reads_text(kind, tmp_path):
    (of,) = (a for a in SUPPORTED if a.kind == kind)
    settings = {**of.settings, "text_config": {**of.settings["text_config"], "vocab_size": 49152}}
    model = replace(of, settings=settings).model()
    model.save_pretrained(tmp_path)
    for name, file in tokenizer_files().items():
        (tmp_path / name).write_bytes(file.read_bytes())
    loaded = load(spec(tmp_path))
    assert type(loaded.model) is type(model)
    ids = torch.tensor([loaded.tokenizer("The quick brown fox")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)
    del (weights := load_file(tmp_path / "model.safetensors"))[next(k for k in weights if "vision" not in k)]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 of the parameters" in refused(tmp_path)


def test_a_local_tokenizer_is_read_without_download_or_conversion(sources, tmp_path, monkeypatch):
    commit = "0" * 40
    local = spec(sources["llama"])
    assert tokenizer_here(local).encode("a") == load_tokenizer(local).encode("a")
    assert tokenizer_here(ModelSpec(SMOLLM2)) is not None  # converted before, for the other tests
    monkeypatch.setenv("A2SF_CACHE", str(tmp_path / "cache"))
    for asks in ("_ask", "commit_of", "snapshot_download"):
        monkeypatch.setattr(hub, asks, lambda *_, asks=asks, **__: pytest.fail(asks))
    monkeypatch.setattr("a2sf.hf.files.gguf.converted", lambda *_: pytest.fail("converted"))
    monkeypatch.setattr(hub, "_cache", lambda _: tmp_path / "hub")
    assert tokenizer_here(ModelSpec(SMOLLM2)) is None
    for path in ("org/name", "org/name/x.gguf"):
        assert tokenizer_here(ModelSpec(path)) is None
        assert tokenizer_here(ModelSpec(path, revision=commit)) is None
    folder = tmp_path / "hub" / "snapshots" / commit
    folder.parent.mkdir(parents=True)
    folder.symlink_to(sources["llama"])
    assert tokenizer_here(ModelSpec("org/name", revision=commit)).encode("a") == load_tokenizer(local).encode("a")
