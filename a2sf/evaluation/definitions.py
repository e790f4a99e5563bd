"""What lm-eval defines: tasks, tags and groups by name, and a user's own YAML file by its path.

lm-eval's own reading of groups and tags is used; but a member here is its definition, not a task with its documents loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as _lm_eval_tasks
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from a2sf.errors import ConfigError, nearest

LONG = tuple(
    f"long_{family}" for family in ("single", "multikey", "multivalue", "multiquery", "variables", "common", "frequent")
)
SUITES = {
    "paper": ("openbookqa", "winogrande", "piqa", "copa", "mathqa", "arc_easy", "arc_challenge"),
    "demo": ("piqa", "openbookqa", "arc_easy"),
    "long": LONG,
    "long_generate": tuple(f"{task}_generate" for task in LONG),
}
"""Names for lists of tasks. `paper`: the seven of arXiv 2407.20485; `long`: ours of any length, choosing or writing."""

OWN_TASKS = (Path(__file__).parent / "needle", Path(__file__).parent / "long")
TASKS_DIRECTORY = Path(_lm_eval_tasks).parent
INSIDE = "::"
"""Between a group and one of its members, in the name of a member that exists only there."""
NOT_SETTINGS = {"task", "task_alias", "group", "group_alias", "tag", "aggregate_metric_list", "num_fewshot"}
"""Keys of a group's member that change no document's number; its shots are kept apart."""
MAKES_DOCUMENTS = ("dataset_path", "custom_dataset", "class", "include")
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Definition:
    """One task, as it is written down.

    Attributes:
        ref: what finds it again: lm-eval's name, `group::member`, or the path of a YAML file.
        name: what tables call it.
        entry: where it is written.
        settings: what the group says of this member, besides its shots.
        shots: how many examples the group wants for it; None: nothing said.
    """

    ref: str
    name: str
    entry: Entry
    settings: dict[str, Any]
    shots: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """lm-eval's configuration, functions as strings (nothing is imported)."""
        return _Reader(resolve=False).config(self.entry) | self.settings

    def resolved(self) -> dict[str, Any]:
        """The same with its functions imported, to build the task from."""
        return _Reader(resolve=True).config(self.entry) | _functions(self.settings)

    @property
    def folder(self) -> Path | None:
        return self.entry.yaml_path.parent if self.entry.yaml_path else None

    def digest(self) -> str | None:
        """A hash of the definition and of the functions' files; None for lm-eval's own, which its version identifies."""
        own = self.folder is not None and self.folder.is_relative_to(TASKS_DIRECTORY)
        if not self.settings and self.ref == self.name and (own or self.folder in OWN_TASKS):
            return None
        parts: list[Any] = []

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(k): plain(v) for k, v in sorted(value.items(), key=lambda pair: str(pair[0]))}
            if isinstance(value, list):
                return [plain(v) for v in value]
            if isinstance(value, str) and (file := _function_file(value)) is not None:
                parts.append(hashlib.sha256(file.read_bytes()).hexdigest())
                return f"{file.name}:{value.rpartition('.')[2]}"
            return value

        parts.append(plain(self.config))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def resolve(name: str) -> list[Definition]:
    """A task, tag, group or YAML file -> its tasks, each with what the group says of it.

    Raises:
        ConfigError: if there is no such name, with the nearest ones; or if it has a member that lm-eval cannot load.
    """
    entry = _find(name)
    if entry is None and INSIDE in name:
        group = name.partition(INSIDE)[0]
        if _find(group) is not None:
            members = resolve(group)
            found = [d for d in members if d.ref == name]
            if not found:
                known = [d.ref for d in members]
                raise ConfigError("tasks", name, f"{group} has no such member{nearest(name, known)}")
            return found
    if entry is None:
        if name.endswith(YAML) or "/" in name:
            raise ConfigError("tasks", name, "there is no such file; give the path of a task's YAML, or lm-eval's name")
        known = [*SUITES, *_index()]
        raise ConfigError("tasks", name, f"there is no such suite or lm-eval task{nearest(name, known)}")
    leaves = list(_leaves(_build(name, entry)))
    if not leaves:
        raise ConfigError("tasks", name, "lm-eval's group of that name has no member; name the tasks themselves")
    return _named(name, leaves)


