"""The base class of token-pruning methods, and the numbers that a method gives to the engine.

For a budget of `C` cached tokens, a policy gives the number of newest tokens (`recent`) and of first tokens (`sinks`)
that are protected, the forgetting factor of the accumulated attention, and the rule that ranks the other tokens. A
ranking that is no data is one method, `priorities`. One engine (`a2sf.engine`) executes all policies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from a2sf.errors import ConfigError, PolicyError, definition
from a2sf.policies.prepared import LayerRead, Numbers, Prepared, Reader
from a2sf.policies.renamed import rename_methods
from a2sf.policies.rule import ACCUMULATED, AttentionRows, Rule, Sequence, Step, TokenFn
from a2sf.whole_numbers import set_whole_numbers, whole_number

if TYPE_CHECKING:  # so that commands which only list policies do not load torch
    from torch import Tensor

    from a2sf.policies.budget import Growth

UNLIMITED = 2**31 - 1
"""A budget that no sequence reaches: nothing is evicted."""
MOST_QUERIES = 2**16
"""The largest window of a policy that stores the queries in it, or numbers for each step, so that memory suffices."""
WHEN = ("step", "every", "prompt")
"""The schedules (`a2sf.policies.schedule`)."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What one layer retains of one sequence: the numbers of the recursion in docs/semantics.md, and the rule.

    Attributes:
        budget: how many tokens a KV head may hold between two steps, `C >= 1`.
        recent: how many of the newest tokens are never evicted, `r`.
        sinks: how many of the first tokens are never evicted, `s`; `r + s <= C`.
        forgetting_factor: what accumulated attention is multiplied by at every step, `0 <= a <= 1`.
        rule: how the other tokens are ranked.
        prepared: numbers for the prompt's tokens, which the policy prepared.
        growth: where the budget grows with the text, the numbers of every step; those above are of the first at which
            tokens may be evicted. None: they hold throughout.

    Raises:
        ValueError: if a number is out of range, or a number of tokens is not whole.
    """

    budget: int
    recent: int = 0
    sinks: int = 0
    forgetting_factor: float = 1.0
    rule: Rule = ACCUMULATED
    prepared: Numbers | None = None
    growth: Growth | None = None

    def after(self, tokens: int) -> Retention:
        """What is retained once `tokens` tokens are read."""
        return self if self.growth is None else self.growth.at(tokens - 1)

    def __post_init__(self) -> None:
        set_whole_numbers(self, "budget", "recent", "sinks")
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")
        if self.recent < 0 or self.sinks < 0 or self.recent + self.sinks > self.budget:
            raise ValueError(
                f"recent ({self.recent}) + sinks ({self.sinks}) must lie between 0 and the budget ({self.budget})"
            )
        if not 0.0 <= self.forgetting_factor <= 1.0:
            raise ValueError(f"forgetting_factor must lie in [0, 1], got {self.forgetting_factor}")


class Policy(ABC):
    """A token-pruning method: its settings as fields, and what they mean at a given budget.

    A method is one subclass, a frozen dataclass (`@dataclass(frozen=True, kw_only=True)`), so that equal settings are equal
    policies and can be keys of a dictionary. `retention` returns its numbers for a layer; a priority that is no data is
    computed by `priorities`. A new method is a file under `baselines/` and a YAML file under `conf/policy/`.
    """

    name: ClassVar[str]
    """Identifies the policy in configurations, results and tables."""
    label: ClassVar[str]
    """The policy's name in tables and plots."""
    uses_budget: ClassVar[bool] = True
    """False if the budget is ignored, so that all budgets are one cell."""
    evicts: ClassVar[bool] = True
    """False if nothing is ever evicted, so that all schedules are one cell."""
    schedules: ClassVar[tuple[str, ...]] = WHEN
    """The schedules that the policy supports."""
    causal: ClassVar[bool] = True
    """False for an oracle, which sees later tokens: an upper bound, never ranked with others nor used to generate."""
    memory: ClassVar[int] = 0
    """How many numbers `priorities` stores for each cached token."""
    unrotated: ClassVar[bool] = False
    """True if `priorities` uses keys or queries before the rotary embedding (`Step.unrotated_keys`)."""
    projected: ClassVar[bool] = False
    """True if `priorities` uses the projection after the attention (`Step.projection`)."""
    hidden_states: ClassVar[bool] = False
    """True if `look` or `prepare` uses the input of each layer's attention (`LayerRead.hidden`)."""
    tried: ClassVar[bool] = False
    """True if only its ranking shows whether its settings can serve, so that a sweep first tries it on invented tokens."""
    version: ClassVar[int] = 1
    """Raised when a change of the policy moves its numbers: results of an earlier version are not reused."""

    if TYPE_CHECKING:
        # not a dataclass itself: only so can its subclasses be frozen (as ours) or not (as a user's may be)
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Accept old method names, and keep subclasses hashable: `dataclass` would remove the hash of one not frozen."""
        super().__init_subclass__(**arguments)
        rename_methods(cls)
        if "__hash__" not in vars(cls):
            cls.__hash__ = Policy.__hash__  # type: ignore[method-assign]

    def __hash__(self) -> int:
        return hash((type(self), *(_hashable(getattr(self, f.name)) for f in fields(self))))

    @property
    def min_budget(self) -> int:
        """The smallest budget, in tokens, that holds all protected tokens; a smaller `budget.tokens` is refused."""
        return 1

    @property
    def queries(self) -> int:
        """Of how many last tokens `priorities` sees the queries, `W` of `Step.queries`."""
        return 0

    @abstractmethod
    def retention(self, budget: int, layer: int) -> Retention:
        """What layer `layer` (from 0) retains with a budget of `budget` tokens for each KV head."""

    def priorities(self, step: Step) -> Tensor | tuple[Tensor, Tensor]:
        """Priorities [B, K, N] of the cached tokens, for a method that a `Rule` cannot express as data.

        It may return (priorities, memory [B, K, N, memory]): the numbers to store for each token, which are in the next
        step's `memory`. Values in columns without a token are ignored. The result must depend on the step alone.
        """
        raise NotImplementedError

    def remember(self, rows: AttentionRows) -> Tensor:
        """For a method with `memory` that follows from attention alone: the memory [B, K, N, memory] after these rows.

        `priorities` then sees it in its step and returns priorities alone. A prompt that is read whole calls this for many
        tokens at once, and a step for one; the result must be the same in whatever parts the rows come.
        """
        raise NotImplementedError

    def at_entry(self, layer: int) -> TokenFn | None:
        """Priorities of layer `layer` as a function of each token alone, if they are fixed when it is cached; else None."""
        rule = self.retention(UNLIMITED, layer).rule
        fixed = not (rule.scored or rule.heads or rule.shared) and type(self).priorities is Policy.priorities
        return rule.bias if fixed else None

    def head_priorities(self, step: Step) -> Tensor:
        """For a method whose cut divides a layer's slots among its heads (`Cut.floor`) by other priorities, [B, K, N].

        A head gets as many slots as it has of the layer's largest ones, as far as `floor` says; which tokens it retains
        follows from `priorities`, or the rule.
        """
        raise NotImplementedError

    def merge(self, step: Step, evicted: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """For a method that merges what it evicts into what it retains: new values [B, K, N, V], or (values, keys).

        It is called at each step at which a token is evicted; `evicted` bool [B, K, N] says which. Of what it returns only
        the retained tokens of rows that evict are used. The result must depend on the step alone.
        """
        raise NotImplementedError

    def look(self, read: LayerRead) -> Any:
        """For a method whose cut of a prompt depends on what the model computes for it: what it notes of a layer.

        It is called for each layer with the whole prompt, which is read with the full cache until its cut.
        """
        raise NotImplementedError

    def conclude(self, found: list[Any]) -> Prepared:
        """What follows from `look`, by layer: numbers for the prompt's tokens, or shares of the layers."""
        raise NotImplementedError

    def prepare(self, model: Reader, tokens: list[int]) -> Prepared:
        """For a method that needs more than to look at a prompt: it may read the prompt, and more (`model.read`).

        It is called for each prompt that is cut.
        """
        return self.conclude(model.read(tokens, self.look))

    @property
    def prepares(self) -> bool:
        """Whether it sees what the model computes for a prompt before it is cut."""
        return type(self).prepare is not Policy.prepare or type(self).look is not Policy.look

    @property
    def looks(self) -> bool:
        """Whether it prepares a prompt by `look` alone, so that the pass that reads the prompt for the result suffices.

        False if the prompt's last queries count in the scores: which are the last may depend on what it finds.
        """
        if type(self).prepare is not Policy.prepare or type(self).look is Policy.look:
            return False
        rule = self.retention(UNLIMITED, 0).rule
        return rule.cut is None or not rule.scored

    def precompute(self, sequence: Sequence) -> Tensor:
        """Only for an oracle: numbers [B, K, T, M] for each token, computed from all tokens before the first step."""
        raise NotImplementedError

    def layer_budget(self, budget: int, layer: int, layers: int, prompt: int | None = None) -> int:
        """The budget of layer `layer` where the mean over all `layers` is `budget`; their sum must be `layers * budget`.

        Args:
            budget: tokens for each KV head, mean over layers.
            layer: index of the layer, from 0, among those that the policy acts on: in a model that mixes full attention with
                sliding windows, the layers with full attention.
            layers: number of these layers.
            prompt: length of the prompt in tokens, under the prompt schedule; else None.
        """
        return budget

    def divided_budget(
        self,
        budget: int,
        layer: int,
        layers: int,
        prompt: int | None = None,
        prepared: Prepared | None = None,
        acts: tuple[bool, ...] | None = None,
    ) -> int:
        """The budget of layer `layer` of all `layers`: `layer_budget`, or what was prepared for the prompt.

        Args:
            acts: on which layers the policy acts; None: on all. The others have `budget`, which has no effect.
        """
        if prepared is not None and prepared.divides and prompt is not None:
            return prepared.budgets(budget * layers, prompt)[layer]
        acts = acts or (True,) * layers
        return self.acting_budget(budget, layer, acts, prompt) if acts[layer] else budget

    def acting_budget(self, budget: int, layer: int, acts: tuple[bool, ...], prompt: int | None) -> int:
        """`layer_budget` of layer `layer` of all, counted among those that the policy acts on (True in `acts`)."""
        return self.layer_budget(budget, sum(acts[:layer]), sum(acts), *(() if prompt is None else (prompt,)))

    def keeps(
        self,
        budget: int,
        layer: int = 0,
        layers: int = 1,
        prompt: int | None = None,
        prepared: Prepared | None = None,
        acts: tuple[bool, ...] | None = None,
    ) -> Retention:
        """The complete retention of a layer, which the engine executes: `retention` at the layer's own budget, and the
        policy's `priorities` and `merge` in its rule, if it has them. The arguments are those of `divided_budget`.

        Raises:
            ConfigError: if it merges values and its rule retains the same tokens in all heads.
            PolicyError: if it states a larger budget than it is given, or its layers' budgets have a larger sum.
        """
        slots = self.divided_budget(budget, layer, layers, prompt, prepared, acts)
        retention = self.retention(slots, layer)
        if self.uses_budget and retention.rule.threshold is None:
            _check_held(self, budget, slots, retention, layers if acts is None else sum(acts), prompt)
        if prepared is not None and prepared.numbers is not None:
            retention = replace(retention, prepared=prepared.numbers[layer])
        return self.completed(retention)

    def completed(self, retention: Retention) -> Retention:
        """`retention` with the policy's `priorities`, `merge` and other functions in its rule, if it has them.

        Raises:
            ConfigError: if it merges values and its rule retains the same tokens in all heads, or sees too many queries.
        """
        functions: dict[str, Any] = {}
        if type(self).priorities is not Policy.priorities:
            precompute = None if self.causal else self.precompute
            functions = {"priority_fn": self.priorities, "memory": self.memory, "precompute": precompute}
        if type(self).remember is not Policy.remember:
            functions["memory_fn"] = self.remember
        if type(self).merge is not Policy.merge:
            if retention.rule.shared:
                why = "it merges values head by head, and its rule retains the same tokens in all heads of a layer"
                raise ConfigError("policy", self.name, why)
            functions["merge_fn"] = self.merge
        if type(self).head_priorities is not Policy.head_priorities:
            functions["division_fn"] = self.head_priorities
        if not functions:
            return retention
        seen: dict[str, Any] = {
            "queries": max(self.queries, retention.rule.queries),
            "unrotated": self.unrotated or retention.rule.unrotated,
            "projected": self.projected or retention.rule.projected,
        }
        if seen["queries"] > MOST_QUERIES:
            why = f"it looks at the queries of {seen['queries']:,} last tokens, and at most {MOST_QUERIES:,} are stored"
            raise ConfigError("policy", self.name, why)
        return replace(retention, rule=replace(retention.rule, **functions, **seen))

    def check(self, layers: int, kv_heads: int | None = None) -> None:  # noqa: B027 (most have nothing to check)
        """Raise `ConfigError` if a setting does not fit a model with `layers` layers of `kv_heads` KV heads each."""

    def check_hidden(self, size: int) -> None:  # noqa: B027
        """Raise `ConfigError` if a setting does not fit a model whose hidden states have `size` numbers."""

    def check_head_size(self, size: int) -> None:  # noqa: B027
        """Raise `ConfigError` if a setting does not fit a model whose heads have keys of `size` numbers."""

    def fetch(self) -> None:  # noqa: B027
        """Fetch what the policy needs from the hub. A sweep calls it once, before its first cell.

        Raises:
            ConfigError: if the hub does not give it.
        """

    def stored_settings(self) -> dict[str, Any]:
        """The settings as results store them and cells are identified by them. A renamed setting has its first name here."""
        return asdict(self)


