"""The policy, budget and schedule of a composed configuration, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from a2sf.engine.functional import attend
from a2sf.errors import ConfigError, UserError
from a2sf.hf.loading import ModelSpec, head_size_of, sizes_of
from a2sf.policies import find
from a2sf.policies.a2sf import check_factors
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget, check_list
from a2sf.policies.schedule import Schedule
from a2sf.sweep.config.grid import USED_KEYS, unused
from a2sf.sweep.config.keys import explain
from a2sf.sweep.config.schema import Config

DEFAULT_RATIO = 0.2
HEADS, TOKENS = 2, 24
"""Of the invented tokens on which a policy is tried."""


def policy_of(config: Config) -> Policy:
    """The policy with its settings.

    Raises:
        ConfigError, UserError: if there is no such policy or setting, or a value is not allowed.
    """
    node = dict(config.policy or {})
    if "_target_" not in node:
        raise ConfigError("policy", config.policy, "give the name of a file under conf/policy/")
    cls = find.load(str(node.pop("_target_")), "policy._target_")
    fields = [f.name for f in dataclasses.fields(cls)]
    if config.forgetting_factor is not None:
        check_factors(config.forgetting_factor)  # even if the policy ignores it
        if "forgetting_factor" in fields:
            node["forgetting_factor"] = config.forgetting_factor
    find.check_setting_names(cls, node)
    try:
        made: Policy = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), node))  # type: ignore[assignment]
        for key, value in node.items():
            if isinstance(getattr(made, key), str) and not isinstance(value, str):  # 1.1 may have been typed as 1.10
                allowed = f"it is text; write it in quotes, policy.{key}='\"…\"' on the command line"
                raise ConfigError(f"policy.{key}", value, allowed)
        try_out(made)
        return made
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise UserError(explain(error, "policy.")) from error


def try_out(policy: Policy) -> None:
    """Refuse settings of which only the ranking shows that they cannot serve, by some invented tokens.

    Raises:
        ConfigError: for a setting of the policy.
    """
    if not policy.tried:
        return
    tokens = torch.randn(1, HEADS, TOKENS, 2 * HEADS, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(policy.schedules[0])
    budget = max(TOKENS // 2, policy.min_budget)
    prompt = TOKENS if schedule.prompt else None
    try:
        attend(policy, tokens, tokens, tokens, budget=budget, schedule=schedule, prompt=prompt, backend="reference")
    except ConfigError as error:
        if error.key == "policy.by":
            raise
    except Exception:  # invented tokens may not suit it; an error is reported when the cell is computed
        return


def budget_of(config: Config, policy: Policy) -> Budget | None:
    """The budget, checked also if the policy uses none; None where it uses none.

    Raises:
        ConfigError: if a value is not allowed, or too small for the policy.
    """
    given = dataclasses.asdict(config.budget)
    if given["ratio"] is None and given["tokens"] is None:
        given["ratio"] = DEFAULT_RATIO
    budget = Budget(**given)  # checked even if the policy ignores it
    tokens = budget.tokens if isinstance(budget.tokens, tuple) else (budget.tokens,)
    for slots in tokens:
        if slots is not None and policy.uses_budget and slots < policy.min_budget:
            raise ConfigError(
                "budget.tokens",
                slots,
                f"recent + sinks may not exceed the budget, and {policy.name} protects {policy.min_budget} tokens",
            )
    return budget if policy.uses_budget else None


def schedule_of(config: Config) -> Schedule | None:
    """The schedule that is given; None: the policy's default.

    Raises:
        ConfigError: if a value is not allowed, or a key belongs to another schedule.
    """
    given = {k: v for k, v in dataclasses.asdict(config.schedule).items() if v is not None}
    if "when" not in given:
        for key, value in given.items():
            raise unused(key, value)
        return None
    Schedule(**given)  # checks also the keys that are not used
    used = ("when", *USED_KEYS.get(given["when"], ()))
    if given["when"] == "prompt" and given.get("then") == "every":
        if "every" not in given:
            raise ConfigError(
                "schedule.every", None, "schedule.then=every needs the number of tokens between two evictions"
            )
        used = (*used, "every")
    return Schedule(**{k: v for k, v in given.items() if k in used})


def check_layers(model: ModelSpec, policy: Policy, budget: Budget | None) -> None:
    """Refuse lists with a number per layer or head, gates and files that are for a model of other sizes.

    Raises:
        ConfigError: naming both numbers; or if the model's config cannot be read.
    """
    lists = [*vars(policy).values(), budget and budget.ratio, budget and budget.tokens]
    if policy.hidden_states or any(isinstance(x, tuple | Mapping) and x for x in lists):
        layers, kv_heads, hidden = sizes_of(model)
        policy.check(layers, kv_heads)
        if hidden is not None:
            policy.check_hidden(hidden)
        if type(policy).check_head_size is not Policy.check_head_size and (size := head_size_of(model)) is not None:
            policy.check_head_size(size)
        if budget:
            budget.check(layers)
            check_list(policy, budget, layers)