def definition(ref: str) -> Definition:
    """The one task that `ref` finds.

    Raises:
        ConfigError: as `resolve`, and if it names several.
    """
    found = _resolved(ref)
    if len(found) != 1:
        raise ConfigError("tasks", ref, f"it names {len(found)} tasks, where one is asked for")
    return found[0]


@cache
def _resolved(ref: str) -> tuple[Definition, ...]:
    return tuple(resolve(ref))


@dataclass(frozen=True)
class _Leaf:
    """A member of a group, before it has a name of its own."""

    entry: Entry
    overrides: dict[str, Any]
    number: int

    @property
    def task_name(self) -> str:
        return f"{self.number}"  # unique: a group of lm-eval's keeps one member per name


class _Reader(TaskFactory):
    """lm-eval's factory, up to the point where it would load a task."""

    def __init__(self, resolve: bool) -> None:
        super().__init__()
        self.resolve, self.number = resolve, 0

    def config(self, entry: Entry) -> dict[str, Any]:
        return self._load_full_config(entry)

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        if entry.yaml_path is not None and entry.cfg is None:
            cfg = dict(load_yaml(entry.yaml_path, resolve_func=self.resolve))
        elif entry.yaml_path is not None and self.resolve:
            cfg = dict(load_yaml(entry.yaml_path, resolve_func=True))
        else:
            cfg = _functions(entry.cfg or {}) if self.resolve else deepcopy(entry.cfg or {})
        if entry.kind is Kind.GROUP:
            _members_only(cfg, entry.yaml_path.parent if entry.yaml_path else None)
        return cfg | (overrides or {})

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        self.number += 1
        return _Leaf(entry, overrides or {}, self.number)

    def _build_group_members(
        self,
        member_list: list[Any],
        group_name: str,
        overrides: dict[str, Any] | None,
        registry: dict[str, Entry],
    ) -> Any:
        nameless = [m for m in member_list if isinstance(m, dict) and not {"task", "group"} & set(m)]
        if nameless:
            said = ", ".join(
                " ".join(str(m[k]) for k in ("dataset_path", "dataset_name") if m.get(k)) for m in nameless
            )
            raise ConfigError(
                "tasks",
                group_name,
                f"lm-eval cannot load {len(nameless)} of its {len(member_list)} members, which have no name ({said}); "
                "name the tasks themselves",
            )
        members = []
        for member in member_list:
            item = {"task": member} if isinstance(member, str) else dict(member)
            base = item.get("task")
            if isinstance(base, str) and "group" not in item and base not in registry:
                if not any(k in item for k in MAKES_DOCUMENTS):
                    raise ConfigError("tasks", group_name, f"its member {base} is not a task{nearest(base, registry)}")
                name = _unused(f"{group_name}{INSIDE}{base}", registry)
                include = item.pop("include", None)
                cfg = dict(load_yaml(include, resolve_func=False)) | item if include else item
                registry[name] = Entry(name=name, kind=Kind.TASK, yaml_path=None, cfg=cfg | {"task": name})
                item = {"task": name}
            # a string, because of a dictionary lm-eval hands the tag's or group's own name on as the members' name
            members.append(item["task"] if set(item) == {"task"} else item)
        return super()._build_group_members(members, group_name, overrides, registry)


def _unused(name: str, registry: dict[str, Entry]) -> str:
    return next(n for i in itertools.count(1) if (n := name if i == 1 else f"{name}#{i}") not in registry)