def _check_held(policy: Policy, budget: int, slots: int, retention: Retention, layers: int, prompt: int | None) -> None:
    """Raise `PolicyError` if a layer states more than its `slots`, or the layers' budgets have too large a sum."""
    if retention.budget > slots:
        stated = "no limit" if retention.budget == UNLIMITED else f"{retention.budget} tokens"
        raise _too_many(policy, "retention", f"it may hold {slots} tokens in a layer and states {stated}")
    if type(policy).layer_budget is not Policy.layer_budget and (total := _sum(policy, budget, layers, prompt)):
        stated = f"{layers} layers that may hold {budget} tokens each hold {total} in all"
        raise _too_many(policy, "layer_budget", f"{stated}, and at most {layers * budget} are allowed")


@lru_cache(maxsize=4096)
def _sum(policy: Policy, budget: int, layers: int, prompt: int | None) -> int:
    """The slots that a policy gives all its layers; 0 if these are not more than it has."""
    known = () if prompt is None else (prompt,)
    total = sum(whole_number("layer_budget", policy.layer_budget(budget, i, layers, *known)) for i in range(layers))
    return total if total > layers * budget else 0


def _too_many(policy: Policy, method: str, why: str) -> PolicyError:
    where = definition(getattr(type(policy), method))
    return PolicyError(f"policy {policy.name}: {why}{f' ({where})' if where else ''}")


