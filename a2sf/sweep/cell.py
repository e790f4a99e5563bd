"""One cell = model × policy × budget × schedule × task × shots: what defines it, and how it is computed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch

from a2sf.errors import ConfigError, Notice
from a2sf.hf.loading import ModelSpec, adapter_of, fingerprint, load_tokenizer, positions_of, tokenizer_folder
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import source_digest
from a2sf.policies.schedule import Schedule, schedule_for
from a2sf.scoring.doubts import doubts, not_numbers
from a2sf.scoring.systems import request_hash
from a2sf.store.names import ID_DIGITS, safe
from a2sf.sweep.until import Until
from a2sf.tasks import shared_texts
from a2sf.tasks import spec as tasks
from a2sf.tasks.numbers import index_of, number_of
from a2sf.tasks.prompting import SAMPLING_SEED, Prompting, draws
from a2sf.tasks.warned import collected

ENGINE_VERSION = 2
"""Raised whenever a change of the engine or the scoring can move a number."""
GENERATION_VERSION = 3
"""The same for what concerns only tasks that generate text."""
FEWSHOT_VERSION = 2
"""The same for what concerns only few-shot examples."""
GPU_VERSION = 3
"""The same for what concerns only cells that are computed on a GPU."""
CUT_VERSION = 2
"""The same for what concerns only policies from outside whose prompt's cut goes by more than attention head by head."""
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Cell:
    """What one result is about. Two cells with the same `id` have the same numbers.

    Attributes:
        model_name: the model's short name in tables.
        budget: None for a policy that ignores budgets.
        task: what finds the task again: lm-eval's name, `group::member`, or the path of a YAML file.
        limit: how many documents to score; None: all.
        seed: of the few-shot examples.
        prompting: without what makes no difference to this task (`Prompting.of`).
        schedule: None: the policy's default, or a schedule that comes to the same (`nondefault_schedule`).
        data: with what identifies the documents, where a sweep has settled it.
        until: when to stop before all documents are scored; None: never.
        log_samples: whether texts are stored, and not only numbers and hashes; no part of what the cell is.
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
    until: Until | None = None
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
            "policy_settings": _plain(self.policy.stored_settings()),
            **policy_versions(self.policy),
            "budget": _plain(dataclasses.asdict(self.budget)) if self.budget else None,
            **({"schedule": self.schedule.settings} if self.schedule else {}),
            **({"prompting": asked} if (asked := self.prompting.settings) else {}),
            **tasks.identity(self.task, self.data, self.shots),
            "shots": self.shots,
            "seed": self.seed if self.shots else None,
            **engine_versions(device),
            "lm_eval": _lm_eval_version(),
            **({"generation": GENERATION_VERSION} if tasks.generates(self.task) else {}),
            **({"fewshot": FEWSHOT_VERSION} if self.shots else {}),
        }

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
    def task_name(self) -> str:
        """What tables call the task."""
        return tasks.name_of(self.task)

    def settled(self) -> Cell:
        """The same cell, with what identifies its documents looked up if it was not yet.

        Raises:
            UserError: if there are no such documents, or they cannot be reached.
        """
        data = tasks.Settled().data(self.task, measured(self), self.shots)
        return self if data == self.data else dataclasses.replace(self, data=data)

    @property
    def name(self) -> str:
        """The cell's directory: what a reader tells it by, and the `tail`."""
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
        """The end of the name, which tells cells apart: how many documents, and the `id`."""
        most = "all" if self.limit is None else f"n{self.limit}"
        texts = f"-{safe(self.data.cluster)}" if self.data.cluster else ""  # whole texts are drawn, so others are seen
        return f"{most}{f'-{self.until.tag}{texts}' if self.until else ''}__{self.id}"

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
            "schedule": schedule_for(self.policy, self.schedule).name,
            "forgetting_factor": settings.get("forgetting_factor"),
            "task": self.task_name,
            "shots": self.shots,
            "limit": self.limit,
            **({"until": _plain(dataclasses.asdict(self.until))} if self.until else {}),
            "seed": self.seed,
            **({"options": options} if (options := self.options) else {}),
            **({"data": asked} if (asked := self.data.settings) else {}),
            "identity": self.identity,
        }


