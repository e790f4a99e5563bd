"""Documents as a list of Python values, with the interface of a dataset of the datasets library.

An Arrow table has one type per column, which can change values: one 2.5 among integers makes all of them floats, and a text
that looks like a date becomes a date. Here no value changes.
"""

from __future__ import annotations

import copy
import inspect
import json
import operator
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np

from a2sf.errors import UserError

STREAMED = ("map", "filter", "remove_columns", "rename_column", "rename_columns", "select_columns")
"""Methods of a dataset that streams of the datasets library also have; streams do not change Python values."""
PICKING = ("shuffle", "select", "shard", "take", "skip")
"""Methods of a dataset that select or order rows and do not use their values."""


class DocumentList:
    """The documents of one split. As in a table, a field that a document does not have is None.

    It has the methods of `datasets.Dataset`. The few that need a table (`sort`, `to_pandas`, …) raise an error if the table
    would change a value.

    Args:
        documents: dictionaries of JSON values.
    """

    def __init__(self, documents: Iterable[dict[str, Any]]) -> None:
        rows = [{k: _plain(v) for k, v in d.items()} for d in documents]
        columns = dict.fromkeys(k for row in rows for k in row)
        self._rows = [columns | row for row in rows]
        self.column_names = list(columns)

    @property
    def features(self) -> dict[str, None]:
        """The fields, without types."""
        return dict.fromkeys(self.column_names)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (copy.deepcopy(row) for row in self._rows)  # a copy, because a task's code may change it

    def __getitem__(self, which: Any) -> Any:
        """As in a dataset: a document by its number, a field of all documents by its name, or fields of a slice."""
        if isinstance(which, str):
            if which not in self.column_names:
                raise KeyError(which)
            return [copy.deepcopy(row[which]) for row in self._rows]
        if isinstance(which, slice):
            return {name: self[name][which] for name in self.column_names}
        if isinstance(which, Iterable):
            chosen = [self._rows[i] for i in which]
            return {name: [copy.deepcopy(row[name]) for row in chosen] for name in self.column_names}
        return copy.deepcopy(self._rows[operator.index(which)])

    def to_list(self) -> list[dict[str, Any]]:
        return list(self)

    def __getattr__(self, name: str) -> Any:
        from datasets import Dataset

        # attributes that are set on a dataset would be lost
        if name.startswith(("_", "set_")) or not hasattr(Dataset, name):
            raise AttributeError(f"documents that are read from JSON have no {name}")
        if name in STREAMED:
            return partial(self._streamed, name)
        return partial(self._picked, name) if name in PICKING else getattr(self._table(name), name)

    def _streamed(self, method: str, *arguments: Any, **named: Any) -> DocumentList:
        from datasets import Dataset, IterableDataset

        given = dict(inspect.signature(getattr(Dataset, method)).bind(self, *arguments, **named).arguments)
        known = inspect.signature(
            getattr(IterableDataset, method)
        ).parameters  # without arguments about speed and caches
        stream = getattr(IterableDataset.from_generator(self._each), method)
        return DocumentList(stream(**{k: v for k, v in given.items() if k in known and k != "self"}))

    def _each(self) -> Iterator[dict[str, Any]]:
        yield from self

    def _picked(self, method: str, *arguments: Any, **named: Any) -> DocumentList:
        numbers = getattr(self._numbers, method)(*arguments, **named)
        return DocumentList(self._rows[i] for i in numbers["number"])

    @cached_property
    def _numbers(self) -> Any:
        from datasets import Dataset

        return Dataset.from_dict({"number": list(range(len(self._rows)))})

    def _table(self, method: str) -> Any:
        """The documents as a dataset.

        Raises:
            UserError: if that would change a value.
        """
        from datasets import Dataset

        try:
            table = Dataset.from_list(self._rows)
            made = list(table)
        except Exception as error:  # Arrow raises several kinds
            raise UserError(
                f"{method} of a dataset needs columns of one type, which these documents do not have"
            ) from error
        for number, (row, other) in enumerate(zip(self._rows, made, strict=True)):
            for name, value in row.items():
                if _text(value) != _text(other[name]):
                    raise UserError(
                        f"{method} of a dataset would change {name} of document {number} from {value!r} to {other[name]!r}: "
                        "use map, filter, select or shuffle, or a list"
                    )
        return table


def _plain(value: Any) -> Any:
    """The value as a dataset returns it: lists and numbers of Python instead of tuples and NumPy's types."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
