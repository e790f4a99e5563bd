"""lm-eval's private code that reads task files, groups and tags. Tried with lm-eval 0.4.13.

lm-eval itself reads groups and tags (`TaskReader`), but a member becomes a `Leaf` instead of a task with its documents.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY as DEFAULT_METRICS
from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as _tasks
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._factory import _ctor_accepts_config as accepts_config
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import _import_fun_from_str as import_function
from lm_eval.tasks._yaml_loader import load_yaml

from a2sf.errors import ConfigError, nearest

__all__ = [
    "DEFAULT_METRICS",
    "Entry",
    "Group",
    "Kind",
    "Leaf",
    "TaskReader",
    "accepts_config",
    "import_function",
    "load_yaml",
]

TASKS_DIRECTORY = Path(_tasks).parent
INSIDE = "::"
"""Separates a group and its member in the name of a member that is defined only in the group."""
_MAKES_DOCUMENTS = ("dataset_path", "custom_dataset", "class", "include")

METRICS = {
    "multiple_choice": (
        "acc",
        "acc_norm",
        "acc_bytes",
        "acc_mutual_info",
        "exact_match",
        "f1",
        "mcc",
        "brier_score",
        "likelihood",
    ),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
"""The metrics that `ConfigurableTask.process_results` computes without a function of the task; it drops others."""
OF_EACH_DOCUMENT = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Those that are numbers from 0 to 1 of each document."""

Config = dict[str, Any]
_OF_A_GIVEN_MODEL = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
)


@contextmanager
def quiet_about_given_models() -> Iterator[None]:
    """HFLM made with a model, without its two warnings: that other arguments may be ignored, and of a single process."""

    def shown(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_OF_A_GIVEN_MODEL)

    logger = logging.getLogger("lm_eval.models.huggingface")
    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)


def index() -> dict[str, Entry]:
    """lm-eval's tasks, groups and tags by name; reading them takes seconds."""
    return TaskManager().task_index


def kind_of(config: Config) -> Kind:
    """Whether a file defines a task or a group.

    Raises:
        ValueError: if it defines neither.
    """
    return TaskIndex._kind_of(config)


def yaml_files(folder: Path) -> Iterable[Path]:
    """The YAML files of a folder in which lm-eval looks for tasks."""
    return TaskIndex._iter_yaml_files(folder)


def add_entry(config: Config, file: Path, entries: dict[str, Entry]) -> None:
    """Add what a file defines, and its tags, to `entries`."""
    TaskIndex.process_cfg(config, file, entries)


def unresolved(file: Path | str) -> Config:
    """The configuration in a file, with functions as strings."""
    return dict(load_yaml(file, resolve_func=False))


@dataclass(frozen=True)
class Leaf:
    """A member of a group, before it has a name.

    Attributes:
        entry: of its definition.
        overrides: settings that the group changes.
        number: different for each member.
    """

    entry: Entry
    overrides: Config
    number: int

    @property
    def task_name(self) -> str:
        return f"{self.number}"  # unique, because lm-eval's group stores one member per name


class TaskReader(TaskFactory):
    """lm-eval's factory, which here returns a `Leaf` instead of loading a task.

    Args:
        imported: imports the functions that a configuration names; None: they stay strings.
    """

    def __init__(self, imported: Callable[[Config], Config] | None = None) -> None:
        super().__init__()
        self.imported, self.number = imported, 0

    def config(self, entry: Entry) -> Config:
        """The configuration of an entry."""
        return self._load_full_config(entry)

    def _load_full_config(self, entry: Entry, overrides: Config | None = None) -> Config:
        if entry.yaml_path is not None and (entry.cfg is None or self.imported is not None):
            config = dict(load_yaml(entry.yaml_path, resolve_func=self.imported is not None))
        else:
            config = deepcopy(entry.cfg or {}) if self.imported is None else self.imported(entry.cfg or {})
        if entry.kind is Kind.GROUP:
            _prepare_group(config, entry.yaml_path.parent if entry.yaml_path else None)
        return config | (overrides or {})

    def _build_task(self, entry: Entry, overrides: Config | None) -> Leaf:
        self.number += 1
        return Leaf(entry, overrides or {}, self.number)

    def _build_group_members(
        self, member_list: list[Any], group_name: str, overrides: Config | None, registry: dict[str, Entry]
    ) -> Any:
        nameless = [m for m in member_list if isinstance(m, dict) and not {"task", "group"} & set(m)]
        if nameless:
            unnamed = ", ".join(
                " ".join(str(m[k]) for k in ("dataset_path", "dataset_name") if m.get(k)) for m in nameless
            )
            raise ConfigError(
                "tasks",
                group_name,
                f"lm-eval cannot load {len(nameless)} of its {len(member_list)} members, which have no name ({unnamed}); "
                "name the tasks themselves",
            )
        members = []
        for member in member_list:
            item = {"task": member} if isinstance(member, str) else dict(member)
            base = item.get("task")
            if isinstance(base, str) and "group" not in item and base not in registry:
                if not any(k in item for k in _MAKES_DOCUMENTS):
                    raise ConfigError("tasks", group_name, f"its member {base} is not a task{nearest(base, registry)}")
                name = _unused(f"{group_name}{INSIDE}{base}", registry)
                include = item.pop("include", None)
                config = unresolved(include) | item if include else item
                registry[name] = Entry(name=name, kind=Kind.TASK, yaml_path=None, cfg=config | {"task": name})
                item = {"task": name}
            # a string: lm-eval would give a dictionary's members the name of the tag or group
            members.append(item["task"] if set(item) == {"task"} else item)
        return super()._build_group_members(members, group_name, overrides, registry)


def leaves(built: Any) -> Iterator[Leaf]:
    """The members of a group and of the groups inside it, of a tag, or a single task, as `TaskReader` built them."""
    if isinstance(built, Leaf):
        yield built
        return
    for child in built if isinstance(built, Group | list) else ():
        yield from leaves(child)


def _unused(name: str, registry: dict[str, Entry]) -> str:
    return next(n for i in itertools.count(1) if (n := name if i == 1 else f"{name}#{i}") not in registry)


def _prepare_group(config: Config, folder: Path | None) -> None:
    """Remove keys of a group's averages that lm-eval does not use, and make paths of its templates absolute."""
    if averages := config.pop("aggregate_metric_list", None):
        config["aggregate_metric_list"] = [
            {k: a[k] for k in ("metric", "filter_list", "weight_by_size") if k in a}
            for a in (averages if isinstance(averages, list) else [averages])
            if isinstance(a, dict) and "metric" in a
        ]
    for member in config["task"] if isinstance(config.get("task"), list) else []:
        if isinstance(member, dict):
            if folder is not None and isinstance(member.get("include"), str):
                member["include"] = str(folder / member["include"])
            _prepare_group(member, folder)
