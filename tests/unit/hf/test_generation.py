"""The bounded cache's memory, life and refusals; what it computes is in tests/parity/test_generation.py."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from a2sf import A2SF, Budget, Schedule
from a2sf.errors import ConfigError, UserError
from a2sf.hf.attention import NonFiniteError, UnsupportedModel
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.scope import pruning
from baselines.adakv import AdaKV
from baselines.full import Full
from baselines.future import Future
from baselines.heads import Heads
from baselines.pyramidkv import PyramidKV
from baselines.snapkv import SnapKV
from baselines.streaming import Streaming
from baselines.tova import TOVA
from tests.models import COMMON, random_model, small
from tests.own_policies import Steady

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "eos_token_id": None}


def test_memory_is_allocated_once_and_bounded_by_the_budget():
    model = small("llama", max_position_embeddings=2048)
    cache = PrunedCache(model, A2SF(), Budget(tokens=200))
    text = model.generate(IDS, cache=cache, max_new_tokens=2, **GREEDY)
    before = cache.nbytes
    model.generate(torch.cat([text, IDS], 1), cache=cache, max_new_tokens=300, **GREEDY)
    assert cache.nbytes == before
    assert max(int((cache.state(i).positions >= 0).sum(-1).max()) for i in range(3)) == 200


def test_an_unlimited_budget_grows_with_the_sequence():
    model = small("llama", max_position_embeddings=2048)
    cache = PrunedCache(model, Full())
    expected = model.generate(IDS, max_new_tokens=300, **GREEDY)
    assert torch.equal(model.generate(IDS, cache=cache, max_new_tokens=300, **GREEDY), expected)
    assert cache.state(0).positions.shape[-1] == 319


LONG = torch.randint(3, 97, (1, 600), generator=torch.Generator().manual_seed(1))


def after_prompt(policy: object, schedule: Schedule | None = None, tokens: int = 64, **more: object) -> PrunedCache:
    """A cache after a prompt of 600 tokens, in memory for so many, and ten more."""
    model = small("llama", max_position_embeddings=2048)
    cache = PrunedCache(model, policy, Budget(tokens=tokens), schedule=schedule, max_new_tokens=11, **more)
    model.generate(LONG, cache=cache, max_new_tokens=11, **GREEDY)
    return cache


def test_the_prompt_is_cut_in_memory_and_what_is_kept_after_it_grows():
    kept, step = (after_prompt(SnapKV(), Schedule("prompt", then=then)) for then in ("keep", "step"))
    assert kept.state(0).positions.shape[-1] == 74
    assert step.state(0).positions.shape[-1] == 64
    full = after_prompt(Full())
    assert step.nbytes <= kept.nbytes < 0.2 * full.nbytes


def test_a_budget_above_half_of_the_prompt_is_spent():
    """Four fifths of a prompt of 600 tokens in layers of their own sizes, and the ten tokens after it."""
    cache = after_prompt(PyramidKV(), tokens=480)
    assert [int((cache.state(i).positions >= 0).sum(-1).max()) for i in range(3)] == [610, 490, 370]


def test_memory_under_a_schedule_that_evicts_every_so_often():
    model = small("llama", max_position_embeddings=2048)
    cache = PrunedCache(model, A2SF(), Budget(ratio=0.25, base="context"), schedule=Schedule("every", every=30))
    sizes, bytes_ = set(), set()
    with torch.no_grad():
        model(LONG[:, :400], cache=cache)
        for t in range(400, 490):
            model(LONG[:, t : t + 1], cache=cache)
            sizes.add(int(cache.state(1).positions.shape[-1]))
            bytes_.add(cache.nbytes)
    assert sizes == set(range(100, 130))
    assert len(bytes_) == 1


def test_heads_that_keep_everything_do_not_make_the_others_larger():
    """One of six heads retains everything: the memory is that of one full head and five small ones."""
    none, one, full = (after_prompt(p) for p in (Heads(), Heads(heads=[[1, 0]]), Full()))
    positions = one.state(1).positions[0]
    assert [int((p >= 0).sum()) for p in positions] == [610, 64]
    assert one.nbytes < 1.05 * (none.nbytes * 5 / 6 + full.nbytes / 6)


@pytest.mark.parametrize("then", ["keep", "step"])
def test_slots_that_move_between_heads_are_not_paid_for_twice(then):
    """Heads that hold different numbers of tokens take about the memory of as many tokens in equal heads."""
    shared, equal = (after_prompt(AdaKV(window=4, floor=f), Schedule("prompt", then=then), 100) for f in (0.0, 1.0))
    counts = [(shared.state(i).positions >= 0).sum(-1)[0] for i in range(3)]
    assert any(int(c.max()) > 1.3 * int(c.min()) for c in counts)
    assert all(int(c.sum()) == 2 * (110 if then == "keep" else 100) for c in counts)
    padded = sum(2 * int(c.max()) for c in counts) / sum(int(c.sum()) for c in counts)
    assert shared.nbytes < min(1.15, padded) * equal.nbytes


def test_the_model_is_as_before_outside_and_other_calls_are_unchanged():
    model = small("llama")
    own = model.config._attn_implementation
    with torch.no_grad():
        expected = model(IDS).logits
        model(IDS, cache=PrunedCache(model, A2SF(), Budget(tokens=4)))
        assert model.config._attn_implementation == own
        assert torch.equal(model(IDS).logits, expected)
        with pruning(model, A2SF(), Budget(tokens=4)):
            assert not torch.equal(model(IDS, use_cache=False).logits, expected)
        assert torch.equal(model(IDS).logits, expected)


def test_a_failed_call_leaves_the_model_usable_and_the_cache_not():
    model = small("llama")
    cache = PrunedCache(model, A2SF(), Budget(tokens=4))
    with torch.no_grad():
        model(IDS, cache=cache)
        weight = model.model.layers[1].self_attn.k_proj.weight
        before = float(weight[0, 0])
        weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="layer 1"):
            model(IDS[:, :1], cache=cache)
        weight[0, 0] = before
        assert model(IDS).logits.isfinite().all()
        with pytest.raises(UserError, match="stopped midway"):
            model(IDS[:, :1], cache=cache)
        cache.reset()
        assert model(IDS, cache=cache).logits.isfinite().all()


def test_a_copied_cache_continues_by_itself():
    model = small("llama")
    prefix = PrunedCache(model, A2SF(), Budget(tokens=6))
    with torch.no_grad():
        model(IDS[:, :15], cache=prefix)
        branch = copy.deepcopy(prefix)
        a = model(IDS[:, 15:], cache=branch).logits
        b = model(IDS[:, 15:], cache=prefix).logits
    assert torch.equal(a, b)


def test_nothing_keeps_a_model_alive():
    model = small("llama")
    cache = PrunedCache(model, A2SF(), Budget(tokens=6))
    with torch.no_grad():
        model(IDS, cache=cache)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_budgets_by_tokens_and_by_shares_of_prompt_and_text():
    model = small("llama")

    def slots(budget: Budget, **more: object) -> list[int]:
        cache = PrunedCache(model, A2SF(), budget, **more)
        mask = torch.ones_like(IDS)
        mask[1, :10] = 0
        with torch.no_grad():
            model(IDS, attention_mask=mask, cache=cache)
        return [row[0].budget for row in cache.retention]

    assert slots(Budget(tokens=9)) == [9, 9]
    assert slots(Budget(ratio=0.5, base="context")) == [10, 5]
    assert slots(Budget(ratio=0.5), max_new_tokens=30) == [24, 19]  # 49 and 39 tokens are read
    assert slots(Budget(ratio=0.1, base="context"), context_tokens=[50, 70]) == [5, 7]
    assert slots(Budget(ratio=0.5), max_new_tokens=30, context_tokens=[21, 11]) == [25, 20]  # more to come
    assert slots(Budget(ratio=0.5), max_new_tokens=30, context_tokens=[19, 11]) == [24, 20]
    assert slots(Budget(ratio=0.5, base="context"), context_tokens=[18, 10]) == [9, 5]  # what it is a share of


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"policy": Streaming(sinks=4), "budget": Budget(tokens=3)}, "streaming protects 4 tokens"),
        ({"policy": A2SF()}, "needs budget.ratio or budget.tokens"),
        ({"policy": A2SF(), "budget": Budget(ratio=0.5)}, "max_new_tokens"),
        ({"policy": A2SF(), "budget": Budget(tokens=[4, 5])}, "one entry per layer"),
        ({"policy": A2SF(forgetting_factor=[0.1, 0.2]), "budget": Budget(tokens=4)}, "one factor per layer"),
        ({"policy": Future(), "budget": Budget(tokens=4)}, "future is not allowed: it looks at later tokens"),
        ({"policy": SnapKV(), "budget": Budget(tokens=4), "schedule": Schedule()}, "snapkv supports only prompt"),
        ({"policy": Future(), "budget": Budget(tokens=9), "schedule": Schedule("every")}, "future supports only step"),
        ({"policy": Heads(heads=[[0, 2]]), "budget": Budget(tokens=4)}, "3 layers of 2 key/value heads"),
        ({"policy": A2SF(), "budget": Budget(tokens=4), "context_tokens": 0}, "at least 1 token"),
        ({"policy": A2SF(), "budget": Budget(tokens=4), "context_tokens": []}, "at least 1 token"),
        ({"policy": A2SF(), "budget": Budget(tokens=4), "context_tokens": [2.9, 3]}, "a whole number of at least 1"),
        ({"policy": A2SF(), "budget": Budget(tokens=4), "context_tokens": "12"}, "a whole number of at least 1"),
        ({"policy": A2SF(), "budget": Budget(tokens=4), "max_new_tokens": 2.5}, "max_new_tokens=2.5 is not allowed"),
        ({"policy": A2SF(), "budget": Budget(tokens=4), "max_new_tokens": -1}, "max_new_tokens=-1 is not allowed"),
        ({"policy": A2SF(), "budget": Budget(tokens=4), "backend": "nunba"}, "did you mean numba"),
        ({"policy": "h20", "budget": 4}, "did you mean h2o"),
        ({"policy": A2SF(), "budget": 4.5}, "budget=4.5 is not allowed: give a whole number of tokens"),
        ({"policy": A2SF(), "budget": 4, "schedule": "promt"}, "schedule=promt is not allowed"),
        ({"policy": A2SF, "budget": 0.5}, "max_new_tokens"),
    ],
)
def test_settings_that_do_not_fit(settings, why):
    with pytest.raises(ConfigError, match=why):
        PrunedCache(small("llama"), **settings)
    if why != "max_new_tokens":  # which plain calls do without
        with pytest.raises(ConfigError, match=why), pruning(small("llama"), **settings):
            pass


def test_names_and_numbers_for_a_policy_a_budget_and_a_schedule():
    model = small("llama")
    want = PrunedCache(model, A2SF(), Budget(ratio=0.3), schedule=Schedule("prompt"), max_new_tokens=6)
    plain = PrunedCache(model, "a2sf", 0.3, schedule="prompt", max_new_tokens=6)
    texts = [model.generate(IDS, cache=c, max_new_tokens=6, **GREEDY) for c in (want, plain)]
    with pruning(model, A2SF, 0.3, schedule="prompt", max_new_tokens=6):
        texts.append(model.generate(IDS, max_new_tokens=6, **GREEDY))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    with torch.no_grad(), pruning(model, "a2sf", 5):
        assert model(IDS, use_cache=False).logits.isfinite().all()


def refused(why: str, **inputs: object) -> None:
    model = small("llama", max_position_embeddings=64)
    cache = inputs.pop("cache", None)
    cache = PrunedCache(model, A2SF(), Budget(ratio=0.5, base="context")) if cache is None else cache
    fed = inputs.pop("fed", None)
    with torch.no_grad():
        if fed is not None:
            model(fed, cache=cache)
        with pytest.raises(UserError, match=why) as raised:
            model(**inputs, cache=cache)
    assert str(raised.value).count("\n") == 0


def test_misuse_gives_one_sentence():
    gap = torch.ones_like(IDS)
    gap[0, 5] = 0
    other = PrunedCache(small("llama", seed=1), A2SF(), Budget(tokens=4))
    refused("made for another model", input_ids=IDS, cache=other)
    refused("a batch of 2 sequences and the model was called with 1", fed=IDS, input_ids=IDS[:1, :1])
    refused("70 tokens and the model 64 positions", input_ids=IDS[:1].repeat(1, 4)[:, :70])
    refused("gap inside", input_ids=IDS, attention_mask=gap)
    refused("must cover the 20 tokens", fed=IDS, input_ids=IDS[:, :1], attention_mask=gap)
    refused("the first call brought 20 tokens and the second brings several more", fed=IDS, input_ids=IDS)
    refused("only a padding mask", input_ids=IDS, attention_mask=gap[:, None, None])


def test_the_end_of_a_prompt_must_be_given_where_it_is_not_known():
    model, mask = small("llama"), torch.ones_like(IDS)
    mask[1] = 0
    for why, ids, settings, more in (
        ("single token, so it is not known where the prompt ends.* for the cut after it", IDS[:, :1], {}, {}),
        ("gives 3 lengths and the batch has 2 rows", IDS, {"context_tokens": [5, 6, 7]}, {}),
        ("row 1 of the batch has no token", IDS, {}, {"attention_mask": mask}),
    ):
        cache = PrunedCache(model, SnapKV(), Budget(tokens=4), **settings)
        with torch.no_grad(), pytest.raises(UserError, match=why):
            model(ids, cache=cache, **more)
    with pruning(model, A2SF(), Budget(tokens=4), schedule=Schedule("prompt")):
        with pytest.raises(UserError, match="does not show where its prompt ends"):
            model(IDS, use_cache=False)
        with pytest.raises(UserError, match="does not show where its prompt ends"):
            model.generate(IDS, max_new_tokens=3, use_cache=False)


def test_tokens_that_were_read_are_refused_a_second_time():
    """A text that is no longer than what the cache has read, and the whole text again at each token."""
    model = small("llama")
    cache = PrunedCache(model, A2SF(), 6)
    text = model.generate(IDS, cache=cache, max_new_tokens=6, **GREEDY)
    for given in (IDS, text[:, :-3], text[:, :-1]):
        with pytest.raises(UserError, match="this cache has read 25 tokens; give generate a text that begins with all"):
            model.generate(given, cache=cache, max_new_tokens=3, **GREEDY)
    assert cache.seen.tolist() == [25, 25]
    model.generate(torch.cat([text, IDS], 1), cache=cache, max_new_tokens=3, **GREEDY)
    with pytest.raises(
        UserError, match=r"position_ids begin at 0 and this cache has read 20 tokens; .* use_cache=False"
    ):
        model.generate(IDS, cache=PrunedCache(model, A2SF(), 6), use_cache=False, max_new_tokens=3, **GREEDY)


@pytest.mark.parametrize("way", ["itself", "copied", "stored", "moved"])
def test_a_conversation_that_is_given_again_begins_with_what_was_read(way):
    """Another text of the right length is none of this cache's; padding has no token of its own."""
    model = small("llama")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :4] = 0
    cache = PrunedCache(model, A2SF(), 6)
    first = model.generate(IDS, cache=cache, attention_mask=mask, max_new_tokens=6, **GREEDY)
    if way == "copied":
        model, cache = copy.deepcopy((model, cache))
    elif way == "stored":
        stored, cache = cache.stored(), PrunedCache(model, A2SF(), 6)
        cache.load(stored)
    elif way == "moved":
        rows = torch.tensor([1, 0])
        cache.batch_select_indices(rows)
        first, mask = first[rows], mask[rows]
    text = torch.cat([first, IDS[:, :3]], 1)
    shown = torch.cat([mask, torch.ones(2, 9, dtype=torch.int64)], 1)
    padded = int(mask.sum(1).argmin())
    for row, column in ((0, 4), (1, 24)):  # one of the prompt, and one that was generated
        other = text.clone()
        other[row, column] -= 1
        why = f"the 25 tokens that this cache has read: token {column} of row {row} is {other[row, column]} and was"
        with pytest.raises(UserError, match=why):
            model.generate(other, cache=cache, attention_mask=shown, max_new_tokens=3, **GREEDY)
    assert cache.seen.tolist() == (mask.sum(1) + 5).tolist()
    text[padded, 0] -= 1
    again = model.generate(text, cache=cache, attention_mask=shown, max_new_tokens=3, **GREEDY)
    assert again.shape == (2, 32)
    assert cache.seen.tolist() == (mask.sum(1) + 11).tolist()


