"""A call leaves nothing behind, however it ends and whoever else uses the model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from a2sf import A2SF, Budget
from a2sf.errors import Notice, UserError
from a2sf.hf.attention import UnsupportedModel
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.scope import pruning
from tests.models import small

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
BUDGET = Budget(tokens=6)
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}


@torch.no_grad()
def text(model: nn.Module, row: int = 0, cache: PrunedCache | None = None, **more: Any) -> list[int]:
    ids = IDS[row : row + 1]
    return model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **(GREEDY | more))[0].tolist()


def pruned(model: nn.Module, row: int = 0, **more: Any) -> list[int]:
    return text(model, row, PrunedCache(model, A2SF(), BUDGET), **more)


def scoped(model: nn.Module, row: int = 0, **more: Any) -> list[int]:
    with pruning(model, A2SF(), BUDGET):
        return text(model, row, **more)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """What each job gives, or raises, when all begin at the same time in threads of their own."""
    found: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        start.wait()
        try:
            found[i] = jobs[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore::a2sf.errors.Notice")
def test_threads_share_a_model(own):
    """Plain, with a cache, and inside `pruning`: each gets what it gets alone."""
    model = small("llama")
    model.set_attn_implementation(own)
    jobs = [
        lambda: text(model),
        lambda: pruned(model),
        lambda: scoped(model, 1, max_new_tokens=30),
        lambda: scoped(model, max_new_tokens=4),
    ]
    alone = [job() for job in jobs]
    assert len({str(t[20:24]) for t in alone[:2]}) == 2
    for _ in range(5):
        assert together(*jobs) == alone
    assert model.config._attn_implementation == own
    assert text(model) == alone[0]


def test_threads_use_a_model_first_at_the_same_time():
    expected = pruned(small("llama")), scoped(small("llama"), 1)
    for _ in range(3):
        model = small("llama")
        assert together(lambda: pruned(model), lambda: scoped(model, 1)) == list(expected)  # noqa: B023


def test_pruning_acts_on_its_own_thread_and_warns_in_others():
    model = small("llama")
    plain = text(model)
    with pruning(model, A2SF(), BUDGET):
        inside = text(model)

        def other() -> tuple[list[int], list[str]]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return text(model), [str(w.message) for w in caught if issubclass(w.category, Notice)]

        ((found, said),) = together(other)
    assert found == plain != inside
    assert "is not pruned: pruning(...) was entered in another thread" in said[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert text(model) == plain


def test_pruning_is_left_while_another_thread_generates():
    model = small("llama")
    expected = pruned(model, max_new_tokens=40)
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with pruning(model, A2SF(), BUDGET):
            entered.set()
            leave.wait()

    def second() -> list[int]:
        entered.wait()
        hook = model.model.layers[0].register_forward_pre_hook(lambda *_: leave.set())
        try:
            return pruned(model, max_new_tokens=40)
        finally:
            hook.remove()

    assert together(first, second) == [None, expected]


def test_two_calls_cannot_go_through_one_cache():
    model = small("llama")
    cache = PrunedCache(model, A2SF(), BUDGET)
    reading, done = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        reading.set()
        done.wait(10)

    def second() -> Any:
        reading.wait()
        hook.remove()
        try:
            with torch.no_grad():
                return model(IDS, cache=cache)
        finally:
            done.set()

    hook = model.model.layers[1].register_forward_pre_hook(hold)
    found = together(lambda: text(model, cache=cache), second)
    assert found[0] == pruned(model)
    assert "in the middle of another call" in str(found[1])


def stop(error: type[BaseException]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error("stopped")

    return hook


PLACES = {
    "in a layer": lambda m, f: m.model.layers[1].register_forward_pre_hook(f),
    "after a layer": lambda m, f: m.model.layers[1].register_forward_hook(f),
    "before the call": lambda m, f: m.register_forward_pre_hook(f),
    "before other hooks": lambda m, f: m.register_forward_pre_hook(f, prepend=True),
    "after the call": lambda m, f: m.register_forward_hook(f),
}


ERRORS = (KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        pytest.param(p, e, marks=[] if p == "in a layer" or e is KeyboardInterrupt else pytest.mark.full)
        for p in PLACES
        for e in ERRORS
    ],
)
def test_a_call_that_is_stopped_leaves_the_model_as_it_was(error, place):
    model = small("llama")
    own = model.config._attn_implementation
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
    expected = text(model), pruned(model)
    cache = PrunedCache(model, A2SF(), BUDGET)
    for call in (lambda: text(model, cache=cache), lambda: scoped(model)):
        hook = PLACES[place](model, stop(error))
        with pytest.raises(error, match="stopped"):
            call()
        hook.remove()
        assert model.config._attn_implementation == own
        with torch.no_grad():
            assert torch.equal(model.model(IDS).last_hidden_state, hidden)
        assert text(copy.deepcopy(model)) == expected[0]
        assert (text(model), pruned(model)) == expected
    if place.endswith("a layer"):
        with pytest.raises(UserError, match="stopped midway"):
            text(model, cache=cache)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_generator_that_is_thrown_away_inside_pruning_ends_it(elsewhere):
    model = small("llama")
    plain = text(model)

    def steps():
        with pruning(model, A2SF(), BUDGET):
            yield text(model)

    generator = steps()
    assert next(generator) != plain
    if elsewhere:
        assert together(generator.close) == [None]
    else:
        del generator
        gc.collect()
    assert text(model) == plain
    with torch.no_grad():
        assert model.model(IDS).last_hidden_state.isfinite().all()


def test_a_refusal_changes_nothing_and_is_not_remembered():
    model = small("llama")
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(UnsupportedModel, match="LlamaModel gives no logits"):
        PrunedCache(model.model, A2SF(), BUDGET)
    with pytest.raises(UnsupportedModel, match="LlamaModel gives no logits"), pruning(model.model, A2SF(), BUDGET):
        pass
    hook = model.model.layers[0].register_forward_hook(stop(RuntimeError))
    with pytest.raises(UnsupportedModel, match="fails on a few tokens"):
        PrunedCache(model, A2SF(), BUDGET)
    hook.remove()
    model.train()
    with pytest.raises(UnsupportedModel, match="training mode"):
        PrunedCache(model, A2SF(), BUDGET)
    model.eval()
    assert [dict(vars(m)) for m in model.modules()] == before
    expected = pruned(small("llama"))
    assert pruned(model) == expected
    with pytest.raises(UnsupportedModel, match="LlamaModel gives no logits"):
        PrunedCache(model.model, A2SF(), BUDGET)
    assert pruned(model) == expected == scoped(model)


def test_a_cache_that_would_stay_empty_is_refused():
    from transformers import DynamicCache

    model = small("llama")
    with torch.no_grad(), pruning(model, A2SF(), BUDGET):
        cache = DynamicCache(config=model.config)
        model(IDS[:, :12], cache=cache)
        with pytest.raises(UserError, match="continue with the output's cache"):
            model(IDS[:, 12:], cache=cache)
        output = model(IDS[:, :12], cache=DynamicCache(config=model.config))
        assert output.cache.get_seq_length() == 12
        assert model(IDS[:, 12:], cache=output.cache).logits.isfinite().all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["forward", "module"])
def test_compiled_models_are_pruned_outside_of_the_graph(what, when):
    expected = pruned(small("llama")), scoped(small("llama"))
    model = small("llama")
    if when == "after":
        pruned(model)
    if what == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
        called = model
    else:
        called = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = called(IDS[:1]).logits
        outputs = called(IDS[:1], cache=PrunedCache(called, A2SF(), BUDGET)).logits
        with pruning(called, A2SF(), BUDGET):
            inside = called(IDS[:1]).logits
        assert torch.equal(outputs, inside)
        assert torch.equal(called(IDS[:1]).logits, plain)
        assert not torch.equal(plain, inside)
    assert (pruned(model), scoped(model)) == expected


def test_compiled_parts_are_refused():
    model = small("llama")
    pruned(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match=r"parts of the model are compiled by torch\.compile"):
        pruned(model)


def test_parts_of_a_model_inside_pruning():
    model = small("llama")
    own = model.model(IDS).last_hidden_state
    with torch.no_grad(), pruning(model, A2SF(), BUDGET):
        assert torch.equal(model.forward(IDS).logits, model(IDS).logits)
        with pytest.raises(UserError, match="call the whole model"):
            model.model(IDS)
        with pytest.raises(UserError, match="call the whole model"):
            model.model.layers[0](own, position_embeddings=model.model.rotary_emb(own, torch.arange(20)[None]))
        with pytest.raises(UserError, match="called through one of its parts"):
            model.model(IDS, cache=PrunedCache(model, A2SF(), BUDGET))
    assert torch.equal(model.model(IDS).last_hidden_state, own)


class Base(nn.Module):
    """As PEFT's tuners and models: they hold the model and hand calls on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)