def _hashable(value: object) -> object:
    """A setting with tuples for lists and sets for mappings."""
    if isinstance(value, Mapping):
        return frozenset((key, _hashable(x)) for key, x in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def check_name(policy: type[Policy]) -> None:
    """Raise `ConfigError` if a policy has no name, or the name of another policy."""
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not name or not getattr(policy, "label", None):
        raise ConfigError("policy", policy.__qualname__, "it needs a name and a label, as class attributes")
    for other in subclasses(Policy):  # type: ignore[type-abstract]
        # the same class imported twice (defined again, or a module that is also run as a script) is not another policy
        again = other.__qualname__ == policy.__qualname__ and (
            other.__module__ == policy.__module__ or "__main__" in (other.__module__, policy.__module__)
        )
        if vars(other).get("name") == name and not again:
            owner = f"{other.__module__}.{other.__qualname__}"
            raise ConfigError("policy", name, f"{policy.__qualname__} needs another name, because {owner} has this one")


def subclasses(cls: type[Policy]) -> Iterator[type[Policy]]:
    """Every class below `cls`."""
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def check_share(key: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value <= 1.0:
        raise ConfigError(key, value, "give a number from 0 to 1")


def check_tokens(key: str, value: object, least: int = 0, most: int = UNLIMITED) -> None:
    """Raise `ConfigError` unless `value` is a whole number of `least` to `most` tokens."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(key, value, f"give a whole number of tokens, at least {least}")
    if value > most:
        raise ConfigError(key, value, f"give a whole number of tokens, at most {most:,}")


def check_seed(key: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(key, value, "give a whole number, at least 0")


def share_of(budget: int, share: float) -> int:
    """`share` of `budget` tokens, rounded down, exact in decimal: 0.7 of 10 tokens are 7."""
    return int(Decimal(str(share)) * budget)