def test_new_tokens_alone_and_embeddings_are_compared_with_nothing():
    model = small("llama")
    cache = PrunedCache(model, A2SF(), 6)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(IDS), cache=cache)
    other = torch.cat([IDS.flip(1), IDS[:, :3]], 1)
    model.generate(other, cache=cache, max_new_tokens=3, **GREEDY)
    cache = PrunedCache(model, A2SF(), 6)
    model.generate(IDS, cache=cache, max_new_tokens=3, **GREEDY)
    shown = torch.ones(2, 22 + 23, dtype=torch.int64)
    model.generate(other, cache=cache, attention_mask=shown, max_new_tokens=3, **GREEDY)
    assert cache.seen.tolist() == [47, 47]


def test_a_refused_call_leaves_nothing_behind():
    model = small("llama", max_position_embeddings=64)
    cache = PrunedCache(model, A2SF(), Budget(ratio=0.5, base="context"))
    with torch.no_grad():
        with pytest.raises(UserError, match="70 tokens"):
            model(IDS.repeat(1, 4)[:, :70], cache=cache)
        model(IDS[:1], cache=cache)  # of another batch size and length
    assert [row[0].budget for row in cache.retention] == [10]


def test_a_prompt_fed_token_by_token_needs_its_length():
    model = small("llama")
    refused("the first call brings a single token, so it is not known", input_ids=IDS[:, :1])
    cache = PrunedCache(model, A2SF(), Budget(ratio=0.5, base="context"), context_tokens=torch.tensor([20, 12]))
    with torch.no_grad():
        model(IDS[:, :1], cache=cache)
    assert [row[0].budget for row in cache.retention] == [10, 6]


