"""Variants: results that differ in something for which tables have no column.

What one sweep varied becomes rows of their own; other differences are refused, or older results left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import pandas as pd

from a2sf.analysis.results.labels import DASH, LONGEST_SETTING
from a2sf.errors import UserError, counted
from a2sf.store.runs import StoredCell

MUST_AGREE = ("split", "fewshot_split", "seed", "dtype", "limit", "stopped", "task_version", "definition", "data")
"""What has to be the same in all cells that are compared."""
PER_TASK = ("stopped", "split", "task_version", "definition", "data", "fewshot_split")
SWEPT = ("split", "fewshot_split", "seed", "dtype", "limit")
"""Of these, those in which the cells of one sweep may differ: then they become rows of their own."""
SOURCE = ["data", "split", "fewshot_split"]
"""Columns that say which documents a cell has."""
IN_COLUMNS = frozenset(
    "model weights dtype policy policy_settings budget schedule prompting task task_version definition task_args data shots"
    " seed drawn_with".split()
)
"""Entries of a cell's identity that have columns of their own."""


OF_POLICY = ("policy_source", "policy_version", "cut", "context", "layers")
"""Of the others, those that belong to a policy: its results are compared with those of other policies as usual."""
SHOWN = 8
"""Characters of the hash of a policy's code in a label."""


def rest_of_identity(cell: Mapping[str, Any]) -> str:
    """What else a cell is identified by (device, engine, ...), as JSON."""
    rest = {k: v for k, v in cell.get("identity", {}).items() if k not in IN_COLUMNS}
    return json.dumps(rest, sort_keys=True)


def drop_outdated(cells: list[StoredCell], notes: list[str]) -> list[StoredCell]:
    """Leave out what a sweep computed on documents that have changed since, as the sweep's own table does."""
    newest: dict[tuple[Any, ...], tuple[str, str]] = {}
    for stored in cells:
        key, finished = place_of(stored), str(stored.result["timing"].get("finished"))
        newest[key] = max(newest.get(key, ("", "")), (finished, _documents_of(stored)))
    left = [c for c in cells if _documents_of(c) != newest[place_of(c)][1]]
    for task in sorted({c.cell["task"] for c in left}):
        old = [c for c in left if c.cell["task"] == task]
        notes.append(
            f"{task}: {counted(len(old), 'cell')} of documents that have changed since are left out "
            f"({old[0].path.name}{', …' * (len(old) > 1)})."
        )
    return [c for c in cells if c not in left]


def place_of(stored: StoredCell) -> tuple[Any, ...]:
    """Equal for cells of the same requested documents."""
    cell, documents = stored.cell, stored.result["documents"]
    requested = json.dumps(cell.get("data") or {}, sort_keys=True)
    return cell["model"], cell["task"], cell["shots"], requested, documents["split"], documents.get("fewshot_split")


def _documents_of(stored: StoredCell) -> str:
    documents = stored.result["documents"]
    return str(documents.get("content") or documents.get("fingerprint"))


def label_variants(frame: pd.DataFrame, mixed: bool, place: Sequence[str], notes: list[str]) -> pd.DataFrame:
    """Fill the column `variant`: what a sweep varied, where cells would otherwise share a row.

    Args:
        mixed: accept differences between sweeps, and in what a sweep cannot vary.
        place: columns that say which row and column of which table a cell has, `variant` among them.

    Raises:
        UserError: if cells differ otherwise in what has to agree, or two of them have one place.
    """
    _by_source(frame)
    for key in MUST_AGREE:
        none = "all" if key == "limit" else DASH
        text = frame[key].map(lambda v, none=none: none if pd.isna(v) else f"{v:g}" if isinstance(v, float) else str(v))
        group = ["model", "shots", "variant", *(["task"] if key in PER_TASK else [])]
        differing = [rows for _, rows in text.groupby([frame[g] for g in group]) if rows.nunique() > 1]
        for rows in differing:
            described = "; ".join(f"{value} in {_some(frame.loc[part.index])}" for value, part in rows.groupby(rows))
            swept = key in SWEPT and (rows.groupby(frame.loc[rows.index, "source"]).nunique() > 1).all()
            hint = "; --limit chooses" if key == "limit" else ""
            if not mixed and not swept:
                raise UserError(
                    f"These results differ in {key}: {described}; choose the runs or filters so that they agree, "
                    "or say --allow-mixed."
                )
            notes.append(
                f"These results differ in {key} and are rows of their own: {described}{hint}."
                if swept
                else f"Mixed on request: {key} is {described}."
            )
        if differing:
            # the rows of tasks in which it does not differ as well, so that a row has them all
            places = frame[["model", "shots"]].apply(tuple, axis=1)
            all_of = places.isin({places[rows.index[0]] for rows in differing})
            frame.loc[all_of, "variant"] += " " + key.replace("_", " ") + " " + text[all_of]
    frame["variant"] = frame["variant"].str.strip()
    _by_identity(frame, place)
    clash = frame.duplicated([*place], keep=False)
    if clash.any():
        first = frame[clash].iloc[0]
        duplicates = frame.loc[(frame[[*place]] == first[[*place]]).all(axis=1), "key"]
        raise UserError(
            f"Two cells claim the same place in the table ({first['label']}, budget {first['budget']}, "
            f"{first['task']}): {', '.join(duplicates)}; give one of them."
        )
    return frame


