"""The key `task_args`: which of its arguments are for a task, and whether the task's code reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a2sf.errors import nearest
from a2sf.tasks.definitions import Definition


@dataclass(frozen=True)
class Argument:
    """One argument of `task_args` for one task.

    Attributes:
        key: as the user gave it, `task_args.<name>` or `task_args.<task>.<name>`.
        refusal: why the task does not use it; None: the task uses it.
    """

    key: str
    name: str
    value: Any
    refusal: str | None


def arguments_of(found: Definition, requested: str, given: Mapping[str, Any], names: set[str]) -> list[Argument]:
    """The arguments of `task_args` for one task.

    Args:
        requested: the task or group in the key `tasks`.
        given: arguments for all tasks; and under the name of a task or group its own arguments, which take precedence.
        names: of all tasks and groups.
    """
    of_tasks = {k for k, v in given.items() if k in names and isinstance(v, Mapping)}
    keyed = {str(k): (f"task_args.{k}", v) for k, v in given.items() if k not in of_tasks}
    for name in (n for n in dict.fromkeys((requested, found.entry.name, found.name)) if n in of_tasks):
        keyed |= {str(k): (f"task_args.{name}.{k}", v) for k, v in given[name].items()}
    known = found.arguments
    not_read = f"the code of {found.name} reads no such argument"
    return [
        Argument(
            full,
            name,
            value,
            None
            if name in known
            else not_read + nearest(name, known)
            if known
            else f"{found.name} has no code that takes arguments",
        )
        for name, (full, value) in keyed.items()
    ]
