"""Whether pruning a model through `pruned_attention` is exact, found by trying it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from a2sf.hf.attention import Plan, UnsupportedModel, attached, mixes_windows, running
from a2sf.policies.base import UNLIMITED, Retention


def check_exact(model: PreTrainedModel) -> None:
    """Try the model with a budget that evicts nothing against its own attention, on two short sequences that begin alike.

    This finds what no attribute tells: a layer that does not use AttentionInterface, an attention that is not causal,
    positions that do not follow `position_ids`, a mask of the model's own.

    Raises:
        UnsupportedModel: if the logits differ.
    """
    if model.training:
        raise UnsupportedModel(
            "the model is in training mode, where dropout changes every call; call model.eval() first"
        )
    config = model.config.get_text_config()
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModel(f"the model has layers of type {', '.join(sorted(kinds))}, which hold no plain KV cache")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(vocabulary, (2, 12), generator=generator).tolist()
    b[:7] = a[:7]  # the fork: seven tokens in common, five of their own
    plan = Plan(
        row=[0] * 3,
        start=[0, 7, 12],
        length=[7, 5, 5],
        parent=[-1, 0, 0],
        retention=lambda segment, layer: Retention(budget=UNLIMITED),
        layers=layers,
        policy_on_sliding=not mixes_windows(config),
    )
    device = model.device
    with torch.inference_mode():
        own = model(torch.tensor([a, b], device=device), use_cache=False).logits.float()
        with attached(model), running(plan):
            packed = model(
                input_ids=torch.tensor([a + b[7:]], device=device),
                position_ids=torch.tensor([[*range(12), *range(7, 12)]], device=device),
                use_cache=False,
            ).logits[0]
    packed = packed.float()
    ours = torch.stack([packed[:12], torch.cat([packed[:7], packed[12:]])])
    spread = own.std().clamp(min=1e-6)
    # root mean square: in bfloat16, where matmuls differ with the batch's shape, single logits are 0.2 off
    tolerance = 1e-4 if own.dtype == model.dtype else 0.1

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).square().mean().sqrt() / spread)

    if distance(own[0, :7], own[1, :7]) > tolerance:
        raise UnsupportedModel(
            f"{type(model).__name__} is not causal: later tokens change earlier ones; give a decoder"
        )
    if distance(own, ours) > tolerance:
        raise UnsupportedModel(
            f"{type(model).__name__} computes something around its attention that the engine does not reproduce, so its "
            "pruned scores would be wrong; choose another model"
        )
