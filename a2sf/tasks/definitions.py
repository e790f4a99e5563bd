"""Definitions of tasks, tags and groups: lm-eval's by name, and those in a user's YAML file by its path.

Groups and tags are read by lm-eval's code; but a member is its definition here, not a task with its documents loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from a2sf.compat.lm_eval import (
    INSIDE,
    TASKS_DIRECTORY,
    Entry,
    Group,
    Kind,
    Leaf,
    TaskReader,
    kind_of,
    leaves,
    unresolved,
)
from a2sf.errors import ConfigError, UserError, nearest
from a2sf.policies.code_files import imported_files
from a2sf.tasks.files import user_folder
from a2sf.tasks.files.functions import function_file, known_arguments, live
from a2sf.tasks.files.index import index

LONG = tuple(
    f"long_{family}" for family in ("single", "multikey", "multivalue", "multiquery", "variables", "common", "frequent")
)
SUITES = {
    "paper": ("openbookqa", "winogrande", "piqa", "copa", "mathqa", "arc_easy", "arc_challenge"),
    "demo": ("piqa", "openbookqa", "arc_easy"),
    "long": LONG,
    "long_generate": tuple(f"{task}_generate" for task in LONG),
}
"""Names for lists of tasks. `paper`: those of arXiv 2407.20485; `long`: texts of any length, with choices or generation."""

OWN_TASKS = (Path(__file__).parent / "needle", Path(__file__).parent / "long")
NOT_SETTINGS = {"task", "task_alias", "group", "group_alias", "tag", "aggregate_metric_list", "num_fewshot"}
"""Keys of a group's member that do not change a number; its shots are stored separately."""
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Definition:
    """The definition of one task.

    Attributes:
        ref: reference to it: lm-eval's name, `group::member`, or the path of a YAML file.
        name: its name in tables.
        entry: lm-eval's entry of its file.
        settings: settings that the group changes for this member, without its shots.
        shots: number of examples that the group sets for this member; None: it sets none.
    """

    ref: str
    name: str
    entry: Entry
    settings: dict[str, Any]
    shots: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """lm-eval's configuration with functions as strings (nothing is imported)."""
        return TaskReader().config(self.entry) | self.settings

    def resolved(self) -> dict[str, Any]:
        """The configuration with its functions imported, to build the task."""
        return TaskReader(live).config(self.entry) | live(self.settings)

    @property
    def arguments(self) -> frozenset[str]:
        """Names that its code may read from the task's metadata; empty if it has no code that does so."""
        return known_arguments(self.config)

    @property
    def folder(self) -> Path | None:
        return self.entry.yaml_path.parent if self.entry.yaml_path else None

    def digest(self, config: dict[str, Any] | None = None) -> str | None:
        """A hash of the definition, its functions' files and the user's files that these import.

        None for those of lm-eval, which lm-eval's version identifies.

        Args:
            config: the configuration to hash, instead of the one that was read first.
        """
        of_lm_eval = self.folder is not None and self.folder.is_relative_to(TASKS_DIRECTORY)
        if not self.settings and self.ref == self.name and (of_lm_eval or self.folder in OWN_TASKS):
            return None
        parts: list[Any] = []
        imported: set[Path] = set()

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(k): plain(v) for k, v in sorted(value.items(), key=lambda pair: str(pair[0]))}
            if isinstance(value, list):
                return [plain(v) for v in value]
            if isinstance(value, str) and (file := function_file(value)) is not None:
                parts.append(hashlib.sha256(file.read_bytes()).hexdigest())
                imported.update(imported_files(file))
                return f"{file.name}:{value.rpartition('.')[2]}"
            return value

        parts.append(plain(self.config if config is None else config))
        parts += sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in imported)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


_digests: dict[str, str | None] = {}
"""Reference -> the digest of its definition when it was first checked in this process."""


def unchanged(found: Definition) -> None:
    """Refuse a definition that changed, or whose functions changed, since this process first read it.

    Raises:
        UserError: if its files changed.
    """
    if found.digest() is None or found.entry.yaml_path is None:
        return
    now = found.digest(unresolved(found.entry.yaml_path) | found.settings)
    if _digests.setdefault(found.ref, now) != now:
        raise UserError(f"tasks={found.name}: its definition changed after the sweep began; start it again")


