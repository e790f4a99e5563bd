"""A cell: model × policy × budget × schedule × task × shots, and what identifies its numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

from a2sf.errors import ConfigError
from a2sf.hf.loading import ModelSpec, acts_of, adapter_of, fingerprint, load_tokenizer, positions_of, tokenizer_folder
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget, divides_slots
from a2sf.policies.find import source_digest
from a2sf.policies.schedule import Schedule, schedule_for
from a2sf.store.names import ID_DIGITS, safe
from a2sf.store.runs import as_stored
from a2sf.sweep.stopping_rule import StoppingRule
from a2sf.tasks import spec as tasks
from a2sf.tasks.prompting import Prompting, draws

ENGINE_VERSION = 2
"""Raised whenever a change of the engine or the scoring can move a number."""
GENERATION_VERSION = 4
"""The same for what concerns only tasks that generate text."""
FEWSHOT_VERSION = 2
"""The same for what concerns only few-shot examples."""
GPU_VERSION = 4
"""The same for what concerns only cells that are computed on a GPU."""
CUT_VERSION = 2
"""The same for policies from outside this package whose cut after the prompt uses more than attention, or divides slots."""
CONTEXT_VERSION = 2
"""The same for generated texts whose context is cut, and tokens evicted further, by a policy that looks at the context."""
LAYERS_VERSION = 2
"""The same for policies that divide slots among layers, in models that mix full attention with sliding windows."""


@dataclass(frozen=True)
class Cell:
    """What one result is about. Two cells with the same `id` have the same numbers.

    Attributes:
        model_name: the model's short name in tables.
        budget: None for a policy that ignores budgets.
        task: reference to the task's definition: lm-eval's name, `group::member`, or the path of a YAML file.
        limit: how many documents to score; None: all.
        seed: of the few-shot examples, and of answers that are drawn at random.
        prompting: without what makes no difference to this task (`Prompting.of`).
        schedule: None: the policy's default, or an equivalent schedule (`nondefault_schedule`).
        data: where the documents are from; once a sweep has checked it, with the fingerprint of the documents.
        stopping_rule: when to stop before all documents are scored; None: all are scored.
        log_samples: whether texts are stored, and not only numbers and hashes; not part of the cell's identity.
    """

    model_name: str
    model: ModelSpec
    policy: Policy
    budget: Budget | None
    task: str
    shots: int
    limit: int | None
    seed: int
    data: tasks.DataSpec
    schedule: Schedule | None = None
    backend: str = "auto"
    stopping_rule: StoppingRule | None = None
    prompting: Prompting = field(default_factory=Prompting)
    log_samples: bool = True

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that could change a document's log-likelihood; not how many documents are scored."""
        device = self.model.resolved_device.partition(":")[0]
        return {
            "model": self.model.path,
            "weights": fingerprint(self.model),
            **adapter_of(self.model),
            "dtype": self.model.resolved_dtype,
            "device": device,
            **({} if self.model.add_bos_token is None else {"add_bos_token": self.model.add_bos_token}),
            "policy": self.policy.name,
            "policy_settings": as_stored(self.policy.stored_settings()),
            **policy_versions(self.policy),
            "budget": as_stored(dataclasses.asdict(self.budget)) if self.budget else None,
            **({"schedule": self.schedule.settings} if self.schedule else {}),
            **({"prompting": given} if (given := self.prompting.settings) else {}),
            **self.spec.identity,
            "shots": self.shots,
            "seed": self.seed if self.shots else None,
            **engine_versions(device),
            "lm_eval": _lm_eval_version(),
            **({"generation": GENERATION_VERSION} if self.spec.generates else {}),
            **({"drawn_with": self.seed} if self.spec.generates and self._draws else {}),
            **({"fewshot": FEWSHOT_VERSION} if self.shots else {}),
            **self._versions_of_kinds,
        }

    @property
    def _versions_of_kinds(self) -> dict[str, int]:
        """Versions that only some kinds of cells have, so that a change to these leaves the results of all others valid."""
        versions: dict[str, int] = {}
        schedule = self.schedule
        evicts_again = schedule is not None and schedule.before_question and schedule.then != "keep"
        if evicts_again and self.policy.prepares and self.spec.generates:
            versions["context"] = CONTEXT_VERSION
        own = type(self.policy)
        if own.layer_budget is not Policy.layer_budget or own.acting_budget is not Policy.acting_budget:
            acts = acts_of(self.model)
            if not all(acts) and divides_slots(self.policy, len(acts)):
                versions["layers"] = LAYERS_VERSION
        return versions

    @property
    def _draws(self) -> bool:
        """Whether answers are drawn at random."""
        of_task = self.spec.definition.config.get("generation_kwargs")
        given = json.loads(self.prompting.gen_kwargs) if self.prompting.gen_kwargs else {}
        return draws((of_task if isinstance(of_task, dict) else {}) | given)

    @cached_property
    def id(self) -> str:
        """The beginning of the hash of `identity`, in hex digits."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:ID_DIGITS]

    @property
    def options(self) -> dict[str, Any]:
        """What of lm-eval's options is set and concerns this cell, by the configuration's keys."""
        bos = self.model.add_bos_token
        return {
            **self.prompting.settings,
            **({"task_args": self.data.arguments} if self.data.task_args else {}),
            **({} if bos is None else {"add_bos_token": bos}),
        }

    @cached_property
    def spec(self) -> tasks.TaskSpec:
        """The task with its documents and examples."""
        return tasks.TaskSpec(self.task, self.data, self.shots)

    @property
    def task_name(self) -> str:
        """What tables call the task."""
        return self.spec.name

    def with_content(self) -> Cell:
        """The same cell with the fingerprint of its documents, which is looked up unless it is known.

        Raises:
            UserError: if there are no such documents, or they cannot be reached.
        """
        data = tasks.ContentFinder().resolve(spec_with_tokenizer(self))
        return self if data == self.data else dataclasses.replace(self, data=data)

    @property
    def name(self) -> str:
        """The name of the cell's directory: its settings in readable form, and the `tail`."""
        parts = [safe(self.model_name), safe(self.policy.name)]
        if self.budget:
            key, value = ("r", self.budget.ratio) if self.budget.ratio is not None else ("c", self.budget.tokens)
            parts.append(f"{key}{_short(value)}" + ("" if self.budget.base == "total" else f"-{self.budget.base}"))
        if self.schedule:
            parts.append(self.schedule.name)
        if self.prompting.chat_template:
            parts.append("-".join(["chat", *map(safe, filter(None, [self.prompting.name_of_template]))]))
        if (factor := getattr(self.policy, "forgetting_factor", None)) is not None:
            parts.append(f"a{_short(factor)}")
        return "__".join([*parts, safe(self.task_name), f"{self.shots}shot", self.tail])

    @property
    def tail(self) -> str:
        """The end of the name, which is different for each cell: the number of documents, and the `id`."""
        most = "all" if self.limit is None else f"n{self.limit}"
        # texts are drawn instead of documents, so other documents are seen
        texts = f"-{safe(self.data.cluster)}" if self.data.cluster else ""
        return f"{most}{f'-{self.stopping_rule.tag}{texts}' if self.stopping_rule else ''}__{self.id}"

    def describe(self) -> dict[str, Any]:
        """The `cell` entry of `result.json`."""
        settings = self.identity["policy_settings"]
        return {
            "id": self.id,
            "name": self.name,
            "model": self.model_name,
            "model_path": self.model.path,
            **({"adapter": a.path} if (a := self.model.added) else {}),
            "dtype": self.identity["dtype"],
            "policy": self.policy.name,
            "policy_label": self.policy.label,
            "policy_settings": settings,
            **({} if self.policy.causal else {"policy_causal": False}),
            "budget": self.identity["budget"],
            **({} if self.budget or not self.policy.evicts else {"policy_evicts": True}),  # without a budget
            "schedule": schedule_for(self.policy, self.schedule).name,
            "forgetting_factor": settings.get("forgetting_factor"),
            "task": self.task_name,
            "shots": self.shots,
            "limit": self.limit,
            **({"until": as_stored(self.stopping_rule.stored)} if self.stopping_rule else {}),
            "seed": self.seed,
            **({"options": options} if (options := self.options) else {}),
            **({"data": given} if (given := self.data.settings) else {}),
            "identity": self.identity,
        }