SHARES = [
    {"policy": A2SF(), "budget": Budget(ratio=0.5, base="context")},
    {"policy": SnapKV(), "budget": Budget(tokens=6)},
]


@pytest.mark.parametrize("settings", SHARES, ids=["ratio", "cut"])
def test_what_generate_begins_with_is_a_prompt(settings):
    """A prompt of one token, and a turn after one new token; transformers says where `generate` begins."""
    model = small("llama")
    one = PrunedCache(model, **settings)
    model.generate(IDS[:, :1], cache=one, max_new_tokens=4, **GREEDY)
    assert one.prompt == [1, 1]
    ones = torch.ones(2, 26, dtype=torch.int64)
    at_once, twice = PrunedCache(model, **settings), PrunedCache(model, **settings)
    first = model.generate(IDS, cache=twice, max_new_tokens=1, **GREEDY)
    text = model.generate(
        torch.cat([first, IDS[:, :5]], 1), cache=twice, attention_mask=ones, max_new_tokens=4, **GREEDY
    )
    with torch.no_grad():
        model(IDS, cache=at_once)
    at_once.context_tokens = 20
    with torch.no_grad():
        logits = model(torch.cat([first[:, -1:], IDS[:, :5]], 1), cache=at_once).logits
    assert torch.equal(text[:, 26], logits[:, -1].argmax(-1))
    assert twice.prompt == [20, 20]
    # only what begins with generate is one: the parts of a chunked prefill come within it
    chunks = PrunedCache(model, **settings)
    with pytest.raises(UserError, match="the first call brought 7 tokens and the second brings several more"):
        model.generate(IDS, attention_mask=ones[:, :20], cache=chunks, prefill_chunk_size=7, max_new_tokens=2, **GREEDY)