def resolve(name: str, folder: Path | None = None) -> list[Definition]:
    """The tasks of a task, tag, group or YAML file, each with the settings of its group.

    Args:
        folder: a folder that `user_folder.include` has registered; its names take precedence over lm-eval's.

    Raises:
        ConfigError: if there is no such name, naming the nearest ones; or if it has a member that lm-eval cannot load.
    """
    if INSIDE in name and _find(name, folder)[1] is None:
        group = name.partition(INSIDE)[0]
        if _find(group, folder)[1] is not None:
            members = resolve(group, folder)
            found = [d for d in members if d.ref == name]
            if not found:
                known = [d.ref for d in members]
                raise ConfigError("tasks", name, f"{group} has no such member{nearest(name, known)}")
            return found
    requested, built = _read(name, folder)
    found_leaves = list(leaves(built))
    if not found_leaves:
        raise ConfigError("tasks", name, "lm-eval's group of that name has no member; name the tasks themselves")
    return list({id(d): d for d in _named(requested, found_leaves).values()}.values())


def aggregates(name: str, folder: Path | None = None) -> list[Aggregate]:
    """How lm-eval averages a group and the groups inside it, outer ones first; empty for a task or tag.

    Args:
        folder: as for `resolve`.

    Raises:
        ConfigError: as `resolve`.
    """
    return list(_cached_aggregates(name)) if folder is None else _aggregates(name, folder)


def _aggregates(name: str, folder: Path | None = None) -> list[Aggregate]:
    if INSIDE in name and _find(name, folder)[1] is None:
        return []
    requested, built = _read(name, folder)
    if not isinstance(built, Group):
        return []
    named = _named(requested, list(leaves(built)))
    groups = {g.name: g for g in [built, *built.get_all_groups()]}
    return [
        Aggregate(
            g.name,
            tuple(
                (a.metric, tuple(a.filter_list) if a.filter_list is not None else None, a.weight_by_size)
                for a in g.aggregate_metric_list
            ),
            tuple(named[leaf.number] for leaf in leaves(g)),
        )
        for g in groups.values()
        if g.aggregate_metric_list
    ]


@cache
def _cached_aggregates(name: str) -> list[Aggregate]:
    return _aggregates(name)


def _read(name: str, folder: Path | None) -> tuple[str, Any]:
    """A reference to a name that needs no folder; and lm-eval's group, list of a tag's members, or task of that name.

    Raises:
        ConfigError: if there is no such name.
    """
    requested, entry, mine = _find(name, folder)
    if entry is None:
        if name.endswith(YAML) or "/" in name:
            raise ConfigError("tasks", name, "there is no such file; give the path of a task's YAML, or lm-eval's name")
        known = [*SUITES, *mine, *index()]
        where = "a task of your own needs include_path=, its folder" if folder is None else f"nor a task in {folder}"
        raise ConfigError("tasks", name, f"there is no such suite or lm-eval task{nearest(name, known)}; {where}")
    return requested, _build(name, entry, mine)


def definition(ref: str) -> Definition:
    """The task of a reference.

    Raises:
        ConfigError: as `resolve`, and if it names several.
    """
    found = _resolved(ref)
    if len(found) != 1:
        raise ConfigError("tasks", ref, f"it names {len(found)} tasks, but must name one")
    return found[0]


@cache
def _resolved(ref: str) -> tuple[Definition, ...]:
    return tuple(resolve(ref))


@dataclass(frozen=True)
class Aggregate:
    """A group for which lm-eval computes scores from those of its tasks.

    Attributes:
        averages: of each metric its name, its filters (None: all), and whether tasks are weighted by their documents.
    """

    name: str
    averages: tuple[tuple[str, tuple[str, ...] | None, bool], ...]
    members: tuple[Definition, ...]


