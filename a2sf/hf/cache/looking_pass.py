"""The first call through a `PrunedCache`, if the policy looks at the prompts: they are cut once it has seen all layers.

What is retained may depend on all layers. So each layer reads the prompts with the full cache, and holds what they leave
until the end of the call. There, the prompts' last tokens are attended again with what the policy decided, and cut.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from a2sf.engine.state import EvictionState, Options
from a2sf.hf.attention.looking import Look, hidden_noted
from a2sf.hf.cache.attention_cache import NewTokens
from a2sf.hf.cache.budgets import retention_of_prompts
from a2sf.hf.cache.cache_pass import CachePass
from a2sf.hf.cache.layer import PrunedLayer
from a2sf.hf.reader import check_rules, concluded, look_of


class HeldPrompts(NamedTuple):
    """The prompts of a layer before their last tokens, and these.

    Attributes:
        state: of the tokens before.
        shape: as `PrunedLayer.shape`.
        last: query, key and value of the last tokens, [B, heads, 1, D] each.
        options: how the layer computes its attention, as in `Pass.attend`.
    """

    state: EvictionState
    shape: dict[str, Any]
    last: tuple[Tensor, Tensor, Tensor]
    options: Options


@dataclass
class LookingPass(CachePass):
    """The call that reads the prompts.

    Attributes:
        looks: how the policy looks at each row's prompt.
        hidden: the input of a layer's attention, by layer, until the policy has seen it; empty if it does not use it.
        held: what each layer holds until the end of the call.
    """

    looks: list[Look] = field(default_factory=list)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    held: dict[int, HeldPrompts] = field(default_factory=dict)
    _hooks: ExitStack = field(default_factory=ExitStack)

    def begin(self) -> None:
        """Prepare to look at each row's prompt in every layer."""
        policy, starts, lengths = self.cache.policy, self.new.start.tolist(), self.new.length.tolist()
        self.looks = [look_of(policy, slice(s, s + n)) for s, n in zip(starts, lengths, strict=True)]
        model = self.cache.model_ref()
        assert model is not None
        self._hooks.enter_context(hidden_noted(model, self.hidden, self, self.looks))

    def read(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options, call: int) -> Tensor:
        cache_layer: PrunedLayer = self.cache.layers[layer]
        new, end = self.new, self.new.start + self.new.length - 1
        before = NewTokens(new.start, new.length - 1, new.before, new.after - 1, new.columns)
        output = cache_layer.attend(query, key, value, before, options, None, call)
        state, shape = cache_layer.state(), cache_layer.shape
        last = (_column(query, end), _column(key, end), _column(value, end))
        of_last = cache_layer.attend(*last, self._last, options, None, call)
        at = end.to(output.device)[:, None, None, None].expand_as(of_last)
        output = output.scatter(2, at, of_last)
        hidden = self.hidden.pop(layer, None)
        with torch.no_grad():
            for row, look in enumerate(self.looks):
                of_row = None if hidden is None else hidden[row : row + 1]
                q, k, v = (x[row : row + 1] for x in (query, key, value))
                look.at(layer, q, k, v, options, of_row)
        self.held[layer] = HeldPrompts(state, shape, last, options)
        cache_layer.reset()
        return output

    def finish(self, completed: bool) -> None:
        """Cut the prompts.

        Raises:
            PolicyError: as `concluded` and `check_rules`.
            UserError: as `retention_of_prompts`.
        """
        self._hooks.close()
        held, self.held = self.held, {}
        if not completed or len(held) < self.layers:
            return  # that layers are missing is an error of the call
        cache, model = self.cache, self.cache.model_ref()
        assert model is not None
        with torch.no_grad():
            prompts = self.new.length.tolist()
            ready = [concluded(model, cache.policy, look) for look in self.looks]
            retention = retention_of_prompts(cache, prompts, prompts, ready)
            for before, after in zip(cache.retention, retention, strict=True):
                check_rules(cache.policy, before, after)
            cache.keep(retention, prompts)
            for layer in sorted(held):
                one = held.pop(layer)
                cache_layer, window = cache.layers[layer], one.shape["window"]
                cache_layer.restore(cache.batch_retention(layer, window), one.shape, one.state)
                cache_layer.attend(*one.last, self._last, one.options, cache.more)

    @property
    def _last(self) -> NewTokens:
        """The prompts' last tokens alone."""
        after = self.new.after
        return NewTokens(torch.zeros_like(after), torch.ones_like(after), after - 1, after, 1)


def _column(x: Tensor, at: Tensor) -> Tensor:
    """A column of each row of `x` [B, heads, T, D]."""
    index = at.to(x.device)[:, None, None, None].expand(-1, x.shape[1], 1, x.shape[3])
    return x.gather(2, index)
