"""Tokens of a pass from the free memory and the model's size; no GPU is needed, its memory is simulated."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2sf.hf import memory
from tests.models import CONFIGS, shared, small

GB = 2**30
SetFree = Callable[..., None]


@pytest.fixture
def gpu(monkeypatch) -> SetFree:
    """Simulates a GPU with so many free bytes, of which torch has reserved some more."""

    def set_free(free: int | dict[int, int], reserved: int = 0, allocated: int = 0) -> None:
        monkeypatch.setattr(memory, "input_device", lambda model: torch.device("cuda", 0))
        of = free if isinstance(free, dict) else {0: free}
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (of[device.index], 80 * GB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)

    return set_free


def large(**more: Any) -> Any:
    """What is read of a model of 8 billion parameters, without its weights."""
    numbers = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    text = SimpleNamespace(**numbers, vocab_size=128256, **more)
    config = SimpleNamespace(get_text_config=lambda: text)
    return SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda", 0))


@given(free=st.lists(st.integers(0, 200 * GB), min_size=2, max_size=2).map(sorted))
def test_more_memory_never_means_smaller_passes(free):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "input_device", lambda model: torch.device("cuda", 0))
        found = []
        for bytes_ in free:
            patch.setattr(memory, "free_bytes", lambda model, bytes_=bytes_: bytes_)
            found.append((memory.tokens_per_pass(large()), memory.tokens_in_caches(large())))
    (few, few_cached), (many, many_cached) = found
    assert memory.LEAST_TOKENS["cuda"] <= few <= many <= memory.MOST_TOKENS["cuda"]
    assert few_cached <= many_cached
    assert few.bit_count() == many.bit_count() == 1  # so that a little more memory makes the same passes


def test_the_floor_and_the_cap(gpu):
    gpu(0)
    assert memory.tokens_per_pass(large()) == memory.LEAST_TOKENS["cuda"]
    gpu(10_000 * GB)
    assert memory.tokens_per_pass(large()) == memory.MOST_TOKENS["cuda"]


def test_a_pass_takes_its_share_of_the_memory_and_no_more(gpu):
    each, besides = memory.pass_bytes(large())
    for free in (8 * GB, 16 * GB, 40 * GB):
        gpu(free)
        tokens = memory.tokens_per_pass(large())
        assert tokens * each + besides <= free * memory.SHARE_OF_PASS
        assert 2 * tokens * each + besides > free * memory.SHARE_OF_PASS or tokens == memory.MOST_TOKENS["cuda"]


def test_a_larger_model_reads_fewer_tokens_at_a_time(gpu):
    gpu(8 * GB)
    assert memory.tokens_per_pass(shared("llama")) == memory.MOST_TOKENS["cuda"] > memory.tokens_per_pass(large())
    assert memory.tokens_per_pass(large()) > memory.tokens_per_pass(large(num_experts_per_tok=8))


def test_memory_that_torch_has_reserved_is_free(gpu):
    gpu(1 * GB)
    alone = memory.tokens_per_pass(large())
    gpu(1 * GB, reserved=40 * GB, allocated=20 * GB)
    assert memory.free_bytes(large()) == 21 * GB
    assert memory.tokens_per_pass(large()) > alone


def test_of_several_gpus_the_fullest_counts(gpu):
    model = large()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": "cpu"}
    gpu({0: 30 * GB, 1: 3 * GB, 2: GB})
    assert memory.free_bytes(model) == 3 * GB


def test_logits_that_cannot_be_computed_in_parts_are_of_every_token(monkeypatch):
    parts, _ = memory.pass_bytes(large())
    monkeypatch.setattr(memory, "is_spread", lambda model: True)
    at_once, _ = memory.pass_bytes(large())
    assert at_once - parts == 128256 * (2 + 8)


@pytest.mark.parametrize(("available", "tokens"), [(64 * GB, 1024), (GB, 1024), (GB // 1000, 64), (0, 64)])
def test_a_cpu_reads_as_before_unless_there_is_no_memory_for_it(monkeypatch, available, tokens):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    assert memory.tokens_per_pass(shared("llama")) == tokens


def test_a_cpu_with_little_memory_reads_less_at_a_time(monkeypatch):
    model = shared("llama")
    each, besides = memory.pass_bytes(model)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * (besides + 300 * each)))
    assert memory.tokens_per_pass(model) == 256


def test_a_configuration_of_other_names_has_sizes_too():
    text = SimpleNamespace(num_attention_heads=[4, 8], intermediate_size=[64, None, 128])
    assert memory.ModelSizes.of(SimpleNamespace(get_text_config=lambda: text)) == (4096, 128, 8, 8, 512)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_has_sizes(name):
    model = small(name)
    sizes = memory.ModelSizes.of(model.config)
    assert all(isinstance(n, int) and n > 0 for n in sizes)
    assert all(n > 0 for n in memory.pass_bytes(model))
    assert memory.tokens_per_pass(model) == 1024