def _by_source(frame: pd.DataFrame) -> None:
    """Where one sweep took a task's documents from several places (`data.*`), name it."""
    documents = pd.Series([json.dumps([*map(str, d)]) for d in frame[SOURCE].itertuples(index=False)], frame.index)
    for (_, _), rows in frame.groupby(["model", "shots"]):
        known: dict[str, dict[str, Any]] = {}
        several = False
        for _, of_task in rows.groupby(["source", "task"]):
            requested = {
                d: json.loads(s) for d, s in zip(documents[of_task.index], of_task["data_settings"], strict=True)
            }
            known |= requested
            several |= len({json.dumps(a, sort_keys=True) for a in requested.values()}) > 1
        if several:
            labels = _differing_values([known[d] for d in documents[rows.index]])
            frame.loc[rows.index, "variant"] = labels


def _by_identity(frame: pd.DataFrame, place: Sequence[str]) -> None:
    """Cells of one sweep in one place, which differ in something that has no column: name it."""
    for _, rows in frame[frame.duplicated([*place], keep=False)].groupby([*place], dropna=False):
        if rows["source"].nunique() > 1 or rows["rest"].nunique() < len(rows):
            continue
        varied = _varied([json.loads(r) for r in rows["rest"]])
        same = frame["source"] == rows["source"].iloc[0]
        if of_policy := [k for k in varied if k in OF_POLICY]:
            mine = same & (frame["policy"] == rows["policy"].iloc[0])
            frame.loc[mine, "settings"] = [
                _with_settings(s, json.loads(r), of_policy)
                for s, r in frame.loc[mine, ["settings", "rest"]].itertuples(index=False)
            ]
        if others := [k for k in varied if k not in OF_POLICY]:
            described = [_described(json.loads(r), others, {}) for r in frame.loc[same, "rest"]]
            frame.loc[same, "variant"] = (
                frame.loc[same, "variant"] + pd.Series(described, frame.index[same]).radd(" ")
            ).str.strip()
        _by_identity(frame, place)
        return


def _with_settings(settings: str, identity: Mapping[str, Any], keys: Sequence[str]) -> str:
    """A policy's settings as JSON, with entries of a cell's identity."""
    more = {key.replace("_", " "): str(identity.get(key, DASH))[:SHOWN] for key in keys}
    return json.dumps(json.loads(settings) | more, sort_keys=True)


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(k for s in settings for k in s)
    return [k for k in keys if len({json.dumps(s.get(k), sort_keys=True) for s in settings}) > 1]


def _differing_values(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each one's values of what differs between them."""
    varied = _varied(settings)
    paths = {str(s["dir"]) for s in settings if "dir" in s}
    short = {p: PurePath(p).name for p in paths}
    if len(set(short.values())) < len(paths):
        short = {}
    return [_described(s, varied, short) for s in settings]


def _described(settings: Mapping[str, Any], varied: Sequence[str], short: Mapping[str, str]) -> str:
    words = []
    for key in varied:
        value = settings.get(key, "hub" if key == "source" and "dir" not in settings else DASH)
        text = short.get(value, value) if isinstance(value, str) else json.dumps(value, sort_keys=True)
        words.append(
            f"{key.replace('_', ' ')} {text if len(text) <= LONGEST_SETTING or key == 'dir' else text[:8] + '…'}"
        )
    return ", ".join(words)


def _some(rows: pd.DataFrame) -> str:
    names = sorted(set(rows["key"]))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
