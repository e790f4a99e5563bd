"""An adapter is added where one is named, and is part of what a cell is; beside a model it is left alone, and said."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import find_adapter_config_file

from a2sf.app.compute import overrides_of_job
from a2sf.errors import ConfigError
from a2sf.hf import loading
from a2sf.hf.files import adapter
from a2sf.hf.loading import ModelSpec, load, prepare
from a2sf.hub import snapshot as hub
from a2sf.store.names import distinct
from a2sf.store.runs import StoredCell
from a2sf.sweep.prepare import models
from tests.hub.build import write_model
from tests.unit.sweep.test_config import _hydra, sentence, settings  # noqa: F401 (a fixture)
from tests.unit.sweep.test_sweep import cell

IDS = torch.tensor([[5, 6, 7, 8, 900, 12]])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def spec(path: Path, **more: object) -> ModelSpec:
    return ModelSpec(str(path), device="cpu", dtype="float32", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A directory that looks like an adapter, where peft need not be installed since nothing is loaded."""
    monkeypatch.setattr(adapter, "check_peft", lambda value: None)
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def make_lora(base: Path, folder: Path, **more: object) -> Path:
    """A LoRA adapter of a model, as peft saves it, that changes what the model says."""
    peft = pytest.importorskip("peft")
    made = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(made, peft.LoraConfig(**(settings | more)))
    torch.manual_seed(0)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    made.save_pretrained(folder)
    return folder


def test_without_peft_it_is_refused_before_anything_slow(base, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    message = sentence("data=bundle", f"model.path={base}", f"model.adapter={tmp_path}")
    assert message == (
        f'model.adapter={tmp_path} is not allowed: peft, which adds it, is not installed; pip install "a2sf[adapter]".'
    )


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("/no/such/place", "there is no such directory"),
        ("lora", "there is no such directory"),
        ("org/a name", "the hub has no such names"),
    ],
)
def test_what_can_name_no_adapter_is_refused(base, value, why):
    with pytest.raises(ConfigError, match=f"^model.adapter=.*{why}"):
        spec(base, adapter=value)


def test_one_device_only(base, files):
    with pytest.raises(ConfigError, match="added on one device only"):
        ModelSpec(str(base), device_map="auto", adapter=str(files))


@pytest.mark.parametrize("lacking", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_directory_without_its_files_is_named(base, files, lacking):
    (files / lacking).unlink()
    with pytest.raises(ConfigError, match=f"^model.adapter={files}.*lacks {lacking}"):
        prepare(spec(base, adapter=str(files)))


def test_it_is_part_of_what_a_cell_is_and_nothing_is_where_there_is_none(base, files):
    plain, added = cell(model=spec(base)), cell(model=spec(base, adapter=str(files)))
    assert "adapter" not in plain.identity
    assert added.identity["adapter"]["path"] == str(files)
    assert added.id != plain.id
    (files / "adapter_model.safetensors").write_bytes(b"changed")
    changed = cell(model=spec(base, adapter=str(files)))
    assert len({plain.id, added.id, changed.id}) == 3
    assert changed.id == cell(model=spec(base, adapter=f"{files}/")).id
    # a tuned model is another row of a table than the model itself, also under one name
    named = [StoredCell(base, {"cell": c.describe()}).model for c in (plain, added, changed)]
    assert len(set(distinct(named).values())) == 3


def test_what_was_computed_with_one_beside_the_model_is_not_reused(base, files, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(base, folder)
    assert "adapter" not in cell(model=spec(folder)).identity
    shutil.copy(files / "adapter_config.json", folder)
    assert cell(model=spec(folder)).identity["adapter"] is None


def test_tables_name_it_and_a_grid_may_hold_both(base, files):
    both = [
        settings("data=bundle", "tasks=[copa]", f"model.path={base}", *more)
        for more in ([], [f"model.adapter={files}"])
    ]
    assert [s.cells[0].model_name for s in models.distinguish(both)] == ["base", "base+lora"]


def test_one_of_the_hub_is_pinned_for_all_workers(base, files, monkeypatch):
    monkeypatch.setattr(hub, "commit_of", lambda wanted: (COMMIT, f"pinned {wanted.repo} at {wanted.revision}"))
    given = spec(base, adapter="org/lora@v1")
    assert not given.pinned
    pinned, note = loading.pin(given)
    assert (pinned.adapter, note) == (f"org/lora@{COMMIT}", "pinned org/lora at v1")
    assert pinned.pinned
    made = cell(model=pinned)
    assert made.identity["adapter"] == {"path": "org/lora", "weights": COMMIT}
    assert f'model.adapter="org/lora@{COMMIT}"' in overrides_of_job([([], None)], [made])  # type: ignore[list-item]


def test_one_that_lies_beside_a_model_is_reported_and_not_looked_for(base, files, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(base, folder)
    assert loading.left_alone(spec(folder)) is None
    for file in files.iterdir():
        shutil.copy(file, folder)
    assert find_adapter_config_file(str(folder)) is not None  # which is what from_pretrained asks
    assert find_adapter_config_file(str(folder), **adapter.NOWHERE["adapter_kwargs"]) is None
    assert f"An adapter (LORA) lies beside the model in {folder} and is not used" in loading.left_alone(spec(folder))
    assert loading.left_alone(spec(folder, adapter=str(files))) is None


def test_with_it_the_model_says_what_peft_says(base, tmp_path):
    peft = pytest.importorskip("peft")
    lora = make_lora(base, tmp_path / "lora")
    loaded = load(spec(base, adapter=str(lora)))
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    assert torch.equal(logits(loaded.model), logits(expected.eval()))
    assert (logits(loaded.model) - logits(load(spec(base)).model)).abs().max() > 1
    assert loaded.adapter == adapter.understand(str(lora)).fingerprint()


def test_beside_a_model_it_changes_nothing(base, tmp_path):
    pytest.importorskip("peft")
    before = logits(load(spec(base)).model)
    folder = tmp_path / "whole"
    shutil.copytree(base, folder)
    make_lora(base, folder)
    changed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # transformers adds it
    assert (logits(changed) - before).abs().max() > 1
    assert torch.equal(logits(load(spec(folder)).model), before)
    assert torch.equal(logits(load(spec(folder, adapter=str(folder))).model), logits(changed))


def test_one_of_another_model_is_refused(base, tmp_path):
    lora = make_lora(base, tmp_path / "lora")
    for other, why in (
        (write_model(tmp_path / "small", num_hidden_layers=2), "the model has no place for"),
        (write_model(tmp_path / "wide", hidden_size=64), "the model has another shape of|cannot be added"),
        (write_model(tmp_path / "deep", num_hidden_layers=4), "it lacks"),
        (write_model(tmp_path / "opt", "opt"), "has no place for|it lacks|cannot be added"),
    ):
        with pytest.raises(ConfigError, match=f"^model.adapter={lora}.*({why})"):
            load(spec(other, adapter=str(lora)))


def test_a_cell_is_computed_with_it_also_through_lm_eval(base, tmp_path):
    pytest.importorskip("peft")
    from a2sf.scoring.pretrained import load_pretrained

    lora = make_lora(base, tmp_path / "lora")
    loaded, left = load_pretrained(str(base), {"peft": str(lora), "device": "cpu", "dtype": "float32"})
    assert torch.equal(logits(loaded.model), logits(load(spec(base, adapter=str(lora))).model))
    assert left == {}
