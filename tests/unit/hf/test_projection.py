"""The projection after the attention: found where it is plain, refused in one sentence where it is not."""

from __future__ import annotations

import copy

import pytest
import torch

from a2sf.hf.attention import UnsupportedModel
from a2sf.hf.projection import projections, projections_of
from tests.architectures import SUPPORTED
from tests.models import shared

KINDS = {a.kind: a for a in SUPPORTED}


def test_it_has_the_heads_of_the_attention_not_those_of_the_config():
    model = KINDS["persimmon"].model()  # its config has a number of key/value heads that it does not use
    assert [p.weights.shape for p in projections_of(model)] == [(4, 1, 8, 32)] * 3


@pytest.mark.parametrize("kind", ["diffllama", "whisper"])
def test_an_attention_that_is_more_than_heads_and_a_projection_is_refused(kind):
    with pytest.raises(UnsupportedModel, match="is not only a projection of its heads by plain weights"):
        projections_of(KINDS[kind].model())


def test_weights_that_are_not_what_is_computed_with_are_refused():
    """As those of a quantised layer, whose scales are kept elsewhere."""
    model = copy.deepcopy(shared("llama"))
    projection = model.model.layers[1].self_attn.o_proj
    own = projection.forward
    projection.forward = lambda x: own(x) * torch.linspace(0.5, 2, x.shape[-1])
    with pytest.raises(UnsupportedModel, match="what follows the attention of layer 1 of LlamaForCausalLM"):
        projections(model)
