"""Attributes of transformers and accelerate that are not documented, and errors of any kind from what they read.

Tried with transformers 5.24.0 and accelerate 1.15.0.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.quantizers import AutoHfQuantizer

from a2sf.errors import ConfigError, first_line

ATTENTION = "_attn_implementation"
"""The property of a config that names the model's attention; it is read at every call."""
_STATED_ATTENTION = "_attn_implementation_internal"

MaskFunction = Callable[..., Tensor]


@contextmanager
def refused(key: str, value: object, what: str) -> Iterator[None]:
    """Whatever is raised inside becomes one sentence that begins with `what`.

    Files of a model are read by code of many authors, which raises errors of any kind.

    Raises:
        ConfigError: of `key` and `value`.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(key, value, f"{what} ({type(error).__name__}: {first_line(error)})") from error


def check_quantizer(settings: Any, key: str, value: object) -> None:
    """Refuse quantised weights that cannot be read here.

    Raises:
        ConfigError: of `key` and `value`.
    """
    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        why = f"its weights are quantised ({method}), and what reads them is missing: {first_line(error)}"
        raise ConfigError(key, value, why) from error


def can_set_attention(model: PreTrainedModel) -> bool:
    """Whether a model's attention is reached by AttentionInterface."""
    return bool(model._can_set_attn_implementation())


def eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The `eager` attention of a layer, which the code of each model has for itself; torch's where it has none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", AttentionInterface()["sdpa"])


def stated_attention(config: PreTrainedConfig) -> Any:
    """Which attention the config itself names, whoever reads it."""
    return getattr(config, _STATED_ATTENTION, None)


def set_stated_attention(config: PreTrainedConfig, name: Any) -> None:
    """Name another one."""
    vars(config)[_STATED_ATTENTION] = name


def execution_device(model: PreTrainedModel) -> torch.device | None:
    """Where accelerate begins to compute a model that is spread over devices; None for any other model."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if device is None:
        return None
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def is_spread(model: PreTrainedModel) -> bool:
    """Whether accelerate moves a model's tensors between devices."""
    return getattr(model, "_hf_hook", None) is not None


def expected_missing(model: PreTrainedModel) -> tuple[str, ...]:
    """Patterns of parameters that transformers does not report where a checkpoint lacks them."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def was_read(parameter: Tensor) -> bool:
    """Whether `from_pretrained` set a parameter from the files."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def packed(positions: Tensor) -> bool:
    """Whether positions [B, T] begin anew within a row, which transformers takes for several sequences."""
    return find_packed_sequence_indices(positions) is not None


def made_mask(mask_function: MaskFunction, attention_mask: Tensor | None, settings: Mapping[str, Any]) -> Tensor:
    """The mask [B, 1, T, columns] that transformers would make of a mask function, always made."""
    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made = sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **(dict(settings) | always))
    assert made is not None
    return made


def is_causal(mask_function: MaskFunction) -> bool:
    """Whether transformers made a mask function of causal attention and sliding windows alone."""
    found = {_code(part) for part in _parts(mask_function)}
    return _CAUSAL in found and found <= {_CAUSAL, _WINDOW}


def _parts(mask_function: MaskFunction) -> list[MaskFunction]:
    """The functions of which all must show a token, as far as they are known."""
    if _code(mask_function) is not _ALL:
        return [mask_function]
    (functions,) = (cell.cell_contents for cell in getattr(mask_function, "__closure__", ()))
    return [part for function in functions for part in _parts(function)]


def _code(function: Callable[..., Any]) -> Any:
    return getattr(function, "__code__", None)


_CAUSAL, _ALL, _WINDOW = (_code(f) for f in (causal_mask_function, and_masks(), sliding_window_overlay(1)))


class Choosing:
    """How transformers' `generate` chooses the next token with some settings: what it does to logits, and whether it draws.

    Args:
        settings: of generation; those that are not given are the model's.
        device: of the logits. A model on several devices may name one that holds no numbers.

    Attributes:
        eos: tokens that end a text.
        draws: whether tokens are drawn one by one; draws_at_all: in any way, such as the beams of a search.
        changes_scores: whether anything is done to logits before a token is chosen.
        plain: whether it is greedy search or sampling, token by token, and needs nothing but logits.
    """

    def __init__(self, model: PreTrainedModel, settings: Mapping[str, Any], device: torch.device) -> None:
        self._model: Any = model
        self._device = device
        prepare: Any = model._prepare_generation_config
        self._config, beyond = prepare(None, **settings)
        mode = self._config.get_generation_mode()
        self.draws = mode == GenerationMode.SAMPLE
        self.draws_at_all = bool(self._config.do_sample)
        guided = self._config.guidance_scale not in (None, 1)
        needs_more = guided or self._config.stop_strings or self._config.max_time or self._config.watermarking_config
        one = (self._config.num_return_sequences or 1) == 1
        self.plain = (
            mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH) and one and not (beyond or needs_more)
        )
        eos = self._config.eos_token_id
        self.eos = frozenset({*(eos if isinstance(eos, list) else [eos])} - {None})
        self._made: dict[int, Any] = {}
        self.changes_scores = self.plain and bool(self._processors(1))

    def scores(self, logits: Tensor, tokens: Sequence[int], prompt: int) -> Tensor:
        """The logits [1, vocabulary] that follow a text as tokens are chosen from them.

        Args:
            tokens: the text so far, of which the first `prompt` are the prompt.
        """
        given = torch.tensor([list(tokens)], device=logits.device)
        return self._processors(prompt)(given, logits)

    def _processors(self, prompt: int) -> Any:
        if prompt not in self._made:
            config = copy.deepcopy(self._config)
            self._model._prepare_special_tokens(config, True, device=self._device)
            self._made[prompt] = self._model._get_logits_processor(
                config, input_ids_seq_length=prompt, device=str(self._device), model_kwargs={}
            )
        return self._made[prompt]