def test_guidance_reads_a_second_context_of_its_own():
    model = small("llama")
    for context, why in (
        (None, "the first call brings a single token, so it is not known where the prompt ends"),
        (20, ""),
    ):
        with pruning(model, A2SF(), Budget(ratio=0.5, base="context"), context_tokens=context):
            if why:
                with pytest.raises(UserError, match=why):
                    model.generate(IDS, guidance_scale=1.5, max_new_tokens=3, **GREEDY)
            else:
                assert model.generate(IDS, guidance_scale=1.5, max_new_tokens=3, **GREEDY).shape == (2, 23)


@pytest.mark.parametrize("long", [False, True])
def test_a_second_turn_of_questions_of_several_lengths(long):
    """The first row's question is shorter: padding lies between its last answer and it. As the row alone."""
    model = small("llama", max_position_embeddings=2048)
    question = IDS.repeat(1, 40 if long else 1)
    n, gap = question.shape[1], question.shape[1] // 3
    mask = torch.ones(2, 20 + 4 + n, dtype=torch.int64)
    mask[0, 24 : 24 + gap] = 0
    settings = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, **GREEDY}

    def turns(rows: slice, cache: object, second: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        first = model.generate(
            IDS[rows], cache=cache, attention_mask=torch.ones_like(IDS[rows]), max_new_tokens=4, **GREEDY
        )
        out = model.generate(torch.cat([first, second], 1), cache=cache, attention_mask=shown, **settings)
        return torch.stack(out.logits, 1)

    def pruned(tokens: int) -> PrunedCache:
        return PrunedCache(model, A2SF(), Budget(tokens=tokens))

    both = slice(0, 2)
    own = turns(both, DynamicCache(config=model.config), question, mask)
    torch.testing.assert_close(turns(both, pruned(2000), question, mask), own, rtol=1e-3, atol=1e-3)
    together = turns(both, pruned(8), question, mask)
    alone = turns(slice(0, 1), pruned(8), question[:1, gap:], torch.ones(1, 24 + n - gap, dtype=torch.int64))
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-3)


