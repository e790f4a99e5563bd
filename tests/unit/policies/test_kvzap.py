"""Settings of KVzap: gates from the disk and the hub, what identifies them, and what is refused in one sentence."""

from __future__ import annotations

import json

import pytest
import torch

from a2sf import KVzap
from a2sf.errors import ConfigError
from baselines import gates as files
from tests.gates import config_of, random_gates, write_gates

SIZES = (3, 2, 32)


@pytest.fixture(params=[None, 8], ids=["linear", "mlp"])
def tensors(request):
    return random_gates(*SIZES, request.param)


def test_a_folder_and_its_file_in_any_format_are_the_same_gates(tensors, tmp_path):
    folder = write_gates(tmp_path / "gates", tensors)
    torch.save(tensors, tmp_path / "gates.pt")
    (tmp_path / "old").mkdir()
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    hidden = torch.randn(5, 32)
    made = [
        KVzap(gates=str(p)) for p in (folder, folder / "model.safetensors", tmp_path / "gates.pt", tmp_path / "old")
    ]
    assert len({p.found.sizes for p in made}) == 1
    for policy in made:
        policy.check(3, 2)
        policy.check_hidden(32)
        assert torch.equal(policy.found.scores(1, hidden), made[0].found.scores(1, hidden))


def test_the_content_identifies_a_result_and_not_its_place(tmp_path):
    first = write_gates(tmp_path / "a", random_gates(*SIZES))
    again = write_gates(tmp_path / "b", random_gates(*SIZES))
    other = write_gates(tmp_path / "c", random_gates(*SIZES, seed=1))
    stored = [KVzap(gates=str(f)).stored_settings() for f in (first, again, other)]
    assert stored[0] == stored[1]
    assert stored[0] != stored[2]
    assert len(stored[0]["gates"]["digest"]) == 16
    assert "revision" not in stored[0]
    assert KVzap().stored_settings()["gates"] == "random"
    # the same place with other content is found out
    before = KVzap(gates=str(first)).stored_settings()
    write_gates(first, random_gates(*SIZES, seed=2))
    assert KVzap(gates=str(first)).stored_settings() != before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gates": None}, r"policy\.gates=None is not allowed: give a folder or file of KVzap gates, a hub id"),
        ({"gates": ""}, r"policy\.gates= is not allowed: give a folder or file"),
        ({"gates": "./nowhere"}, r"policy\.gates=\./nowhere is not allowed: .*there is no such folder or file"),
        ({"gates": "folder/gates.safetensors"}, "there is no such folder or file"),
        ({"gates": "a/b/c"}, "there is no such folder or file"),
        ({"threshold": float("nan")}, r"policy\.threshold=nan is not allowed: give a number"),
        ({"threshold": -4, "window": 0}, r"policy\.window=0 is not allowed: .*at least 1"),
        ({"window": -1}, r"policy\.window=-1 is not allowed"),
        ({"equal_slots": 1}, r"policy\.equal_slots=1 is not allowed: give true or false"),
        ({"threshold": -4, "equal_slots": True}, r"policy\.equal_slots=True is not allowed: with policy\.threshold"),
    ],
)
def test_settings_that_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        KVzap(**settings)
    assert len(str(error.value).splitlines()) == 1


def test_files_that_are_refused(tmp_path):
    complete = random_gates(*SIZES)
    lacking = {name: x for name, x in complete.items() if name != "layers.1.bias"}
    fast = {"module": [{"q_proj.weight": torch.zeros(2, 2)}]}  # the format of Fast KVzip's gates
    for name, content, said in [
        ("lacking.pt", lacking, "this has other tensors than KVzap gates"),
        ("model.pt", {"lm_head.weight": torch.zeros(2, 2)}, "this has other tensors than KVzap gates"),
        ("fast.pt", fast, "cannot be read as named tensors"),
        ("odd.pt", complete | {"layers.2.weight": torch.zeros(3, 32)}, "this has other tensors than KVzap gates"),
    ]:
        torch.save(content, tmp_path / name)
        with pytest.raises(ConfigError, match=said):
            KVzap(gates=str(tmp_path / name))
    for name, said in [
        ("text.md", "a file's name ends with .safetensors, .pt, .bin"),
        ("text.pt", "cannot be read as named tensors"),
        ("text.safetensors", "cannot be read as named tensors"),
    ]:
        (tmp_path / name).write_text("no tensors")
        with pytest.raises(ConfigError, match=said) as error:
            KVzap(gates=str(tmp_path / name))
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=r"this folder has no model\.safetensors or pytorch_model\.bin"):
        KVzap(gates=str(tmp_path))
    folder = write_gates(tmp_path / "gates", complete)
    with pytest.raises(ConfigError, match=r"policy\.revision=v2 is not allowed: .* has no revisions; leave it out"):
        KVzap(gates=str(folder), revision="v2")


def test_without_the_hub_it_is_one_sentence_and_offers_no_other_model():
    with pytest.raises(
        ConfigError, match=r"policy\.gates=nobody/gates cannot be loaded: HF_HUB_OFFLINE is set"
    ) as error:
        KVzap(gates="nobody/gates")
    assert len(str(error.value).splitlines()) == 1
    assert "data=bundle" not in str(error.value)
    assert str(error.value).endswith("unset it to download.")


def test_a_threshold_needs_no_budget():
    assert KVzap().uses_budget
    policy = KVzap(threshold=-4)
    assert not policy.uses_budget
    kept = policy.keeps(1, 0, 3, 40)
    assert (kept.budget, kept.recent, kept.rule.threshold) == (16, 16, -4.0)


def test_sizes_are_those_of_the_config(tensors):
    config = config_of(tensors)
    found = files._sizes({name: tuple(x.shape) for name, x in tensors.items()}, "gates")
    assert files.GateSizes(*(config[key] for key in files.SIZES)) == found
    assert found.shapes.keys() == tensors.keys()
    json.dumps(config)