def _build(name: str, entry: Entry) -> Any:
    known = _index() if entry.kind in (Kind.GROUP, Kind.TAG) else {}
    try:
        return _Reader(resolve=False).build(entry, registry=dict(known))
    except (ValueError, TypeError, KeyError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("tasks", name, f"lm-eval cannot read this group ({error})") from error


def _leaves(built: Any) -> Iterator[_Leaf]:
    if isinstance(built, _Leaf):
        yield built
        return
    for child in built if isinstance(built, Group | list) else ():
        yield from _leaves(child)


def _named(requested: str, leaves: list[_Leaf]) -> list[Definition]:
    """Names that find each member again: lm-eval's own where the group changes nothing, else `group::member`."""
    found: dict[tuple[str, str, int | None], Definition] = {}
    label = home = requested
    if requested.endswith(YAML):  # a worker may have another current directory
        home = str(Path(requested).expanduser().resolve())
        label = str(_find(requested).name)  # type: ignore[union-attr]
    for leaf in leaves:
        base = _Reader(resolve=False).config(leaf.entry)
        settings = {k: v for k, v in leaf.overrides.items() if k not in NOT_SETTINGS and base.get(k) != v}
        shots = leaf.overrides.get("num_fewshot")
        name = ref = leaf.entry.name
        if requested.endswith(YAML) and leaf.entry.yaml_path == Path(home):
            ref = home
        elif settings or INSIDE in name:
            inner = name.removeprefix(f"{label}{INSIDE}")
            ref, name = f"{home}{INSIDE}{inner}", f"{label}{INSIDE}{inner}"
        said, number = json.dumps(settings, sort_keys=True, default=str), 1
        alike = [d for d in found.values() if d.ref.partition("#")[0] == ref and d.settings != settings]
        if alike:  # the same task twice in a group, with different settings
            number = len({json.dumps(d.settings, sort_keys=True, default=str) for d in alike}) + 1
            ref, name = f"{ref}#{number}", f"{name}#{number}"
        found.setdefault((ref, said, shots), Definition(ref, name, leaf.entry, settings, shots))
    return list(found.values())


def _find(name: str) -> Entry | None:
    """Where a name is written down: a quick look for a task spares reading lm-eval's 14,000 definitions."""
    if name.endswith(YAML):
        return _in_file(Path(name).expanduser().resolve())
    path_of = _quick(name)
    if path_of is not None:
        return Entry(name, Kind.TASK, path_of, cfg=_unresolved(path_of))
    return _index().get(name)


def _in_file(path: Path) -> Entry | None:
    if not path.is_file():
        return None
    try:
        cfg = _unresolved(path)
        kind = TaskIndex._kind_of(cfg)
    except Exception as error:
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
    for file in (folder / f"{name}.yaml" for folder in OWN_TASKS):
        if file.is_file():
            return file
    folders = {part for part in (name, name.split("_")[0]) if re.fullmatch(r"[\w.-]+", part)}
    likely = [p for part in sorted(folders) for p in sorted(TASKS_DIRECTORY.glob(f"{part}/**/*.yaml"))]
    likely += sorted(TASKS_DIRECTORY.glob(f"*/{name}/*.yaml")) if name in folders else []
    return next((p for p in likely if pattern.search(p.read_text(errors="ignore"))), None)


@cache
def _unresolved(path: Path) -> dict[str, Any]:
    return dict(load_yaml(path, resolve_func=False))


@cache
def _index() -> dict[str, Entry]:
    return TaskManager().task_index


def _members_only(cfg: dict[str, Any], folder: Path | None) -> None:
    """Drop how a group's scores are averaged; find a template that one of its members names beside the group's file."""
    cfg.pop("aggregate_metric_list", None)
    for member in cfg["task"] if isinstance(cfg.get("task"), list) else []:
        if isinstance(member, dict):
            if folder is not None and isinstance(member.get("include"), str):
                member["include"] = str(folder / member["include"])
            _members_only(member, folder)


def _function_file(value: str) -> Path | None:
    """The Python file of a function as lm-eval writes it where it does not import: `/folder/module.function`."""
    module, _, name = value.rpartition(".")
    if not value.startswith("/") or not name.isidentifier() or "\n" in value or len(value) > 1000:
        return None
    folder, _, inner = module.rpartition("/")
    file = Path(folder) / f"{inner.replace('.', '/')}.py"
    return file if file.is_file() else None


def _functions(cfg: dict[str, Any]) -> dict[str, Any]:
    """`cfg` with the functions that are written as strings imported, as lm-eval does."""
    from lm_eval.tasks._yaml_loader import _import_fun_from_str

    def live(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: live(v) for k, v in value.items()}
        if isinstance(value, list):
            return [live(v) for v in value]
        return _import_fun_from_str(value) if isinstance(value, str) and _function_file(value) else value

    return {k: live(v) for k, v in cfg.items()}
