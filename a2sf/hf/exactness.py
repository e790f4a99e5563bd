"""Whether pruning a model is exact: a few tokens are read with a budget that evicts nothing, and compared with the model.

This finds what no attribute shows: a layer that does not use AttentionInterface, an attention that is not causal, an
argument or a mask that changes the result, positions that do not follow `position_ids`, a cache used in another way.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from a2sf.hf.attention.errors import NonFiniteError, UnsupportedModel
from a2sf.hf.attention.function import attached, running
from a2sf.hf.attention.plan import Plan
from a2sf.hf.attention.windows import mixes_windows, rope_switch
from a2sf.hf.calls.around import Around, bare, cache_name_of, idle, names_of
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.devices import input_device
from a2sf.hf.layer_check import agree, compare_layers, layers_of, likely, positions_of
from a2sf.policies.base import UNLIMITED, Retention

TOKENS, PROMPT, AFTER = 20, 10, 3
"""Tokens of a sequence read in one pass; of a prompt; and of those read one by one after it."""
LAYERS_WITHOUT_CACHE = {
    "chunked_attention": "layers that attend only within chunks of the text",
    "indexed_attention": "layers that choose which tokens they attend to",
    "minimax_m3_sparse": "layers that choose which tokens they attend to",
    "compressed_sparse_attention": "layers that attend to compressed tokens",
    "heavily_compressed_attention": "layers that attend to compressed tokens",
    "reference_sliding_attention": "layers that attend to a prompt and a window",
    "linear_attention": "layers that keep a recurrent state",
    "hybrid": "layers that keep a recurrent state",
    "hybrid_sliding": "layers that keep a recurrent state",
    "conv": "layers that are convolutions",
}
"""Types of layers, by their name in a config, that hold no plain KV cache, and what they are."""

_exact: weakref.WeakKeyDictionary[PreTrainedModel, torch.dtype] = weakref.WeakKeyDictionary()
_decodes: weakref.WeakKeyDictionary[PreTrainedModel, torch.dtype] = weakref.WeakKeyDictionary()
_checking = threading.RLock()
"""If several threads use a model first, one checks it and the others wait."""


def require_exact(model: PreTrainedModel) -> None:
    """As `check_exact`, but once per model and dtype; a refusal is not remembered, because its cause may be removed.

    Raises:
        UnsupportedModel: if pruning the model is not exact.
    """
    with _checking:
        if _exact.get(model) != model.dtype:
            check_exact(model)


def require_decoding(model: PreTrainedModel, cache: Callable[[], Any]) -> None:
    """As `check_decoding`, but once per model and dtype; a refusal is not remembered.

    Raises:
        UnsupportedModel: if decoding through the cache is not exact.
    """
    with _checking:
        if _decodes.get(model) != model.dtype:
            check_decoding(model, cache)


def check_exact(model: PreTrainedModel) -> None:
    """Compare one pass over two short sequences with a common beginning, packed as in scoring, with the model's own pass.

    Each layer's mask is also evaluated beyond these sequences, up to the model's last position.

    Raises:
        UnsupportedModel: if logits, a layer's attention or its mask differ.
    """
    name = type(model).__name__
    check_kind(model)
    tokens = length_for(model, TOKENS)
    shared = tokens // 2
    rest = tokens - shared
    a, b = tokens_of(model, 2, tokens)
    b[:shared] = a[:shared]
    plan = Plan(
        row=[0] * 3,
        start=[0, shared, tokens],
        length=[shared, rest, rest],
        parent=[-1, 0, 0],
        retention=lambda segment, layer: Retention(budget=UNLIMITED),
        layers=layers_of(model),
        policy_on_sliding=not mixes_windows(model.config),
    )
    device, call = input_device(model), bare(model)
    with torch.inference_mode(), idle(model), reported(model):
        own = likely(_logits(model, call(torch.tensor([a, b], device=device), use_cache=False)))
        if agree(own[:1, :shared], own[1:, :shared], model.dtype) is False:
            raise UnsupportedModel(f"{name} is not causal: later tokens change earlier ones; give a decoder")
        compare_layers(model, torch.tensor([a], device=device), call)
        read = [*a, *b[shared:]]
        index = torch.arange(1, len(read), device=device)
        try:
            with attached(model), running(plan):
                packed = logits_at(
                    model,
                    index,
                    call,
                    input_ids=torch.tensor([read], device=device),
                    position_ids=torch.tensor([[*range(tokens), *range(shared, tokens)]], device=device),
                    use_cache=False,
                )
        except NonFiniteError:
            return  # nothing to compare; a document with the same problem will be reported
    expected = torch.cat([own[:1, 1:], own[1:, shared:]], 1)
    if agree(expected, likely(packed), model.dtype) is False:
        what = "computes something around its attention that the engine does not reproduce"
        if "position_ids" not in names_of(model):
            what = "takes no position_ids, so it counts positions in its own way, which the engine does not reproduce"
        raise UnsupportedModel(f"{name} {what}; its pruned scores would be wrong, choose another model")
    _exact[model] = model.dtype


def check_decoding(model: PreTrainedModel, cache: Callable[[], Any]) -> None:
    """Compare a padded batch of two prompts, and some tokens read one by one, with the model's own cache.

    Args:
        cache: makes a bounded cache for the model, which evicts nothing.

    Raises:
        UnsupportedModel: if the logits differ; the model may still be exact in one pass.
    """
    name = type(model).__name__
    why = f"{name} gives other logits when it decodes through a pruned cache than through its own"
    prompt = length_for(model, PROMPT + AFTER) - AFTER
    padding = prompt // 3
    device = input_device(model)
    ids = torch.tensor(tokens_of(model, 2, prompt + AFTER), device=device)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    call, cache_name = Around(model, bare(model)), cache_name_of(model)  # leaves nothing on the model
    cuts = [(0, prompt), *((t, t + 1) for t in range(prompt, prompt + AFTER))]

    def read(held: Any) -> Tensor:
        logits = []
        for start, end in cuts:
            given: dict[str, Any] = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end]}
            given |= {"attention_mask": mask[:, :end], cache_name: held, "use_cache": True}
            logits.append(likely(_logits(model, call(**given))))
        return torch.cat(logits, 1)

    with torch.inference_mode(), idle(model), reported(model, "; it can be scored, not generated with"):
        own = read(DynamicCache(config=model.config))
        real = mask.bool()
        if not torch.isfinite(own[real].amax(-1)).all():
            return  # nothing to compare with; a document with the same problem will be reported
        ours = read(cache())
    if agree(own[real][None], ours[real][None], model.dtype) is False:
        raise UnsupportedModel(f"{why}, so generated text would be wrong; it can be scored, not generated with")
    _decodes[model] = model.dtype


def _logits(model: PreTrainedModel, output: Any) -> Tensor:
    """The logits of a model's output.

    Raises:
        UnsupportedModel: if it has none.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedModel(
            f"{type(model).__name__} gives no logits, as a part of a model does not; give the whole model, such as "
            "AutoModelForCausalLM loads"
        )
    return logits


