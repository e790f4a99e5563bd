"""From a composed configuration to its cells, with every value checked (the keys: `a2sf.sweep.config.schema`)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from a2sf.engine.kernels import BACKENDS
from a2sf.errors import ConfigError, UserError, nearest
from a2sf.hf.loading import ModelSpec
from a2sf.hf.settings import check_cut
from a2sf.policies.base import Policy
from a2sf.policies.renamed import notice
from a2sf.policies.schedule import Schedule, nondefault_schedule
from a2sf.scoring.lm import check_batch_size
from a2sf.store.aggregates import Average, Member, TaskGroup
from a2sf.sweep.cell import Cell
from a2sf.sweep.config.keys import check_keys, explain
from a2sf.sweep.config.schema import Config, EarlyStoppingConfig, renamed
from a2sf.sweep.config.system import budget_of, check_layers, policy_of, schedule_of
from a2sf.sweep.planning.power import PowerSettings
from a2sf.sweep.stopping_rule import StoppingRule
from a2sf.tasks.arguments import arguments_of
from a2sf.tasks.definitions import Definition, aggregates, resolve
from a2sf.tasks.prompting import Prompting, packed, plain_mapping
from a2sf.tasks.spec import DataSpec, TaskSpec, expand_suite, include
from a2sf.tracking.tracker import TrackerSpec

MAX_SHOTS = 1000
LONGEST_SWEEP_NAME = 200
OF_PRESETS = ("forgetting_factor", "full_texts")
"""Keys that presets give for some of their policies or tasks: refused as unused only if the command line gives them."""


@dataclass(frozen=True)
class Settings:
    """One checked point of a grid: its cells, and the settings that are not part of a cell.

    Attributes:
        batch_size: sequences per forward pass; None: automatic.
        trace: number of documents of each cell whose evictions are recorded.
        full_texts: whether the full cache's texts are read under each system.
        checkpoint: seconds of work after which answers are saved.
        power: what the plan says about differences that can be detected.
        groups: lm-eval's groups, whose scores are computed from those of the cells.
        include: the names in `tasks`, and the folder of the user's definitions; None: there is no such folder.
        unused: keys that are given -> the error if no task of this point uses the key; None: a task uses it.
        planned: names of the cells that a sweep assigned to this worker; None: this is not a worker.
    """

    cells: tuple[Cell, ...]
    tracker: TrackerSpec
    batch_size: int | None
    sweep_name: str
    runs_dir: str
    plan_only: bool
    trace: int
    checkpoint: float
    power: PowerSettings = field(default_factory=PowerSettings)
    full_texts: bool = False
    groups: tuple[TaskGroup, ...] = ()
    include: tuple[tuple[str, ...], Path] | None = None
    unused: dict[str, ConfigError | None] = field(default_factory=dict, compare=False)
    planned: frozenset[str] | None = None


DIFFERING = ("policy", "budget", "schedule", "forgetting_factor")
"""The keys in which the cells of a group differ."""


def as_group(points: Sequence[DictConfig], planned: Sequence[str]) -> str:
    """The value of the key `group`, which gives a worker the cells of further points.

    Args:
        planned: names of all cells of the worker.
    """
    # with interpolations resolved here: the worker would resolve them with the values of the first point
    made = [{k: OmegaConf.to_container(p, resolve=True)[k] for k in DIFFERING} for p in points]  # type: ignore[index, call-overload]
    return json.dumps({"others": made, "planned": list(planned)})


def read(composed: DictConfig, model_names: dict[str, str] | None = None, *, here: bool = True) -> Settings:
    """Check a composed configuration and list its cells.

    Args:
        composed: what Hydra composed on the schema, without the node `hydra`.
        model_names: model path -> short name, for the models under `conf/model/`.
        here: whether this machine computes the cells, so that it must have the requested GPUs.

    Raises:
        ConfigError: for the first value that is not allowed; nothing slow has happened then.
    """
    if composed.get("group"):
        return _of_group(composed, model_names or {})
    config = _typed(composed)
    model, name = _model(config, model_names or {}, here)
    policy = policy_of(config)
    budget = budget_of(config, policy)
    schedule = nondefault_schedule(policy, schedule_of(config))
    if model.pinned:  # else `prepare.models.pin_all` checks it
        check_layers(model, policy, budget)
    _check_values(config, here)
    data = DataSpec(**dataclasses.asdict(config.data))
    folder = include(config.include_path)
    names = expand_suite(config.tasks)
    members = [(task, d) for task in names for d in resolve(task, folder)]
    generating = [d.ref for _, d in members if TaskSpec(d.ref).generates]
    if generating and not policy.causal:
        why = f"it looks at later tokens, and the task {generating[0]} generates text"
        raise ConfigError("policy", policy.name, why)
    prompting = _prompting(config, members, generating)
    arguments, unused_keys = _arguments(config, members)
    unused_keys |= _unused_by_prompts(config, prompting, generating)
    unused_keys |= _unused_by_policy(config, policy)
    rule = _stopping_rule(config, generating)
    if schedule is not None and schedule.before_question:
        check_cut(budget, schedule)
        _check_context(members, data, schedule)

    def shots_for(d: Definition) -> int:
        return (d.shots or 0) if config.shots is None else config.shots

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
    groups = [
        TaskGroup(
            g.name,
            tuple(Average(*a) for a in g.averages),
            tuple(Member(d.name, shots_for(d), d.digest()) for d in g.members),
        )
        for task in names
        for g in aggregates(task, folder)
    ]
    return Settings(
        cells=cells,
        tracker=TrackerSpec.chosen(**dataclasses.asdict(config.tracker)),
        batch_size=check_batch_size(config.batch_size),
        sweep_name=config.sweep_name,
        runs_dir=config.runs_dir,
        plan_only=config.plan_only,
        trace=config.trace,
        power=PowerSettings(config.plan.flips, config.plan.detect),
        full_texts=config.full_texts,
        groups=tuple(groups),
        include=(tuple(names), folder) if folder else None,
        unused=unused_keys,
        checkpoint=config.checkpoint,
    )


def _of_group(composed: DictConfig, model_names: dict[str, str]) -> Settings:
    """The settings of a worker: the cells of its own point and of the points in the key `group`."""
    made, group = [], json.loads(composed.group)
    for differing in ({}, *group["others"]):
        one = composed.copy()
        for key, value in {"group": None, **differing}.items():
            OmegaConf.update(one, key, value, merge=key != "policy")  # the settings of another policy do not mix
        made.append(read(one, model_names))
    cells = tuple(c for s in made for c in s.cells)
    return dataclasses.replace(made[0], cells=cells, planned=frozenset(group["planned"]))


def _model(config: Config, model_names: dict[str, str], here: bool) -> tuple[ModelSpec, str]:
    """The model, and its name in tables."""
    if not config.model.path:
        raise ConfigError("model.path", "''", "give a hub id, a directory or a GGUF file")
    model = ModelSpec(**{f.name: getattr(config.model, f.name) for f in dataclasses.fields(ModelSpec) if f.init})
    if here:
        model.check_here()
    if config.model.name:
        return model, config.model.name
    name = model_names.get(model.path) or model.path.rstrip("/").rpartition("/")[2]
    return model, name if model.added is None else f"{name}+{model.added.name}"


def _check_values(config: Config, here: bool) -> None:
    """Refuse values of single keys that are not allowed.

    Args:
        here: whether this machine computes the cells.
    """
    if config.shots is not None and not 0 <= config.shots <= MAX_SHOTS:
        raise ConfigError("shots", config.shots, f"give a number of examples from 0 to {MAX_SHOTS}")
    if config.limit is not None and config.limit < 1:
        raise ConfigError("limit", config.limit, "give a number of documents of at least 1, or null for all")
    if config.trace < 0:
        raise ConfigError("trace", config.trace, "give the number of documents to trace, at least 0")
    if not config.checkpoint > 0:
        raise ConfigError("checkpoint", config.checkpoint, "give a number of seconds above 0")
    if config.backend not in ("auto", *BACKENDS):
        raise ConfigError("backend", config.backend, f"give auto or one of {', '.join(BACKENDS)}")
    if here and config.backend == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigError("backend", "triton", "the package triton is not installed; give auto")
    name = config.sweep_name
    if not name.isprintable() or "/" in name or name.strip(" .") != name:
        allowed = "give the name of a folder, without a slash, and without a dot or space first or last"
        raise ConfigError("sweep_name", repr(name), allowed)
    if not 1 <= len(name.encode()) <= LONGEST_SWEEP_NAME:
        raise ConfigError("sweep_name", repr(name), f"give 1 to {LONGEST_SWEEP_NAME} bytes of text")


def _prompting(config: Config, members: Sequence[tuple[str, Definition]], generating: Sequence[str]) -> Prompting:
    """How prompts are made and texts are generated, checked against the tasks."""
    prompting = Prompting(
        chat_template=config.chat_template,
        system_instruction=config.system_instruction,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        gen_kwargs=packed(plain_mapping("gen_kwargs", config.gen_kwargs)),
        samples=config.samples,
        enable_thinking=config.enable_thinking,
        think_end_token=config.think_end_token or None,
    )
    for _, d in members:
        if d.ref in generating:
            of_task = d.config.get("generation_kwargs")
            prompting.check_samples(d.name, of_task if isinstance(of_task, dict) else {}, d.config.get("repeats"))
        elif config.enable_thinking:
            why = f"{d.name} scores log-likelihoods, for which lm-eval has no thinking; give tasks that generate text"
            raise ConfigError("enable_thinking", "true", why)
    return prompting


def _unused_by_prompts(
    config: Config, prompting: Prompting, generating: Sequence[str]
) -> dict[str, ConfigError | None]:
    """Keys about prompts that are given -> the error if this point does not use the key; None: it does."""
    unused: dict[str, ConfigError | None] = {}
    if config.fewshot_as_multiturn:
        why = "it needs chat_template=true; without a template the prompt is one text"
        error = ConfigError("fewshot_as_multiturn", "true", why)
        unused["fewshot_as_multiturn"] = None if prompting.chat_template else error
    of_texts = {"gen_kwargs": config.gen_kwargs if prompting.gen_kwargs else None}
    of_texts |= {key: getattr(config, key) for key in ("samples", "think_end_token")}
    for key, value in of_texts.items():
        if value is not None:
            error = ConfigError(key, value, "none of the tasks generates text; leave it out")
            unused[key] = None if generating else error
    if config.full_texts:
        error = ConfigError("full_texts", "true", "none of the tasks generates text; leave it out")
        unused["full_texts"] = None if generating else error
    return unused


def _unused_by_policy(config: Config, policy: Policy) -> dict[str, ConfigError | None]:
    if config.forgetting_factor is None:
        return {}
    error = ConfigError("forgetting_factor", config.forgetting_factor, f"{policy.name} has none; leave it out")
    return {"forgetting_factor": None if hasattr(policy, "forgetting_factor") else error}


def _check_context(members: Sequence[tuple[str, Definition]], data: DataSpec, schedule: Schedule) -> None:
    """Refuse tasks that do not say where the context ends, after which the schedule evicts."""
    for _, d in members:
        if TaskSpec(d.ref, data).shared_context is None:
            why = f"the task {d.name} does not say where its context ends (shared_context in its metadata); give prompt"
            raise ConfigError("schedule.at", schedule.at, why)


def _arguments(
    config: Config, members: list[tuple[str, Definition]]
) -> tuple[dict[str, str | None], dict[str, ConfigError | None]]:
    """Task -> its `task_args`; and argument -> the error if no task uses it, None if a task does."""
    given = plain_mapping("task_args", config.task_args)
    names = {n for requested, d in members for n in (requested, d.name, d.entry.name)}
    used: dict[str, str | None] = {}
    unused: dict[str, ConfigError | None] = {}
    for requested, d in members if given else ():
        found = arguments_of(d, requested, given, names)
        accepted = packed({a.name: a.value for a in found if a.refusal is None})
        if used.setdefault(d.ref, accepted) != accepted:
            why = f"{d.name} is given twice, with different arguments; give it once"
            raise ConfigError("task_args", config.task_args, why)
        for a in found:
            error = None if a.refusal is None else ConfigError(a.key, a.value, a.refusal)
            unused[a.key] = error and unused.get(a.key, error)
    return used, unused


def refuse_unused(settings: Sequence[Settings], given: Collection[str] = OF_PRESETS) -> None:
    """Refuse a key that is given and that no cell of a grid uses.

    Args:
        given: keys of the command line; those in `OF_PRESETS` by default.

    Raises:
        ConfigError: naming it.
    """
    for key in dict.fromkeys(k for s in settings for k in s.unused):
        if key in OF_PRESETS and key not in given:
            continue
        errors = [s.unused[key] for s in settings if key in s.unused]
        if None not in errors:
            raise errors[0]  # type: ignore[misc]


def _typed(composed: DictConfig) -> Config:
    try:
        check_keys(composed)
        return OmegaConf.to_object(composed)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error


def _stopping_rule(config: Config, generating: Sequence[str]) -> StoppingRule | None:
    given, default = (dataclasses.asdict(c) for c in (config.early_stopping, EarlyStoppingConfig()))
    given |= {k: v for k, v in _of_previous_version(config.until).items() if given[k] == default[k]}
    if given["pair"] is None:
        for key in given:
            if given[key] != default[key]:
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