def _build(name: str, entry: Entry, mine: dict[str, Entry]) -> Any:
    known = {**index(), **mine} if entry.kind in (Kind.GROUP, Kind.TAG) else {}
    try:
        return TaskReader().build(entry, registry=known)
    except (ValueError, TypeError, KeyError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("tasks", name, f"lm-eval cannot read this group ({error})") from error


def _named(requested: str, members: list[Leaf]) -> dict[int, Definition]:
    """Number of a leaf -> its definition; its name is `group::member` if the group changes its settings.

    Equal members are one object.
    """
    of: dict[int, Definition] = {}
    found: dict[tuple[str, str, int | None], Definition] = {}
    label = home = requested
    if requested.endswith(YAML):  # a worker may have another current directory
        home = str(Path(requested).expanduser().resolve())
        label = str(_find(requested, None)[1].name)  # type: ignore[union-attr]
    for leaf in members:
        base = TaskReader().config(leaf.entry)
        settings = {k: v for k, v in leaf.overrides.items() if k not in NOT_SETTINGS and base.get(k) != v}
        shots = leaf.overrides.get("num_fewshot")
        name = ref = leaf.entry.name
        if requested.endswith(YAML) and leaf.entry.yaml_path == Path(home):
            ref = home
        elif not settings and INSIDE not in name and user_folder.folder_of(leaf.entry.yaml_path):
            ref = str(leaf.entry.yaml_path)
        elif settings or INSIDE in name:
            mine = user_folder.folder_of(leaf.entry.yaml_path)
            if mine is not None and not (home.endswith(YAML) and Path(home).is_relative_to(mine)):
                why = (
                    f"it redefines a task that the group {label} changes; define the group there, too, or name the task"
                )
                raise ConfigError(user_folder.KEY, leaf.entry.yaml_path, why)
            inner = name.removeprefix(f"{label}{INSIDE}")
            ref, name = f"{home}{INSIDE}{inner}", f"{label}{INSIDE}{inner}"
        as_text, number = json.dumps(settings, sort_keys=True, default=str), 1
        same_task = [d for d in found.values() if d.ref.partition("#")[0] == ref and d.settings != settings]
        if same_task:  # twice in a group, with different settings
            number = len({json.dumps(d.settings, sort_keys=True, default=str) for d in same_task}) + 1
            ref, name = f"{ref}#{number}", f"{name}#{number}"
        definition = Definition(ref, name, leaf.entry, settings, shots)
        of[leaf.number] = found.setdefault((ref, as_text, shots), definition)
    return of


def _find(name: str, folder: Path | None) -> tuple[str, Entry | None, dict[str, Entry]]:
    """A reference to a name that needs no folder, its entry (None: there is none), and the user's other entries.

    A task's file is searched for first, which is faster than reading lm-eval's 14,000 definitions.
    """
    mine = user_folder.entries(folder) if folder else {}
    if name in mine:
        file = mine[name].yaml_path
        return (str(file) if file else name), mine[name], mine
    if name.endswith(YAML):
        path = Path(name).expanduser().resolve()
        beside = user_folder.folder_of(path)
        return name, _in_file(path), user_folder.entries(beside) if beside else {}
    path_of = _quick(name)
    if path_of is not None:
        return name, Entry(name, Kind.TASK, path_of, cfg=_unresolved(path_of)), mine
    return name, index().get(name), mine


def hides(name: str, folder: Path) -> bool:
    """Whether the user's folder defines a name that lm-eval defines, too."""
    return name in user_folder.entries(folder) and (_quick(name) is not None or name in index())


def _in_file(path: Path) -> Entry | None:
    if not path.is_file():
        return None
    try:
        cfg = _unresolved(path)
        kind = kind_of(cfg)
    except Exception as error:  # YAML, an encoding, a template's path, or anything that lm-eval's reader raises
        why = " ".join(str(error).split())
        raise ConfigError("tasks", path, f"the file defines neither a task nor a group ({why})") from error
    key = "group" if kind is Kind.GROUP else "task"
    if not isinstance(name := cfg.get(key), str) or not name:
        raise ConfigError("tasks", path, f"`{key}:` in the file has to be one name")
    return Entry(name, kind, path, cfg=cfg)


def _quick(name: str) -> Path | None:
    if not name or "/" in name:
        return None
    pattern = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE)
    for ours in (folder / f"{name}.yaml" for folder in OWN_TASKS):
        if ours.is_file():
            return ours
    folders = {part for part in (name, name.split("_")[0]) if re.fullmatch(r"[\w.-]+", part)}
    likely = [p for part in sorted(folders) for p in sorted(TASKS_DIRECTORY.glob(f"{part}/**/*.yaml"))]
    likely += sorted(TASKS_DIRECTORY.glob(f"*/{name}/*.yaml")) if name in folders else []
    return next((p for p in likely if pattern.search(p.read_text(encoding="utf-8", errors="ignore"))), None)


@cache
def _unresolved(path: Path) -> dict[str, Any]:
    return unresolved(path)
