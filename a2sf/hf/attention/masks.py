"""Refuses calls whose mask is not causal attention, within a sliding window and without padding.

From the arguments of a call (`token_type_ids` of images, `position_ids` that begin anew) transformers composes a model's
mask, and gives it to the function registered here, once per kind of mask and call. A mask that shows or hides anything
else is refused, because the engine would ignore it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel

from a2sf.compat.transformers import is_causal, made_mask, packed
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.attention.function import IMPLEMENTATION

PLAIN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "logits_to_keep", "cache_position"}
"""Tensors of a call that do not shape a mask, but for padding and positions that begin anew."""
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that say where the sequences of a packed row end; transformers gives them to attention kernels only."""

CACHE_NAMES = ("cache", "past_key_values")
"""The names of the cache among the arguments of transformers' models."""

arguments: ContextVar[Sequence[str] | None] = ContextVar("arguments", default=None)
"""The names of a call's tensors that may shape its mask; None where the pass in force made its positions itself."""


def check_call(model: PreTrainedModel, named: dict[str, Any]) -> tuple[str, ...]:
    """The names of a call's tensors that may shape its mask, for `arguments`.

    Raises:
        UnsupportedModel: if an argument asks for what the engine does not do.
    """
    mask = named.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UnsupportedModel(
            "only a padding mask [batch, tokens] can be used with pruning; give attention_mask as one"
        )
    if names := [n for n in PACKED if named.get(n) is not None]:
        raise UnsupportedModel(
            f"{names[0]} packs several sequences into one row, which pruning does not keep apart; give each sequence a "
            "row of its own, with padding and attention_mask"
        )
    shows = named.get("output_attentions")
    if getattr(model.config, "output_attentions", False) if shows is None else shows:
        raise UnsupportedModel(
            "output_attentions=True asks for the attention weights, which are never made as a whole under pruning; leave "
            "it out, and see PrunedCache(..., trace=True) for what is evicted"
        )
    shaping = [n for n, x in named.items() if isinstance(x, Tensor) and n not in PLAIN]
    return (*shaping, *["position_ids"] * packs(named))


def packs(named: dict[str, Any]) -> bool:
    """Whether the positions of a call begin anew, which transformers takes for several sequences in a row."""
    positions = named.get("position_ids")
    if named.get("attention_mask") is not None or any(named.get(n) is not None for n in CACHE_NAMES):
        return False
    return positions is not None and positions.ndim == 2 and packed(positions)


def no_mask(*, mask_function: Callable[..., Tensor], **settings: Any) -> None:
    """Makes no mask, since the active pass knows where the padding is; a mask that says more is refused.

    Raises:
        UnsupportedModel: if it does.
    """
    names = arguments.get()
    if names is None or is_causal(mask_function) or shows_the_same(mask_function, **settings):
        return
    if "position_ids" in names:
        raise UnsupportedModel(
            "position_ids begin anew within a row, so several sequences are packed into it, which pruning does not keep "
            "apart; give each sequence a row of its own, with padding and attention_mask"
        )
    raise UnsupportedModel(
        f"{' or '.join(names) or 'an argument'} of the call makes tokens see later ones, or hides earlier ones from them "
        "(an image, a prefix), and pruning computes causal attention alone; leave it out, or do not prune this input"
    )


def shows_the_same(
    mask_function: Callable[..., Tensor],
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **settings: Any,
) -> bool:
    """Whether a mask is causal attention, or a sliding window, on this call's tokens that are no padding.

    The mask is made as the model would make it; arguments as transformers gives them.
    """
    settings |= {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    shown = made_mask(mask_function, attention_mask, settings)
    device = shown.device
    key = torch.arange(kv_length, device=device) + kv_offset
    distance = (torch.arange(q_length, device=device) + q_offset)[:, None] - key
    expected = (distance >= 0).expand_as(shown)
    if attention_mask is not None:
        real = attention_mask.to(device)[:, : kv_offset + kv_length]
        queries = real[:, q_offset : q_offset + q_length][:, None, :, None]
        expected = expected & real[:, None, None, kv_offset:] & queries
        shown = shown & queries
    windows = {None, local_size, getattr(config, "sliding_window", None)}
    return any(torch.equal(shown, expected if w is None else expected & (distance < w)) for w in windows)


AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
