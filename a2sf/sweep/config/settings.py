"""From a composed configuration to the cells it asks for, every value checked (the keys: `a2sf.sweep.config.schema`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from a2sf.engine.kernels import BACKENDS
from a2sf.errors import ConfigError, UserError, nearest
from a2sf.hf.loading import ModelSpec, sizes_of
from a2sf.hf.settings import check_cut
from a2sf.policies import find
from a2sf.policies.a2sf import check_factors
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.renamed import notice
from a2sf.policies.schedule import Schedule, nondefault_schedule
from a2sf.scoring.lm import check_batch_size
from a2sf.store.aggregates import Average, Group, Member
from a2sf.sweep.cell import Cell
from a2sf.sweep.config.grid import LOOKED_AT, unused
from a2sf.sweep.config.keys import check_keys, explain
from a2sf.sweep.config.schema import Config, EarlyStoppingConfig, renamed
from a2sf.sweep.stopping_rule import StoppingRule
from a2sf.tasks.definitions import Definition
from a2sf.tasks.prompting import Prompting, packed, plain_mapping
from a2sf.tasks.spec import DataSpec, TaskSpec, aggregates, arguments_of, expand_suite, include, resolve
from a2sf.tracking.tracker import TrackerSpec

DEFAULT_RATIO = 0.2
MAX_SHOTS = 1000
LONGEST_SWEEP_NAME = 200


@dataclass(frozen=True)
class Settings:
    """One checked point of a grid: its cells, and what is not part of a cell.

    Attributes:
        groups: what is made of its cells' scores.
        include: the names in `tasks`, and the folder of the user's own definitions; None where there is none.
        idle: keys that are given -> why no task of this point has a use for it; None where one has.
        planned: names of the cells that a sweep gave a worker, which computes no others; None: there is no sweep.
    """

    cells: tuple[Cell, ...]
    tracker: TrackerSpec
    batch_size: int | None
    sweep_name: str
    runs_dir: str
    plan_only: bool
    trace: int
    checkpoint: float
    groups: tuple[Group, ...] = ()
    include: tuple[tuple[str, ...], Path] | None = None
    idle: dict[str, ConfigError | None] = field(default_factory=dict, compare=False)
    planned: frozenset[str] | None = None


DIFFERING = ("policy", "budget", "schedule", "forgetting_factor")
"""The keys in which the cells of a group differ."""


def as_group(points: Sequence[DictConfig], planned: Sequence[str]) -> str:
    """The value of the key `group` that gives a worker the cells of some points beside its own.

    Args:
        planned: names of all its cells.
    """
    # with each point's own values: what names another key would be read with the first one's
    made = [{k: OmegaConf.to_container(p, resolve=True)[k] for k in DIFFERING} for p in points]  # type: ignore[index, call-overload]
    return json.dumps({"others": made, "planned": list(planned)})


def read(composed: DictConfig, model_names: dict[str, str] | None = None, *, here: bool = True) -> Settings:
    """Check a composed configuration and list its cells.

    Args:
        composed: what Hydra composed on the schema, without its own `hydra` node.
        model_names: model path -> short name, for paths known under `conf/model/`.
        here: whether this machine is the one that computes, so that it must have the GPUs that are asked for.

    Raises:
        ConfigError: for the first value that is not allowed; nothing slow has happened then.
    """
    if composed.get("group"):
        made, group = [], json.loads(composed.group)
        for differing in ({}, *group["others"]):
            one = composed.copy()
            for key, value in {"group": None, **differing}.items():
                OmegaConf.update(one, key, value, merge=key != "policy")  # which is another one
            made.append(read(one, model_names))
        cells = tuple(c for s in made for c in s.cells)
        return dataclasses.replace(made[0], cells=cells, planned=frozenset(group["planned"]))
    config = _typed(composed)
    if not config.model.path:
        raise ConfigError("model.path", "''", "give a hub id, a directory or a GGUF file")
    model = ModelSpec(**{f.name: getattr(config.model, f.name) for f in dataclasses.fields(ModelSpec) if f.init})
    if here:
        model.check_here()
    name = config.model.name or (model_names or {}).get(model.path) or model.path.rstrip("/").rpartition("/")[2]
    if model.added is not None and not config.model.name:
        name = f"{name}+{model.added.name}"
    policy = _policy(config)
    budget = _budget(config, policy)
    schedule = nondefault_schedule(policy, _schedule(config))
    if model.pinned:  # else once it is, by whoever pins it
        check_layers(model, policy, budget)
    if config.shots is not None and not 0 <= config.shots <= MAX_SHOTS:
        raise ConfigError("shots", config.shots, "give a whole number of examples, at least 0")
    if config.limit is not None and config.limit < 1:
        raise ConfigError("limit", config.limit, "give a number of documents of at least 1, or null for all")
    if config.trace < 0:
        raise ConfigError("trace", config.trace, "give the number of documents to trace, at least 0")
    if not config.checkpoint > 0:
        raise ConfigError("checkpoint", config.checkpoint, "give a number of seconds above 0")
    if config.backend not in ("auto", *BACKENDS):
        raise ConfigError("backend", config.backend, f"give auto or one of {', '.join(BACKENDS)}")
    name_of_sweep = config.sweep_name
    if not name_of_sweep.isprintable() or "/" in name_of_sweep or name_of_sweep.strip(" .") != name_of_sweep:
        allowed = "give the name of a folder, without a slash, and without a dot or space first or last"
        raise ConfigError("sweep_name", repr(name_of_sweep), allowed)
    if not 1 <= len(name_of_sweep.encode()) <= LONGEST_SWEEP_NAME:
        raise ConfigError("sweep_name", repr(name_of_sweep), f"give 1 to {LONGEST_SWEEP_NAME} bytes of text")
    data = DataSpec(**dataclasses.asdict(config.data))
    folder = include(config.include_path)
    asked = expand_suite(config.tasks)
    # a group may want shots of its own for a member
    members = [(task, d) for task in asked for d in resolve(task, folder)]
    generating = [d.ref for _, d in members if TaskSpec(d.ref).generates]
    for task in () if policy.causal else generating:
        raise ConfigError("policy", policy.name, f"it looks at later tokens, and the task {task} generates text")
    gen_kwargs = plain_mapping("gen_kwargs", config.gen_kwargs)
    prompting = Prompting(
        config.chat_template, config.system_instruction, config.fewshot_as_multiturn, packed(gen_kwargs)
    )
    arguments, idle = _arguments(config, members)
    if config.fewshot_as_multiturn:
        why = "it needs chat_template=true; without a template all is one text"
        idle["fewshot_as_multiturn"] = (
            None if prompting.chat_template else ConfigError("fewshot_as_multiturn", "true", why)
        )
    if gen_kwargs:
        why = "none of the tasks generates text; leave it out"
        idle["gen_kwargs"] = None if generating else ConfigError("gen_kwargs", config.gen_kwargs, why)

    def shots_for(d: Definition) -> int:
        return (d.shots or 0) if config.shots is None else config.shots

    rule = _stopping_rule(config, generating)
    if schedule is not None and schedule.before_question:
        check_cut(budget, schedule)
        for _, d in members:
            if TaskSpec(d.ref, data).shared_context is None:
                raise ConfigError(
                    "schedule.at",
                    schedule.at,
                    f"the task {d.name} does not say where its context ends (shared_context in its metadata); give prompt",
                )
    shots_of = [(d.ref, shots_for(d)) for _, d in members]
    cells = tuple(
        Cell(
            model_name=name,
            model=model,
            policy=policy,
            budget=budget,
            schedule=schedule,
            task=task,
            shots=shots,
            limit=config.limit,
            seed=config.seed,
            data=dataclasses.replace(data, task_args=arguments.get(task) or ""),
            backend=config.backend,
            stopping_rule=rule,
            prompting=prompting.of(task in generating, shots),
            log_samples=config.log_samples,
        )
        for task, shots in dict.fromkeys(shots_of)
    )
    return Settings(
        cells=cells,
        tracker=TrackerSpec.chosen(**dataclasses.asdict(config.tracker)),
        batch_size=check_batch_size(config.batch_size),
        sweep_name=config.sweep_name,
        runs_dir=config.runs_dir,
        plan_only=config.plan_only,
        trace=config.trace,
        groups=tuple(
            Group(
                g.name,
                tuple(Average(*a) for a in g.averages),
                tuple(Member(d.name, shots_for(d), d.digest()) for d in g.members),
            )
            for task in asked
            for g in aggregates(task, folder)
        ),
        include=(tuple(asked), folder) if folder else None,
        idle=idle,
        checkpoint=config.checkpoint,
    )


def _arguments(
    config: Config, members: list[tuple[str, Definition]]
) -> tuple[dict[str, str | None], dict[str, ConfigError | None]]:
    """`task_args` by task, and by argument why no task uses it, or None if one does."""
    given = plain_mapping("task_args", config.task_args)
    names = {n for asked, d in members for n in (asked, d.name, d.entry.name)}
    used: dict[str, str | None] = {}
    idle: dict[str, ConfigError | None] = {}
    for asked, d in members if given else ():
        found = arguments_of(d, asked, given, names)
        told_it = packed({a.name: a.value for a in found if a.refusal is None})
        if used.setdefault(d.ref, told_it) != told_it:
            why = f"{d.name} is asked for twice, with different arguments; ask for it once"
            raise ConfigError("task_args", config.task_args, why)
        for a in found:
            told = None if a.refusal is None else ConfigError(a.key, a.value, a.refusal)
            idle[a.key] = told and idle.get(a.key, told)
    return used, idle


def refuse_idle(settings: Sequence[Settings]) -> None:
    """Refuse a key that is given and that no cell of a whole grid has a use for.

    Raises:
        ConfigError: naming it.
    """
    for key in dict.fromkeys(k for s in settings for k in s.idle):
        told = [s.idle[key] for s in settings if key in s.idle]
        if None not in told:
            raise told[0]  # type: ignore[misc]


def _typed(composed: DictConfig) -> Config:
    try:
        check_keys(composed)
        return OmegaConf.to_object(composed)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error


def _policy(config: Config) -> Policy:
    node = dict(config.policy or {})
    if "_target_" not in node:
        raise ConfigError("policy", config.policy, "give the name of a file under conf/policy/")
    cls = find.load(str(node.pop("_target_")), "policy._target_")
    fields = [f.name for f in dataclasses.fields(cls)]
    if config.forgetting_factor is not None:
        check_factors(config.forgetting_factor)  # also where the policy ignores it
        if "forgetting_factor" in fields:
            node["forgetting_factor"] = config.forgetting_factor
    find.check_setting_names(cls, node)
    try:
        made: Policy = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), node))  # type: ignore[assignment]
        for key, value in node.items():
            if isinstance(getattr(made, key), str) and not isinstance(value, str):  # 1.1 may have been written 1.10
                allowed = f"it is text; write it in quotes, policy.{key}='\"…\"' on the command line"
                raise ConfigError(f"policy.{key}", value, allowed)
        return made
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise UserError(explain(error, "policy.")) from error


def _budget(config: Config, policy: Policy) -> Budget | None:
    given = dataclasses.asdict(config.budget)
    if given["ratio"] is None and given["tokens"] is None:
        given["ratio"] = DEFAULT_RATIO
    budget = Budget(**given)  # checked even where the policy ignores it
    tokens = budget.tokens if isinstance(budget.tokens, tuple) else (budget.tokens,)
    for slots in tokens:
        if slots is not None and policy.uses_budget and slots < policy.min_budget:
            raise ConfigError(
                "budget.tokens",
                slots,
                f"recent + sinks may not exceed the budget, and {policy.name} protects {policy.min_budget} tokens",
            )
    return budget if policy.uses_budget else None


def _schedule(config: Config) -> Schedule | None:
    given = {k: v for k, v in dataclasses.asdict(config.schedule).items() if v is not None}
    if "when" not in given:
        for key, value in given.items():
            raise unused(key, value)
        return None
    Schedule(**given)  # checked also where it is not looked at
    return Schedule(**{k: v for k, v in given.items() if k == "when" or k in LOOKED_AT.get(given["when"], ())})


def _stopping_rule(config: Config, generating: Sequence[str]) -> StoppingRule | None:
    given, default = (dataclasses.asdict(c) for c in (config.early_stopping, EarlyStoppingConfig()))
    given |= {k: v for k, v in _of_previous_version(config.until).items() if given[k] == default[k]}
    if given["pair"] is None:
        for key in ("half_width", "significant"):
            if given[key]:
                allowed = "name the two policies that are compared in early_stopping.pair"
                raise ConfigError(f"early_stopping.{key}", given[key], allowed)
        return None
    rule = StoppingRule(**given)
    for task in generating:
        allowed = f"early stopping is for tasks whose answers are scored, and {task} generates text"
        raise ConfigError("early_stopping.pair", list(rule.pair), allowed)
    if config.trace:
        raise ConfigError("trace", config.trace, "early stopping may leave out a cell's first documents; give 0")
    return rule


def _of_previous_version(until: object) -> dict[str, Any]:
    """The values of `early_stopping` that a file gives under its old name."""
    if until is None:
        return {}
    if not isinstance(until, dict):
        raise ConfigError("until", until, "give its keys under early_stopping")
    notice("until", "early_stopping")
    given = {renamed(f"until.{key}").partition(".")[2]: value for key, value in until.items()}
    known = [f.name for f in dataclasses.fields(EarlyStoppingConfig)]
    for key in given:
        if key not in known:
            raise ConfigError(f"until.{key}", given[key], f"early_stopping has {', '.join(known)}{nearest(key, known)}")
    return given


def check_layers(model: ModelSpec, policy: Policy, budget: Budget | None) -> None:
    """Refuse numbers per layer or head that do not fit the model's layers and heads.

    Raises:
        ConfigError: naming both; or if the model's config cannot be read.
    """
    lists = [*vars(policy).values(), budget and budget.ratio, budget and budget.tokens]
    if any(isinstance(x, tuple) and x for x in lists):
        layers, kv_heads = sizes_of(model)
        policy.check(layers, kv_heads)
        if budget:
            budget.check(layers)
