"""Which attention a model's configs name: another one in the calls that are pruned than in everybody else's.

transformers' models look up their attention, and how their masks are made, by `config._attn_implementation` at every call.
All threads share the config, so it is never set here. What it gives when it is read depends on who reads: a context (that
of a thread or of an asyncio task) that is in a pruned call sees another name, all others see the config's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from a2sf.hf.attention.held import Held

PROPERTY = "_attn_implementation"
OWN = "_attn_implementation_internal"
"""Where a config holds what the property gives."""

Configs = Mapping[int, PreTrainedConfig]
"""By `id`, because configs have no hash."""


_namings: Held[tuple[Configs, str | None]] = Held("namings")


@contextmanager
def named(configs: Configs, name: str | None) -> Iterator[None]:
    """`configs` name the attention `name` when they are read in this context; None: their own."""
    own = {i: getattr(config, OWN, None) for i, config in configs.items()}
    try:
        with _namings.holding((configs, name)):
            yield
    finally:
        for i, config in configs.items():
            # a model that was made of this config inside has written down what it read
            if name is not None and vars(config).get(OWN) == name != own[i]:
                vars(config)[OWN] = own[i]


def configs_of(model: nn.Module) -> Configs:
    """Every config that a part of `model` may read, which can be told from then on."""
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
    """Let the property of a class of configs (transformers' own, as good as always) ask the context first."""
    for base in kind.__mro__:
        prop = vars(base).get(PROPERTY)
        if isinstance(prop, property) and prop.fget is not None and prop.fget not in _readers:
            reader = _reader(prop.fget)
            _readers.add(reader)
            setattr(base, PROPERTY, property(reader, prop.fset, prop.fdel, prop.__doc__))


_readers: set[Callable[[Any], Any]] = set()


def _reader(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The getter of the property; `own` gives what the config itself names."""

    def read(config: PreTrainedConfig) -> Any:
        if not torch.compiler.is_compiling():  # compiled code is the model's own; pruned calls run outside of it
            for configs, name in _namings.innermost_first():
                if id(config) in configs:
                    return own(config) if name is None else name
        return own(config)

    return read
