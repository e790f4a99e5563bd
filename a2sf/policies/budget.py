"""How many tokens a layer may hold: a ratio of the sequence, a number of tokens, or a ratio of what was read so far."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from a2sf.errors import ConfigError, PolicyError, UserError, place
from a2sf.policies.base import UNLIMITED
from a2sf.policies.slots import head_slots

if TYPE_CHECKING:
    from a2sf.policies.base import Policy, Retention
    from a2sf.policies.prepared import Prepared
    from a2sf.policies.schedule import Schedule

BASES = ("total", "context", "seen")
MANY = 1024
"""Tokens of a budget with which it is tried whether a policy divides slots among layers."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A cache budget as a user gives it: exactly one of `ratio` and `tokens`, for all layers or as a list of one per layer.

    Attributes:
        ratio: share of the sequence, `0 < ratio <= 1`. `C = max(1, floor(ratio * T))`, exact in decimal.
        tokens: `C` itself, at least 1.
        base: what `ratio` is a share of. `total`: all tokens that the model reads for the request (context +
            continuation - 1), as in the paper. `context`: the tokens of the context. `seen`: the tokens read so far, so
            that `C` grows with the text (`Growth`). It is `total` if `tokens` is given.

    Raises:
        ConfigError: if a value is not allowed.
    """

    ratio: Any = None
    tokens: Any = None
    base: str = "total"

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ConfigError("budget.base", self.base, f"give one of {', '.join(BASES)}")
        if (self.ratio is None) == (self.tokens is None):
            raise ConfigError(
                "budget",
                f"{{ratio: {self.ratio}, tokens: {self.tokens}}}",
                "give exactly one of budget.ratio (0 < ratio <= 1) and budget.tokens (at least 1)",
            )
        if self.tokens is not None:  # a number has no base, so that equal budgets are one cell
            object.__setattr__(self, "base", "total")
        object.__setattr__(self, "ratio", _each("budget.ratio", self.ratio, _check_ratio))
        object.__setattr__(self, "tokens", _each("budget.tokens", self.tokens, _check_tokens))

    def check(self, layers: int) -> None:
        """Raise `ConfigError` if a list does not have one entry for each of `layers` layers."""
        for key in ("ratio", "tokens"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != layers:
                raise ConfigError(
                    f"budget.{key}",
                    list(value),
                    f"a list needs one entry per layer, {layers} for this model, and this one has {len(value)}",
                )

    @property
    def grows(self) -> bool:
        """Whether `C` grows with the text."""
        return self.ratio is not None and self.base == "seen"

    def slots(self, *, total: int, context: int, layer: int) -> int:
        """`C` for one sequence in one layer; with base `seen` once `total` tokens are read.

        Args:
            total: number of tokens that the model reads for the request, `T`.
            context: number of tokens in its context.
            layer: index of the layer, from 0.
        """
        if self.tokens is not None:
            return self.tokens[layer] if isinstance(self.tokens, tuple) else self.tokens
        ratio = self.ratio[layer] if isinstance(self.ratio, tuple) else self.ratio
        # decimal, because floor(0.29 * 100) is 28 in binary floating point
        return max(1, int(Decimal(str(ratio)) * (context if self.base == "context" else total)))

    def layer_slots(self, total: int, context: int, layers: int, prepared: Prepared | None = None) -> list[int]:
        """`slots` of each layer; their mean for all, where the policy's `prepared` says how slots are divided."""
        slots = [self.slots(total=total, context=context, layer=i) for i in range(layers)]
        return [sum(slots) // layers] * layers if prepared is not None and prepared.divides else slots


def check_list(policy: Policy, budget: Budget, layers: int) -> None:
    """Refuse budgets that differ between layers under a policy that divides the slots of the model among its layers.

    Its budget of a layer follows from the mean over all, so that the layers together would hold another number of slots.

    Raises:
        ConfigError: naming the policy.
    """
    key = "ratio" if budget.tokens is None else "tokens"
    given = getattr(budget, key)
    if isinstance(given, tuple) and len(set(given)) > 1 and divides_slots(policy, layers):
        why = f"{policy.name} divides the slots of the model among its layers itself; give one number"
        raise ConfigError(f"budget.{key}", list(given), why)


def divides_slots(policy: Policy, layers: int) -> bool:
    """Whether a policy's settings divide the slots of a model among its layers unequally."""
    many = policy.min_budget + MANY
    with suppress(Exception):  # the policy's own code; its error is reported where it is used
        return any(policy.acting_budget(many, i, (True,) * layers, None) != many for i in range(layers))
    return False


def retained(
    policy: Policy,
    slots: int,
    layer: int,
    layers: int,
    prompt: int | None = None,
    prepared: Prepared | None = None,
    acts: tuple[bool, ...] | None = None,
) -> Retention:
    """What a layer retains with a budget of `slots`; the other arguments as for `Policy.keeps`.

    Raises:
        UserError: if the policy protects more tokens than the budget holds, or its own code fails.
    """
    try:
        return policy.keeps(slots, layer, layers, prompt, prepared, acts)
    except UserError:
        raise
    except Exception as error:  # the policy's own code
        at = f" ({where})" if (where := place(error)) else ""
        if isinstance(error, ValueError):
            raise UserError(f"policy {policy.name} does not fit a budget of {slots} tokens: {error}{at}") from error
        raise PolicyError(f"policy {policy.name} fails: {type(error).__name__}: {error}{at}") from error


@dataclass(frozen=True)
class Growth:
    """What a layer retains at each step, where its budget is a ratio of the tokens read so far.

    Equal sequences of tokens have equal caches, however long they get: the numbers depend on the position alone. They change
    rarely (at a ratio of 0.2, every fifth token), and are computed once.

    Attributes:
        policy, layer, layers, prepared, acts: the arguments of `Policy.keeps`.
        budget: a ratio of base `seen`.
        prompt: tokens of the prompt, under the prompt schedule: nothing is evicted before its last token, whose numbers hold
            until then. None: under the other schedules.
        head: a KV head with numbers of its own (`Rule.heads`); None: what holds for the layer.
    """

    policy: Policy
    budget: Budget
    layer: int
    layers: int
    prompt: int | None = None
    prepared: Prepared | None = None
    head: int | None = None
    acts: tuple[bool, ...] | None = None

    def __hash__(self) -> int:
        # without the policy's settings, which may be long
        return hash((self.policy.name, self.budget, self.layer, self.prompt, self.head))

    @property
    def first(self) -> int:
        """Position of the first token after which tokens may be evicted."""
        return 0 if self.prompt is None else max(0, self.prompt - 1)

    def of_head(self, head: int) -> Growth:
        """That of one KV head, where each has numbers of its own."""
        return replace(self, head=head)

    def at(self, position: int) -> Retention:
        """What is retained at the step of the token at `position`, from 0.

        Raises:
            UserError: if the policy has another rule or forgetting factor at another budget, or as `retained`.
        """
        starts, numbers = self._phases(position + 1)
        return numbers[max(0, bisect_right(starts, position) - 1)]

    def phases(self, begin: int, end: int) -> list[tuple[int, Retention]]:
        """The positions in `[begin, end)` from which other numbers hold, `begin` the first of them, and these numbers."""
        starts, numbers = self._phases(end)
        i = max(0, bisect_right(starts, begin) - 1)
        later = [(p, k) for p, k in zip(starts[i + 1 :], numbers[i + 1 :], strict=True) if p < end]
        return [(begin, numbers[i]), *later]

    def cached(self, tokens: int, spare: int) -> list[int]:
        """Tokens that a KV head holds after each of at least `tokens` tokens, mean over the heads.

        Args:
            spare: tokens beyond the budget that may be cached between two steps (`Schedule.spare`).
        """
        key = f"_cached_{spare}"
        known: list[int] = self.__dict__.get(key, [])
        if len(known) < tokens:
            known = list(known)
            for t in range(len(known), tokens):
                held = known[-1] + 1 if known else 1
                if t >= self.first:
                    C = self.at(t).budget
                    most = C if self.prompt is not None and t == self.first else C + spare
                    held = C if held > most else held
                known.append(held)
            self.__dict__[key] = known  # a new list, so that no other thread sees one half made
        return known

    def given_back(self, position: int, spare: int) -> int:
        """How many tokens each KV head evicts at the step of `position`, in the mean over the heads."""
        held = self.cached(position + 1, spare)
        return (held[position - 1] if position else 0) + 1 - held[position]

    def _phases(self, end: int) -> tuple[tuple[int, ...], tuple[Retention, ...]]:
        """The positions below `end`, or some more, at which numbers change, and the numbers from there on."""
        starts, numbers, slots, known = self.__dict__.get("_table", ((), (), 0, self.first))
        if known < max(end, self.first + 1):
            new_starts, new = list(starts), list(numbers)
            for position in range(known, max(end, self.first + 1)):
                C = self._slots(position + 1)
                if slots == C:
                    continue
                slots, made = C, self._numbers(C)
                if new and (made.rule, made.forgetting_factor) != (new[0].rule, new[0].forgetting_factor):
                    raise UserError(
                        f"the policy {self.policy.name} has another rule or forgetting factor at a budget of {C} tokens "
                        f"than at {new[0].budget}, so that its budget cannot grow; give budget.base=total or context"
                    )
                if not new or made != new[-1]:
                    new_starts.append(position)
                    new.append(made)
            starts, numbers = tuple(new_starts), tuple(new)
            self.__dict__["_table"] = starts, numbers, slots, max(end, self.first + 1)
        return starts, numbers

    def _slots(self, tokens: int) -> int:
        if self.prepared is not None:
            return self.budget.layer_slots(tokens, 0, self.layers, self.prepared)[self.layer]
        return self.budget.slots(total=tokens, context=0, layer=self.layer)

    def _numbers(self, slots: int) -> Retention:
        made = retained(self.policy, slots, self.layer, self.layers, self.prompt, self.prepared, self.acts)
        if self.head is None:
            return made
        one = made.rule.heads[self.head]
        C, recent, sinks = head_slots(made.rule.heads, made.budget)[self.head]
        rule = replace(made.rule, heads=(), mean_over_age=one.mean_over_age)
        factor = one.forgetting_factor
        return replace(made, budget=C, recent=recent, sinks=sinks, forgetting_factor=factor, rule=rule)


def growing(
    policy: Policy,
    budget: Budget,
    layers: int,
    schedule: Schedule,
    prompt: int | None = None,
    prepared: Prepared | None = None,
    acts: tuple[bool, ...] | None = None,
) -> tuple[Retention, ...]:
    """What each layer retains with a budget of base `seen`; under the schedule `prompt` that keeps, of a number.

    Args:
        prompt: tokens of the prompt, under the prompt schedule.
        prepared: what `policy.prepare` returned for it.
        acts: as for `Policy.keeps`.

    Raises:
        UserError: as `retained`.
    """
    # rows of one policy share their numbers; what was prepared has a prompt's tensors, which are not held on to
    if prepared is None:
        made = _shared(id(policy), policy, budget, layers, prompt, acts)
    else:
        made = _made(policy, budget, layers, prompt, prepared, acts)
    stated = tuple((g, g.at(0)) for g in made)
    if schedule.prompt and schedule.then == "keep":  # the cut is all that evicts
        return tuple(first for _, first in stated)
    return tuple(replace(first, growth=g) for g, first in stated)


def _made(
    policy: Policy,
    budget: Budget,
    layers: int,
    prompt: int | None,
    prepared: Prepared | None,
    acts: tuple[bool, ...] | None,
) -> tuple[Growth, ...]:
    return tuple(Growth(policy, budget, i, layers, prompt, prepared, acts=acts) for i in range(layers))


@lru_cache(maxsize=1024)
def _shared(
    of: int, policy: Policy, budget: Budget, layers: int, prompt: int | None, acts: tuple[bool, ...] | None
) -> tuple[Growth, ...]:
    """As `_made`; `of` is the policy's id, because the rules of an equal policy are functions of another object."""
    return _made(policy, budget, layers, prompt, None, acts)


def _each(key: str, value: Any, check: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ConfigError(key, list(value), "the list is empty; give one number, or one per layer")
        return tuple(check(key, v) for v in value)
    return check(key, value)


def _check_ratio(key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:  # NaN fails the comparison
        raise ConfigError(key, value, "give a number with 0 < ratio <= 1, or a list of one per layer")
    return float(value)


def _check_tokens(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(key, value, "give a whole number of tokens, at least 1, or a list of one per layer")
    if value > UNLIMITED:
        raise ConfigError(key, value, f"give at most {UNLIMITED:,} tokens, which no text has")
    return value