@contextmanager
def reported(model: PreTrainedModel, more: str = "") -> Iterator[None]:
    """Turn any error of a check of `model` into one sentence, which `more` ends.

    Raises:
        UnsupportedModel: instead of any other error, except one for lack of memory.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, NonFiniteError):
        raise
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}{more}") from error
    except Exception as error:
        what = str(error).strip().partition("\n")[0].rstrip(".") or "no message"
        raise UnsupportedModel(
            f"{type(model).__name__} fails on a few tokens ({type(error).__name__}: {what}){more}"
        ) from error


def check_kind(model: PreTrainedModel) -> None:
    """Refuse a model whose config says that it is no decoder with a plain KV cache.

    Raises:
        UnsupportedModel: if it is not.
    """
    if model.training:
        raise UnsupportedModel(
            "the model is in training mode, where dropout changes every call; call model.eval() first"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModel("only decoder models have a cache to prune, and this one is an encoder-decoder")
    rope_switch(model.config)
    config = model.config.get_text_config()
    layers_of(model)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if kinds:
        described = [f"{k} ({LAYERS_WITHOUT_CACHE[k]})" if k in LAYERS_WITHOUT_CACHE else k for k in kinds]
        raise UnsupportedModel(
            f"the model has layers of types that hold no plain KV cache: {', '.join(described)}; choose another model"
        )


def length_for(model: PreTrainedModel, tokens: int) -> int:
    """`tokens`, or what the model can read as one sequence where that is less.

    Raises:
        UnsupportedModel: if that is next to nothing.
    """
    most = min(positions_of(model), rope_switch(model.config))
    if most < 2 * AFTER:
        raise UnsupportedModel(f"the model reads {most:.0f} tokens at most, too few to check it")
    return int(min(tokens, most))


def tokens_of(model: PreTrainedModel, rows: int, length: int) -> list[list[int]]:
    """Random tokens, always the same, without those that the config gives a meaning (an image, the end of a text)."""
    config = model.config.get_text_config()
    special = {
        value
        for settings in (model.config, config)
        for key, value in vars(settings).items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config.vocab_size, (4 * rows * length + len(special),), generator=generator).tolist()
    plain = [t for t in drawn if t not in special] or drawn
    return [[plain[(row * length + i) % len(plain)] for i in range(length)] for row in range(rows)]