def test_a_gap_is_refused_where_nothing_was_read_and_where_steps_are_noted():
    model, mask = small("llama"), torch.ones(2, 26, dtype=torch.int64)
    mask[0, 22] = 0
    cache = PrunedCache(model, A2SF(), Budget(tokens=6), trace=True)
    with torch.no_grad():
        model(IDS, cache=cache)
        with pytest.raises(UserError, match=r"a gap inside .* a trace notes steps by their columns"):
            model(IDS[:, :6], attention_mask=mask, cache=cache)


def test_padding_of_an_earlier_call_is_remembered_or_must_be_given():
    model = small("llama")
    mask = torch.ones_like(IDS)
    mask[1, :8] = 0
    caches = [PrunedCache(model, A2SF(), Budget(tokens=6)) for _ in range(3)]
    with torch.no_grad():
        for cache in caches:
            model(IDS, attention_mask=mask, cache=cache)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        expected = model(IDS[:, :1], attention_mask=longer, cache=caches[0]).logits
        # without a mask the new token's position still is the row's own
        torch.testing.assert_close(model(IDS[:, :1], cache=caches[1]).logits, expected)
        with pytest.raises(UserError, match="give attention_mask"):
            model(IDS[:, :1], position_ids=torch.full((2, 1), 20), cache=caches[2])
        longer[0, 3] = 0
        with pytest.raises(UserError, match="hides tokens that this cache has read"):
            model(IDS[:, :1], attention_mask=torch.cat([longer, longer[:, -1:]], 1), cache=caches[0])