def measured(cell: Cell) -> tasks.DataSpec:
    """The cell's `data`, with the tokenizer of its model where the task makes documents to a length in tokens.

    Raises:
        UserError: if a length is beyond the model's positions, or the tokenizer cannot be had.
    """
    data = cell.data
    if not tasks.makes_documents(cell.task):
        return data
    if asked := tasks.lengths(cell.task, data):
        key, lengths = asked
        positions = positions_of(cell.model)
        if positions is not None and max(lengths, default=0) > positions:
            raise ConfigError(
                key,
                lengths,
                f"the model {cell.model_name} has {positions} positions, and {cell.task_name} "
                f"would ask for {max(lengths)}",
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
    return data if data.tokenizer else dataclasses.replace(data, tokenizer=str(tokenizer_folder(cell.model)))


@cache
def _lm_eval_version() -> str:
    return version("lm-eval")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # tuples become lists, as they will in the result file


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "list" if len(set(value)) > 1 else f"{value[0]}"
    return f"{value}"


def compute(cell: Cell, lm: Any, task: Any, chosen: list[int] | None = None) -> tuple[dict[str, Any], pd.DataFrame]:
    """Evaluate a cell's documents with `lm`, a `PrunedLM` that answers as the cell's member of a group.

    Args:
        chosen: numbers of the documents, ascending; None: the first `limit`.

    Returns:
        The body of `result.json` (without provenance), and the per-document table. `notes` is there even if it is empty.
    """
    import lm_eval

    where = tasks.provenance(task)
    lm.shared_context = (task.config.metadata or {}).get("shared_context")
    started = datetime.now(UTC)
    clock, spent = time.perf_counter(), lm.spent
    if drawn(task):
        torch.manual_seed(SAMPLING_SEED)
    with collected() as warned:
        evaluated = lm_eval.evaluate(
            lm,
            task_dict={"tasks": {cell.task_name: task}},
            limit=cell.limit if chosen is None else None,
            samples=None if chosen is None else {cell.task_name: chosen},
            bootstrap_iters=BOOTSTRAP,
            **cell.prompting.arguments,
        )
    # of the time in which scores were computed, for others of the group as well, its share
    seconds = time.perf_counter() - clock - (lm.spent - spent) + lm.member.seconds
    samples = evaluated["samples"][cell.task_name]
    counts = lm.counts
    documents = _documents(samples, task, lm)
    if field := shared_texts.field_of(task, cell.data.cluster):
        keys = {s["doc_id"]: shared_texts.key_of(s["doc"], field) for s in samples}
        documents[shared_texts.COLUMN] = documents["doc_id"].map(keys)
        where |= {"cluster": field, "clusters": len(set(keys.values()))}
    result = {
        "cell": cell.describe(),
        "metrics": _metrics(evaluated, cell.task_name),
        "documents": {"n": len({s["doc_id"] for s in samples}), **where},
        "notes": [
            *doubts(task, samples, lm),
            *not_numbers(cell.task_name, evaluated["results"][cell.task_name]),
            *warned.notes,
        ],
        "scored": {"tokens": counts.targets, "pruned": counts.pruned},
        "lengths": counts.lengths,
        "timing": {
            "seconds": seconds,
            "tokens": counts.tokens,
            "computed_tokens": counts.computed,
            "shared": counts.together / max(1, counts.needed),
            "tokens_per_second": counts.tokens / seconds,
            "kept_tokens_mean": counts.kept / max(1, counts.layer_requests),
            "cache_share": counts.share / max(1, counts.layer_requests),
            "reused_requests": counts.reused,
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    return result, documents if cell.log_samples else _without_texts(documents)


def _metrics(evaluated: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    scores = evaluated["results"][task]
    better = evaluated.get("higher_is_better", {}).get(task, {})
    n = Counter((metric, s["filter"]) for s in evaluated["samples"][task] for metric in s["metrics"])
    found = {}
    for key, value in scores.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        if number_of(value) is None:
            told = f"{task}: its metric {metric} is no number but {type(value).__name__}, and is not kept."
            warnings.warn(told, Notice, stacklevel=1)
            continue
        name = metric if filtered == "none" else f"{metric},{filtered}"
        found[name] = {
            "value": _number(value),
            "stderr": _number(scores.get(f"{metric}_stderr,{filtered}")),
            "n": n[metric, filtered],  # a document may have no value of a metric
            "higher_is_better": better.get(metric),
        }
    return found


def _number(value: Any) -> float | None:
    number = number_of(value)
    return number if number is not None and math.isfinite(number) else None


def _documents(samples: list[dict[str, Any]], task: Any, lm: Any) -> pd.DataFrame:
    rows = []
    for sample in samples:
        if task.OUTPUT_TYPE == "generate_until":
            rows.append(_generated(sample, lm))
            continue
        answers = [a if isinstance(a, tuple | list) else (a, False) for (a,) in sample["resps"]]
        arguments = [tuple(a) for a in sample["arguments"]]
        lengths = [lm.lengths.get(request_hash(a), (0, 0)) for a in arguments]
        asked: dict[str, list[Any]] = {
            "request_hashes": [request_hash(a) for a in arguments],
            "loglikelihoods": [float(a[0]) for a in answers],
            "is_greedy": [bool(a[1]) for a in answers],
            "context_tokens": [c for c, _ in lengths],
            "continuation_tokens": [n for _, n in lengths],
        }
        # a metric may ask for more than the choices (acc_mutual_info: each without its context)
        n = min(len(arguments), _number_of_choices(sample, task))
        likelihoods, choices = asked["loglikelihoods"][:n], [a[-1] for a in arguments[:n]]
        rows.append(
            {
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "prompt_hash": sample["prompt_hash"],
                "context": arguments[0][0] if len(arguments[0]) > 1 else "",
                "choices": choices,
                "gold": _gold(sample, task) if n > 1 else -1,
                "prediction": max(range(n), key=likelihoods.__getitem__) if n > 1 else -1,
                **{column: values[:n] for column, values in asked.items()},
                **({f"more/{c}": values[n:] for c, values in asked.items()} if n < len(arguments) else {}),
                **{f"metric/{m}": v for m, v in _numbers(sample, sample["metrics"]).items()},
            }
        )
    if task.OUTPUT_TYPE == "generate_until":
        # a filter gives a sample of its own, with metrics of its own: one row per document holds them all
        return pd.DataFrame(rows).groupby("doc_id", as_index=False).first()
    return pd.DataFrame(rows).drop_duplicates("doc_id").sort_values("doc_id", ignore_index=True)


def _without_texts(documents: pd.DataFrame) -> pd.DataFrame:
    """The documents with what is compared and counted, and no text: `generated` goes, others are empty."""
    empty = {"context": "", "target": ""}
    kept = documents.drop(columns="generated", errors="ignore")
    kept["choices"] = [[""] * len(c) for c in documents["choices"]]
    return kept.assign(**{k: v for k, v in empty.items() if k in kept})


def _generated(sample: dict[str, Any], lm: Any) -> dict[str, Any]:
    """A row of a generation task: no choices, but the text, its target, and the numbers that describe the document."""
    arguments = tuple(sample["arguments"][0])
    context_tokens, tokens = lm.lengths.get(request_hash(arguments), (0, 0))
    end = "" if sample["filter"] == "none" else f",{sample['filter']}"
    return {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "request_hashes": [request_hash(arguments)],
        "context": arguments[0],
        "choices": [],
        "gold": -1,
        "prediction": -1,
        "loglikelihoods": [],
        "is_greedy": [],
        "context_tokens": [context_tokens],
        "continuation_tokens": [tokens],
        "target": str(sample["target"]),
        "generated": sample["resps"][0][0],
        "ended": lm.ended.get(request_hash(arguments)),
        **{f"doc/{k}": v for k, v in _numbers(sample["doc"], sample["doc"]).items()},
        **{f"metric/{m}{end}": v for m, v in _numbers(sample, sample["metrics"]).items()},
    }


def _numbers(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Those of some values that are numbers."""
    found = {name: number_of(values.get(name)) for name in names}
    return {name: number for name, number in found.items() if number is not None}


def _number_of_choices(sample: dict[str, Any], task: Any) -> int:
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.doc_to_choice is None:
        return len(sample["arguments"])
    return len(task.doc_to_choice(sample["doc"]))


def _gold(sample: dict[str, Any], task: Any) -> int:
    """Index of the right choice; where the choices are contexts (winogrande), lm-eval numbers them the same way."""
    target = sample["target"]
    if task.multiple_input:
        target = task.doc_to_text(sample["doc"])
    if (index := index_of(target)) is not None:
        return index
    choices = task.doc_to_choice(sample["doc"])
    return choices.index(target) if target in choices else -1


def engine_versions(device: str) -> dict[str, int]:
    """What tells numbers of this engine, computed on a kind of device, from an earlier one's."""
    return {"engine": ENGINE_VERSION} | ({} if device == "cpu" else {"gpu": GPU_VERSION})


def policy_versions(policy: Policy) -> dict[str, Any]:
    """What tells numbers of this policy from an earlier version's; empty for one of ours in its first version."""
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


def drawn(task: Any) -> bool:
    """Whether answers are drawn at random: of several samples of one prompt only the first is stored."""
    settings = task.config.generation_kwargs
    return (task.config.repeats or 1) > 1 or bool(settings and draws(settings))
