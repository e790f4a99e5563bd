"""What results were asked for: in which groups, and under which of lm-eval's options, which keep them apart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pandas as pd

from a2sf.store.aggregates import OPTIONS, Group

LONGEST = 40
"""Characters of an option's value in a table's title."""


def asked_groups(groups: Sequence[Group], chosen: tuple[str, ...]) -> tuple[list[Group], tuple[str, ...]]:
    """The groups to show, and the tasks: those of a group for its name.

    Args:
        groups: of one that was noted twice, the later counts.
        chosen: tasks and groups to show; all if it is empty.
    """
    latest = list({(g.name, tuple(m.shots for m in g.members)): g for g in groups}.values())
    if not chosen:
        return latest, chosen
    members = {g.name: [m.task for m in g.members] for g in latest}
    tasks = tuple(dict.fromkeys(t for name in chosen for t in members.get(name, [name])))
    return [g for g in latest if set(members[g.name]) <= set(tasks)], tasks


def with_options(frame: pd.DataFrame) -> pd.Series:
    """Models, with those of lm-eval's options behind their names in which results of one task differ."""
    names = frame["model"].astype(str).copy()
    for key in OPTIONS:
        text = frame[key].map(lambda v: "" if pd.isna(v) else str(v).lower() if isinstance(v, bool) else str(v))
        differ = text.groupby(frame["task"]).transform("nunique") > 1
        chosen = differ & (text != "")
        names[chosen] += ", " + text[chosen].map(lambda v, key=key: key if v == "true" else f"{key} {_shortened(v)}")
    return names


def _shortened(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}… #{zlib.crc32(text.encode()):08x}"