def test_a_copy_of_a_model_is_pruned_like_the_model():
    model = small("llama")
    PrunedCache(model, A2SF(), Budget(tokens=6))
    twin = copy.deepcopy(model)
    a, b = (
        m.generate(IDS, cache=PrunedCache(m, A2SF(), Budget(tokens=6)), max_new_tokens=8, **GREEDY)
        for m in (model, twin)
    )
    assert torch.equal(a, b)


def test_an_interrupted_call_leaves_no_trace(monkeypatch):
    model = small("llama")
    own = model.config._attn_implementation
    cache = PrunedCache(model, A2SF(), Budget(tokens=6))
    layer = model.model.layers[1]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "forward", interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(IDS, cache=cache)
    monkeypatch.undo()
    with torch.no_grad():
        with pruning(model, A2SF(), Budget(tokens=6)):
            model(IDS, use_cache=False)
        assert model.config._attn_implementation == own
        assert model(IDS).logits.isfinite().all()


def test_phi3_keeps_its_pruned_cache_beyond_the_switch_of_its_rotary_embedding():
    """Its generation drops a cache that holds less than the switch when the prompt is longer."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    rope["original_max_position_embeddings"] = 12
    model = small("phi3", original_max_position_embeddings=12, rope_parameters=rope)
    cache = PrunedCache(model, A2SF(), Budget(tokens=6))
    model.generate(IDS, cache=cache, max_new_tokens=4, **GREEDY)
    assert cache.seen.tolist() == [23, 23]
    crossing = PrunedCache(model, A2SF(), Budget(tokens=6))
    with pytest.raises(UnsupportedModel, match="keys from both sides"):
        model.generate(IDS[:, :10], cache=crossing, max_new_tokens=6, **GREEDY)


def test_states_that_do_not_fit_are_refused():
    model = small("llama")
    large, cache = PrunedCache(model, A2SF(), Budget(tokens=12)), PrunedCache(model, A2SF(), Budget(tokens=6))
    with pytest.raises(UserError, match="read nothing yet"):
        cache.state(0)
    with pytest.raises(UserError, match="trace=True"):
        cache.evicted(0)
    with torch.no_grad():
        model(IDS, cache=large)
        model(IDS, cache=cache)
    states = [large.state(i) for i in range(3)]
    with pytest.raises(UserError, match="more tokens than this cache's budget"):
        cache.load(states)
    with pytest.raises(UserError, match="each of the 3 layers"):
        large.load(states[:2])
    with pytest.raises(UserError, match="each of 2 rows"):
        large.load([s.select(torch.tensor([0])) for s in states])


def test_states_of_other_policies_are_refused():
    model = small("llama")
    with torch.no_grad():
        caches = [PrunedCache(model, p, Budget(tokens=6)) for p in (A2SF(), TOVA(), Steady())]
        for cache in caches:
            model(IDS, cache=cache)
        for cache, other in ((caches[1], caches[0]), (caches[2], caches[0]), (caches[0], caches[2])):
            with pytest.raises(UserError, match="made by another policy"):
                cache.load([other.state(i) for i in range(3)])


def test_states_before_and_after_the_prompts_cut():
    """A prompt's state may hold any number of tokens, what comes after it as many as the schedule leaves."""
    model = small("llama")

    def cache(**settings: object) -> PrunedCache:
        return PrunedCache(model, A2SF(), Budget(tokens=6), context_tokens=12, **settings)

    with torch.no_grad():
        keep, step, stepwise = (
            cache(schedule=Schedule("prompt")),
            cache(schedule=Schedule("prompt", then="step")),
            cache(),
        )
        model(IDS[:, :11], cache=keep)
        model(IDS[:, :13], cache=step)
        model(IDS[:, :1], cache=stepwise)
        states = [keep.state(i) for i in range(3)]
        assert states[0].positions.shape[-1] == 11
        step.load(states)  # back in the prompt
        expected = model(IDS[:, 11:14], cache=keep).logits
        first = model(IDS[:, 11:12], cache=step).logits
        torch.testing.assert_close(first, expected[:, :1])
        assert step.state(0).positions.shape[-1] == 6
        with pytest.raises(UserError, match="more tokens than this cache's budget"):
            stepwise.load(states)
        with pytest.raises(UserError, match="more tokens than this cache's budget"):
            step.load([keep.state(i) for i in range(3)])  # two were kept after the cut


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UnsupportedModel, match=r"model\.eval\(\)"):
        PrunedCache(small("gpt2").train(), A2SF(), Budget(tokens=4))


