"""Arguments of a call that would change its mask are refused by name; those that change nothing are let through."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks

from a2sf import A2SF, Budget
from a2sf.hf.attention import UnsupportedModel, masks
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.scope import pruning
from tests.models import COMMON, CONFIGS, enlarge, small

IDS = torch.randint(3, 88, (2, 20), generator=torch.Generator().manual_seed(0))
PACKED = torch.cat([torch.arange(9), torch.arange(11)])[None].expand(2, -1)
ALL = Budget(tokens=200)  # evicts nothing
LATER = torch.zeros(2, 20, dtype=torch.int64)
LATER[:, 3:9] = 1


@pytest.fixture(scope="module")
def gemma():
    """A random Gemma 3 with eyes: tokens of type 1 belong to an image and see each other both ways."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**COMMON, **CONFIGS["gemma3"][1]}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        image_token_id=90,
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    return enlarge(AutoModelForImageTextToText.from_config(config))


def test_types_of_tokens_that_see_both_ways(gemma):
    types = {"token_type_ids": LATER}
    with torch.no_grad():
        assert not torch.allclose(gemma(IDS, **types).logits, gemma(IDS).logits)  # they matter to the model
        with pytest.raises(UnsupportedModel, match=r"^token_type_ids of the call makes tokens see later ones"):
            gemma(IDS, cache=PrunedCache(gemma, A2SF(), ALL), **types)
        with pruning(gemma, A2SF(), ALL):
            for keep in (True, False):
                with pytest.raises(UnsupportedModel, match=r"^token_type_ids"):
                    gemma(IDS, use_cache=keep, **types)
    image = {"input_ids": IDS.clone(), "pixel_values": torch.randn(2, 3, 32, 32)}
    image["input_ids"][:, 3:7] = 90
    types = {"token_type_ids": (image["input_ids"] == 90).long()}
    with pytest.raises(UnsupportedModel, match="token_type_ids"):
        gemma.generate(**image, **types, cache=PrunedCache(gemma, A2SF(), ALL), max_new_tokens=2)


def test_types_that_all_say_text_change_nothing(gemma):
    """As processors give them for a text; the layers have sliding windows, and a row has padding."""
    padded = torch.ones_like(IDS)
    padded[1, :7] = 0
    for types, mask in ((torch.zeros_like(IDS), None), (torch.zeros_like(IDS), padded)):
        given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
        own = gemma.generate(IDS, token_type_ids=types, **given)
        cache = PrunedCache(gemma, A2SF(), ALL)
        assert torch.equal(gemma.generate(IDS, token_type_ids=types, cache=cache, **given), own)


@pytest.mark.parametrize("length", [20, 1600])
def test_packed_rows(length):
    """Also those that are long enough to be read in parts."""
    model = small("llama", max_position_embeddings=2048)
    ids = IDS.repeat(1, length // 20)
    positions = torch.cat([torch.arange(length // 2)] * 2)[None].expand(2, -1)
    with torch.no_grad(), pruning(model, A2SF(), ALL):
        with pytest.raises(UnsupportedModel, match="position_ids begin anew within a row"):
            model(ids, position_ids=positions, use_cache=False)
        model(ids, position_ids=torch.arange(length)[None], use_cache=False)
        model(ids, position_ids=5 + torch.arange(length)[None], use_cache=False)


def test_with_a_cache_positions_do_not_shape_the_mask():
    """transformers then keeps nothing apart, so what is pruned does not either."""
    model = small("llama")
    with torch.no_grad():
        own = model(IDS, position_ids=PACKED).logits
        ours = model(IDS, position_ids=PACKED, cache=PrunedCache(model, A2SF(), ALL)).logits
    torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 9, 20])}, "cu_seq_lens_q packs several sequences"),
        ({"output_attentions": True}, "output_attentions=True asks for the attention weights"),
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, "only a padding mask"),
        ({"attention_mask": {"full_attention": torch.ones(2, 1, 20, 20)}}, "only a padding mask"),
    ],
)
def test_arguments_that_pruning_cannot_follow_are_refused(given, why):
    model = small("llama")
    with torch.no_grad():
        with pytest.raises(UnsupportedModel, match=why):
            model(IDS, cache=PrunedCache(model, A2SF(), ALL), **given)
        with pytest.raises(UnsupportedModel, match=why), pruning(model, A2SF(), ALL):
            model(IDS, use_cache=False, **given)
        assert model(IDS, attention_mask=None).logits.isfinite().all()


def test_a_prefix_that_sees_both_ways(monkeypatch):
    """A model whose own argument makes a mask, as prefix LMs do; the trial never sees that argument."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.create_causal_mask
    model = small("llama")

    def with_prefix(self, *args, prefix=None, **kwargs):
        blocks = None if prefix is None else torch.where(torch.arange(20)[None] < prefix[:, None], 0, -1)
        monkeypatch.setattr(
            modeling_llama, "create_causal_mask", lambda **given: own(**given, block_sequence_ids=blocks)
        )
        return forward(self, *args, **kwargs)

    forward = modeling_llama.LlamaModel.forward
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_prefix)
    prefix = torch.tensor([6, 3])
    with torch.no_grad(), pruning(model, A2SF(), ALL):
        with pytest.raises(UnsupportedModel, match=r"^prefix of the call"):
            model(IDS, prefix=prefix, use_cache=False)
        model(IDS, prefix=torch.tensor([1, 0]), use_cache=False)  # one token sees itself anyway


def test_plain_masks_are_known_without_making_them(monkeypatch):
    """A decoding step looks at a function, once per kind of mask, and at no positions."""
    made = []
    monkeypatch.setattr(masks, "shows_the_same", lambda *a, **k: made.append(1) or True)
    for name in ("llama", "gemma3", "mistral", "gpt2"):
        model = small(name)
        model.generate(IDS, cache=PrunedCache(model, A2SF(), ALL), max_new_tokens=4, do_sample=False)
    assert not made
    blocks = blockwise_overlay(torch.zeros(1, 4, dtype=torch.int64))
    assert not masks.is_causal(blocks)
    assert not masks.is_causal(or_masks(causal_mask_function, blocks))


def test_masks_are_compared_where_no_token_is_padding():
    blocks = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[-1, 0, 0, -1]])))
    given = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    assert not masks.shows_the_same(blocks, **given)
    assert not masks.shows_the_same(blocks, **given, attention_mask=torch.tensor([[False, True, True, True]]))
    assert masks.shows_the_same(blocks, **given, attention_mask=torch.tensor([[True, True, False, True]]))
    # one more token: all earlier ones are seen
    assert masks.shows_the_same(blocks, batch_size=1, q_length=1, kv_length=4, q_offset=3)
    assert not masks.shows_the_same(blocks, batch_size=1, q_length=1, kv_length=4, q_offset=1)
