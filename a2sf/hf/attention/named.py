"""Lets a model's configs name another attention in pruned calls than in all other calls.

At every call transformers' models look up their attention and their masks by `config._attn_implementation`. All threads
share the config, so it is never changed here. Instead its value depends on the context (of a thread or an asyncio task)
that reads it: in a pruned call it is another name, elsewhere the config's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from a2sf.compat.transformers import ATTENTION, set_stated_attention, stated_attention
from a2sf.hf.attention.context import ContextStack

Configs = Mapping[int, PreTrainedConfig]
"""By `id`, because configs have no hash."""


_namings: ContextStack[tuple[Configs, str | None]] = ContextStack("namings")


@contextmanager
def named(configs: Configs, name: str | None) -> Iterator[None]:
    """`configs` name the attention `name` when they are read in this context; None: their own."""
    stated = {i: stated_attention(config) for i, config in configs.items()}
    try:
        with _namings.entered((configs, name)):
            yield
    finally:
        for i, config in configs.items():
            # a model that was made with this config inside the block has stored the name that it read
            if name is not None and stated_attention(config) == name != stated[i]:
                set_stated_attention(config, stated[i])


def configs_of(model: nn.Module) -> Configs:
    """All configs that parts of `model` may read; their property depends on the context from then on."""
    found: dict[int, PreTrainedConfig] = {}
    todo = [x for module in model.modules() for x in vars(module).values() if isinstance(x, PreTrainedConfig)]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            todo += [x for x in vars(config).values() if isinstance(x, PreTrainedConfig)]
            _make_readable(type(config))
    return found


def _make_readable(kind: type) -> None:
    """Make the property of a class of configs (nearly always transformers' own) look at the context first."""
    for base in kind.__mro__:
        prop = vars(base).get(ATTENTION)
        if isinstance(prop, property) and prop.fget is not None and prop.fget not in _readers:
            reader = _reader(prop.fget)
            _readers.add(reader)
            setattr(base, ATTENTION, property(reader, prop.fset, prop.fdel, prop.__doc__))


_readers: set[Callable[[Any], Any]] = set()


def _reader(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The getter of the property; `own` gives the config's own name."""

    def read(config: PreTrainedConfig) -> Any:
        if not torch.compiler.is_compiling():  # compiled code is the model's own; pruned calls run outside of it
            for configs, name in _namings.innermost_first():
                if id(config) in configs:
                    return own(config) if name is None else name
        return own(config)

    return read