def test_misuse_beyond_a_call():
    model = small("llama")
    cache = PrunedCache(model, A2SF(), Budget(tokens=4))
    with torch.no_grad():
        with pytest.raises(UserError, match="another model, or the model was called through one of its parts"):
            model.model(IDS, cache=cache)
        model(IDS, cache=cache)
    with pytest.raises(UserError, match="cannot take tokens back"):
        cache.crop(-2)
    with pytest.raises(UserError, match="filled without pruning"), pruning(model, A2SF(), Budget(tokens=4)):
        model(IDS[:, :1], cache=_filled(model))
    with pytest.raises(ConfigError, match="max_new_tokens"), pruning(model, A2SF(), Budget(ratio=0.5)):
        model.generate(IDS, max_new_tokens=4)


def _filled(model):

    cache = DynamicCache(config=model.config)
    for i in range(3):
        cache.update(torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8), i)
    return cache


def test_a_model_whose_attention_is_out_of_reach_is_refused():
    model = random_model("bloom", **COMMON, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UnsupportedModel, match="AttentionInterface"):
        PrunedCache(model, A2SF(), Budget(tokens=4))


def test_a_window_of_the_models_own_may_not_be_outgrown():
    model = small("mistral", sliding_window=24)
    cache = PrunedCache(model, A2SF(), Budget(tokens=4))
    with pytest.raises(UnsupportedModel, match="window of 24 tokens"):
        model.generate(IDS, cache=cache, max_new_tokens=10, **GREEDY)