class Adapted(Base):
    def get_base_model(self) -> nn.Module:
        return self.model.model


def adapted() -> nn.Module:
    """A model with an adapter that does something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(small("llama"), config).eval()


@pytest.mark.parametrize(
    "wrap",
    [lambda: Adapted(Base(small("llama"))), lambda: nn.DataParallel(small("llama")), adapted],
    ids=["stand-in", "data parallel", "peft"],
)
def test_wrappers_are_looked_through(wrap):
    wrapper = wrap()
    inner = wrapper.module if isinstance(wrapper, nn.DataParallel) else wrapper.get_base_model()
    with torch.no_grad():
        expected = inner(IDS, cache=PrunedCache(inner, A2SF(), BUDGET)).logits
        plain = wrapper(input_ids=IDS).logits
        assert torch.equal(wrapper(input_ids=IDS, cache=PrunedCache(wrapper, A2SF(), BUDGET)).logits, expected)
        with pruning(wrapper, A2SF(), BUDGET) as given:
            assert given is wrapper
            assert torch.equal(wrapper(input_ids=IDS).logits, expected)
        assert torch.equal(wrapper(input_ids=IDS).logits, plain)
    if not isinstance(wrapper, nn.DataParallel):
        assert pruned(wrapper) == scoped(wrapper) == pruned(inner)


def test_what_is_no_model_is_refused():
    with pytest.raises(UserError, match="a Linear cannot be pruned; give a transformers model"):
        PrunedCache(nn.Linear(2, 2), A2SF(), BUDGET)


def test_copies_of_a_model_and_of_its_cache():
    model = small("llama")
    cache = PrunedCache(model, A2SF(), BUDGET)
    with torch.no_grad():
        model(IDS[:1, :10], cache=cache)
        expected = model(IDS[:1, 10:], cache=copy.deepcopy(cache)).logits
        for order in (1, -1):
            twins = copy.deepcopy((model, cache)[::order])[::order]
            assert torch.equal(twins[0](IDS[:1, 10:], cache=twins[1]).logits, expected)
        with pruning(model, A2SF(), BUDGET):
            twin = copy.deepcopy(model)
            same = type(model)(model.config).eval()  # writes into the config what it reads there
            inside = model(IDS).logits
    assert model.config._attn_implementation == "sdpa" == same.config._attn_implementation
    assert text(twin) == text(model)
    assert text(same) == text(same)
    with torch.no_grad():
        loaded = pickle.loads(pickle.dumps(model))
        torch.save(model, stored := io.BytesIO())
        for other in (twin, loaded, torch.load(io.BytesIO(stored.getvalue()), weights_only=False)):
            with pruning(other, A2SF(), BUDGET):
                assert torch.equal(other(IDS).logits, inside)


def test_a_model_is_gone_when_its_last_reference_is():
    model = small("llama")
    pruned(model)
    scoped(model)
    collected: list[int] = []
    weakref.finalize(model, collected.append, 1)
    gc.disable()
    try:
        del model
        assert collected
    finally:
        gc.enable()
