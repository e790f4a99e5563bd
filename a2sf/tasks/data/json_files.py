"""JSON and JSON-lines files of documents, read by Python's parser, which changes no value."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl")
LIKE_A_DATE = re.compile(r"\d{4}-\d\d-\d\d")
LARGEST = 2**63


def read(file: Path, field: str | None = None) -> list[dict[str, Any]]:
    """The documents of a file: one per line, or a list; a list of texts gives documents with the field `text`.

    Args:
        file: may be compressed, if its ending says so.
        field: if the file is one object: its field that holds the list.

    Raises:
        ValueError: with the line or the number of the document, if it is not JSON or a document is not an object.
    """
    import fsspec

    with fsspec.open(str(file), mode="rt", encoding="utf-8-sig", compression="infer", newline="") as stream:
        text = stream.read()
    if field is not None:
        return _documents(_parsed(text)[field])
    if text.lstrip().startswith("["):
        return _documents(_parsed(text))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and lines[0][1].strip() == "{":
        raise ValueError("give a list of documents in square brackets, or one document per line")
    return _documents([_parsed(line, number) for number, line in lines], texts=False)


def is_list(file: Path) -> bool:
    """Whether a file is one list, not one document per line."""
    with file.open("rb") as stream:
        return stream.read(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _documents(items: Any, texts: bool = True) -> list[dict[str, Any]]:
    if not isinstance(items, list):
        raise ValueError("it holds no list of documents")
    documents = [{"text": item} if texts and isinstance(item, str) else item for item in items]
    for number, document in enumerate(documents):
        if not isinstance(document, dict):
            raise ValueError(f"document {number} is not a JSON object but {json.dumps(document)[:40]}")
    return documents


def _parsed(text: str, line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} in line {line + error.lineno - 1}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the field {twice} twice")
    return made


def one_type_each(documents: list[dict[str, Any]], listed: bool) -> bool:
    """Whether a table, with one type per field, can hold these documents without changing them.

    An earlier version read such files into a table; documents that this changed need another hash.

    Args:
        listed: whether the file is one list; the table had ten digits of each fraction in it.
    """
    columns = dict.fromkeys(name for d in documents for name in d)
    if not columns or not all(_one_type([d.get(name) for d in documents], listed) for name in columns):
        return False
    # a file with None in a list was read again by a parser that took fifteen digits of every number in it
    return not _none_in_a_list(documents) or all(float(f"{x:.15g}") == x for x in _floats(documents))


def _none_in_a_list(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_none_in_a_list, value.values()))
    return isinstance(value, list) and any(item is None or _none_in_a_list(item) for item in value)


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)


def _one_type(values: Iterable[Any], listed: bool) -> bool:
    present = [v for v in values if v is not None]
    kinds = {type(v) for v in present}
    if len(kinds) > 1:
        return False
    kind = next(iter(kinds), None)
    if kind is int:
        return all(-LARGEST <= v < LARGEST for v in present)
    if kind is float:
        return not listed and all(map(math.isfinite, present))
    if kind is str:
        return not any(LIKE_A_DATE.match(v) or re.search("[\ud800-\udfff]", v) for v in present)
    if kind is list:
        return _one_type([item for v in present for item in v], listed)
    if kind is dict:
        names = list(present[0])
        return (
            bool(names)
            and all(list(v) == names for v in present)
            and all(_one_type([v[name] for v in present], listed) for name in names)
        )
    return True
