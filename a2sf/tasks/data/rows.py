"""Documents as a list of Python values, for code that expects a dataset of the datasets library.

An Arrow table has one type per column, so that reading documents into one can change them: one 2.5 among integers makes all
of them floats, a text that looks like a date becomes one. Here each value stays what it is.
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
"""Methods of a dataset that the datasets library also has for streams, which pass Python values on unchanged."""
PICKING = ("shuffle", "select", "shard", "take", "skip")
"""Methods of a dataset that choose and order rows, whatever these hold."""


class Rows:
    """One split's documents. As in a table, a document without a field that another has, has None there.

    The methods of `datasets.Dataset` are here, too. The few that need a table (`sort`, `to_pandas`, …) are refused where the
    table would change a value.

    Args:
        documents: each a dictionary of what JSON can hold.
    """

    def __init__(self, documents: Iterable[dict[str, Any]]) -> None:
        rows = [{k: _plain(v) for k, v in d.items()} for d in documents]
        columns = dict.fromkeys(k for row in rows for k in row)
        self._rows = [columns | row for row in rows]
        self.column_names = list(columns)

    @property
    def features(self) -> dict[str, None]:
        """The fields; none has a type."""
        return dict.fromkeys(self.column_names)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (copy.deepcopy(row) for row in self._rows)  # a task's code may change what it gets

    def __getitem__(self, which: Any) -> Any:
        """A document by its number, a field of all of them by its name, or fields of some by a slice, as a dataset does."""
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

        # what is set on a dataset itself would be lost
        if name.startswith(("_", "set_")) or not hasattr(Dataset, name):
            raise AttributeError(f"documents that are read from JSON have no {name}")
        if name in STREAMED:
            return partial(self._streamed, name)
        return partial(self._picked, name) if name in PICKING else getattr(self._table(name), name)

    def _streamed(self, method: str, *arguments: Any, **named: Any) -> Rows:
        from datasets import Dataset, IterableDataset

        given = dict(inspect.signature(getattr(Dataset, method)).bind(self, *arguments, **named).arguments)
        known = inspect.signature(getattr(IterableDataset, method)).parameters  # not how fast, nor where it is cached
        stream = getattr(IterableDataset.from_generator(self._each), method)
        return Rows(stream(**{k: v for k, v in given.items() if k in known and k != "self"}))

    def _each(self) -> Iterator[dict[str, Any]]:
        yield from self

    def _picked(self, method: str, *arguments: Any, **named: Any) -> Rows:
        numbers = getattr(self._numbers, method)(*arguments, **named)
        return Rows(self._rows[i] for i in numbers["number"])

    @cached_property
    def _numbers(self) -> Any:
        from datasets import Dataset

        return Dataset.from_dict({"number": list(range(len(self._rows)))})

    def _table(self, method: str) -> Any:
        """The same as a dataset.

        Raises:
            UserError: if that would change a value.
        """
        from datasets import Dataset

        try:
            table = Dataset.from_list(self._rows)
            made = list(table)
        except Exception as error:
            raise UserError(f"{method} of a dataset needs columns of one type, which these documents lack") from error
        for number, (row, other) in enumerate(zip(self._rows, made, strict=True)):
            for name, value in row.items():
                if _text(value) != _text(other[name]):
                    raise UserError(
                        f"{method} of a dataset would change {name} of document {number} from {value!r} to {other[name]!r}: "
                        "use map, filter, select or shuffle, or a list"
                    )
        return table


def _plain(value: Any) -> Any:
    """As a dataset would give it back: lists and Python's numbers instead of tuples and numpy's."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