def spec_with_tokenizer(cell: Cell) -> tasks.TaskSpec:
    """The cell's task, with the tokenizer of its model if the task makes documents to a length in tokens.

    Raises:
        UserError: if a length is beyond the model's positions, or the tokenizer is not available.
    """
    spec, data = cell.spec, cell.data
    if not spec.makes_documents:
        return spec
    if spec.lengths:
        key, lengths = spec.lengths
        positions = positions_of(cell.model)
        if positions is not None and max(lengths, default=0) > positions:
            raise ConfigError(
                key,
                lengths,
                f"the model {cell.model_name} has {positions} positions, and {cell.task_name} "
                f"would need {max(lengths)}",
            )
        if positions is not None and (cell.prompting.chat_template or cell.prompting.system_instruction):
            around = sum(cell.prompting.tokens_around(load_tokenizer(cell.model)))
            free = positions - max(lengths, default=0) + int(data.arguments.get("room") or 0)
            if free < around:  # else lm-eval cuts the front of the prompt, which is the template's
                raise ConfigError(
                    key,
                    lengths,
                    f"template and system instruction take {around} of the {positions} positions of {cell.model_name} "
                    f"besides; give smaller lengths, or task_args.room={around} for tasks of the suite long",
                )
    if data.tokenizer:
        return spec
    return dataclasses.replace(spec, data=dataclasses.replace(data, tokenizer=str(tokenizer_folder(cell.model))))


@cache
def _lm_eval_version() -> str:
    return version("lm-eval")


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "list" if len(set(value)) > 1 else f"{value[0]}"
    return f"{value}"


def engine_versions(device: str) -> dict[str, int]:
    """The versions of the engine in a cell's identity, for a kind of device."""
    return {"engine": ENGINE_VERSION} | ({} if device == "cpu" else {"gpu": GPU_VERSION})


def policy_versions(policy: Policy) -> dict[str, Any]:
    """The versions of a policy in a cell's identity; empty for a policy of this package in its first version."""
    versions: dict[str, Any] = {}
    if policy.version != Policy.version:
        versions["policy_version"] = policy.version
    if source := source_digest(type(policy)):
        versions["policy_source"] = source
        rule = policy.keeps(max(64, policy.min_budget)).rule
        cut = rule.cut
        if cut is not None and (cut.floor is not None or rule.priority_fn is not None or not rule.scored):
            versions["cut"] = CUT_VERSION
    return versions
