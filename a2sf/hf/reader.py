"""What a policy finds out about a prompt before its cut: by looking at the pass that reads it, or by reading it itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.errors import PolicyError, UserError, place
from a2sf.hf.attention.function import attached
from a2sf.hf.attention.looking import Look, running_with_looks
from a2sf.hf.attention.plan import Plan
from a2sf.hf.attention.windows import global_layers
from a2sf.hf.calls.around import bare, idle
from a2sf.hf.devices import input_device
from a2sf.hf.layer_check import layers_of, positions_of, unpruned
from a2sf.hf.warned import Warned, caused_by
from a2sf.policies.base import Policy, Retention
from a2sf.policies.prepared import LayerRead, Numbers, Prepared

T = TypeVar("T")


@dataclass(frozen=True)
class ModelReader:
    """A `Reader` of a model.

    Attributes:
        hidden_states: whether `LayerRead` has the hidden states.
    """

    model: PreTrainedModel
    hidden_states: bool = False

    @property
    def layers(self) -> int:
        return layers_of(self.model)

    def read(self, tokens: Sequence[int], look: Callable[[LayerRead], T]) -> list[T]:
        """Read a text with the full cache, and return what `look` makes of each layer.

        Raises:
            UserError: if the text is longer than what the model can read.
        """
        most = positions_of(self.model)
        if len(tokens) > most:
            raise UserError(
                f"the policy reads {len(tokens)} tokens before a cut, and the model has {most} positions; use shorter "
                "prompts"
            )
        plan = Plan.of_one(len(tokens), unpruned(self.model), self.model.config)
        sees = Look(look, hidden_states=self.hidden_states)
        ids = torch.tensor([list(tokens)], device=input_device(self.model))
        with (
            torch.inference_mode(),
            idle(self.model),
            attached(self.model),
            running_with_looks(self.model, plan, [sees]),
        ):
            # without the head: logits of all tokens would take more memory than all layers
            bare(self.model)(ids, use_cache=False, logits_to_keep=1)
        return sees.results(self.layers)


def prepared_for(model: PreTrainedModel, policy: Policy, tokens: Sequence[int]) -> Prepared:
    """What `policy` prepares for a prompt, which is read for it.

    Raises:
        PolicyError: if its own code fails, or returns something else than it must.
    """
    with _own_code(policy, "prepare"):
        found = policy.prepare(ModelReader(model, policy.hidden_states), list(tokens))
    return _checked(found, model, policy, "prepare")


def look_of(policy: Policy, columns: Tensor | slice, warned: Warned | None = None) -> Look:
    """The look of `policy` at a prompt in a pass that reads it, for `concluded`; `warned`, if given, counts its warnings."""

    def of(read: LayerRead) -> Any:
        with _own_code(policy, "look"), caused_by(warned):
            return policy.look(read)

    return Look(of, columns, policy.hidden_states)


def concluded(model: PreTrainedModel, policy: Policy, look: Look, warned: Warned | None = None) -> Prepared:
    """What `policy` prepares for the prompt that its `look` saw in all layers; errors as `prepared_for`."""
    with _own_code(policy, "conclude"), caused_by(warned):
        found = policy.conclude(look.results(layers_of(model)))
    return _checked(found, model, policy, "conclude")


def uncut(retention: Sequence[Retention], tokens: int) -> tuple[Retention, ...]:
    """`retention` of each layer, while a prompt of `tokens` tokens is looked at: by the same rules, and nothing is evicted.

    With a prompt of a token more, so that it never ends.
    """
    most = max(tokens + 1, *(k.budget for k in retention))
    return tuple(
        replace(k, budget=most, recent=most if k.recent == k.budget else k.recent, growth=None) for k in retention
    )


def check_rules(policy: Policy, before: Sequence[Retention], after: Sequence[Retention]) -> None:
    """Refuse a policy that ranks tokens by another rule now than the one which its prompt was read with.

    Raises:
        PolicyError: if it does.
    """
    if any((k.rule, k.forgetting_factor) != (n.rule, n.forgetting_factor) for k, n in zip(before, after, strict=True)):
        raise PolicyError(
            f"policy {policy.name} looks at a prompt while it is read, and has another rule or forgetting factor at "
            "another budget; define prepare instead of look"
        )


@contextmanager
def _own_code(policy: Policy, method: str) -> Iterator[None]:
    """An error in a policy's method, as `PolicyError`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        at = place(error)
        where = f" ({at})" if at else ""
        raise PolicyError(f"policy {policy.name} fails in {method}: {type(error).__name__}: {error}{where}") from error


def _checked(found: Any, model: PreTrainedModel, policy: Policy, method: str) -> Prepared:
    """What a policy's method returned, if it is a `Prepared` of all layers."""
    if not isinstance(found, Prepared):
        raise PolicyError(f"policy {policy.name} prepares a {type(found).__name__}; {method} must return a Prepared")
    layers = layers_of(model)
    for name, given in (("numbers", found.numbers), ("shares", found.shares)):
        if given is not None and len(given) != layers:
            raise PolicyError(
                f"policy {policy.name} prepares {name} for {len(given)} layers, and the model has {layers}"
            )
    numbers = found.numbers and tuple(Numbers(n.of.detach().cpu()) for n in found.numbers)
    return replace(found, numbers=numbers, acts=global_layers(model.config))