def test_transformers_own_chunked_prefill():
    model = small("llama")
    at_once = PrunedCache(model, A2SF(), Budget(ratio=0.3, base="context"))
    chunks = PrunedCache(model, A2SF(), Budget(ratio=0.3, base="context"), context_tokens=20)
    settings = {**GREEDY, "max_new_tokens": 8}
    mask = torch.ones_like(IDS)
    a = model.generate(IDS, attention_mask=mask, cache=at_once, **settings)
    b = model.generate(IDS, attention_mask=mask, cache=chunks, prefill_chunk_size=7, **settings)
    assert torch.equal(a, b)


def test_states_are_taken_over_from_another_cache():
    model = small("llama")
    first, second = (PrunedCache(model, A2SF(), Budget(tokens=6)) for _ in range(2))
    with torch.no_grad():
        model(IDS[:, :15], cache=first)
        with pytest.raises(UserError, match="once it has read something"):
            second.load([first.state(i) for i in range(3)])
        model(IDS[:, :1], cache=second)
        second.load([first.state(i) for i in range(3)])
        a, b = (model(IDS[:, 15:], cache=c).logits for c in (first, second))
    torch.testing.assert_close(a, b)
    assert second.get_seq_length() == 20


def test_the_benchmark_compares_caches_of_the_same_context():
    from a2sf.bench import decode

    model = decode.tiny()
    full, ours = decode.full_cache(model, 2, 300), decode.pruned_cache(model, 2, 300, 60)
    assert full.get_seq_length() == ours.get_seq_length() == 300
    assert int((ours.state(1).positions >= 0).sum(-1).max()) == 60
    with torch.no_grad():
        assert model(IDS[:, :1], cache=ours).logits.isfinite().all()
    assert decode.long_run(tokens=400, budget=16) < 1.2
