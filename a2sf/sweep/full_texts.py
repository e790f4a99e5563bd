"""How likely the full cache's texts are under each system of a group: columns of the documents of a task that generates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from a2sf.errors import first_line
from a2sf.policies.find import find_policy
from a2sf.scoring.generation.full_text import Found, full_texts
from a2sf.scoring.requests import TEXT, Requests
from a2sf.scoring.scorer import Scorer
from a2sf.scoring.systems import Answer
from a2sf.sweep.answer_store import AnswerStore, known_answers
from a2sf.sweep.cell import Cell
from a2sf.sweep.reuse import find_extendable

COLUMNS = ("full_text_loglikelihood", "full_text_tokens")


class FullTexts:
    """The full cache's texts of a group, and their log-likelihoods under its systems.

    The texts are those of the group's full-cache cell, or of a finished one of the same model, documents and examples. Cells
    that are finished before it wait for it, as answers. Without one there are no columns.

    Args:
        cells: of the group.
        store: their answers.
        directory: of the sweep.
    """

    def __init__(self, scorer: Scorer, cells: Sequence[Cell], store: AnswerStore, directory: Path) -> None:
        self.scorer, self.store = scorer, store
        self._texts: dict[str, list[int]] | None = None
        self._found: dict[str, Found] = {}
        self._failed: dict[str, str] = {}
        self._reference = next((c.name for c in cells if not c.policy.evicts), None)
        if self._reference is None:
            full = dataclasses.replace(cells[0], policy=find_policy("full")(), budget=None, schedule=None)
            stored = find_extendable(directory.parent, [full]).get(full.name)
            known = known_answers(stored, store.documents)
            self._texts = self._tokens(known) or None

    def ready(self, names: Sequence[str], requests: Sequence[Requests]) -> list[str]:
        """Of some finished cells, those that can be evaluated: the full cache's texts have been read under their systems."""
        waits = self._reference in self.store.all
        if waits and self._reference not in names:
            return []
        if waits and self._texts is None:
            assert self._reference is not None
            answers = self.store[self._reference]
            self._texts = self._tokens(answers.known | answers.computed)
        new = [n for n in names if n not in self._found and self.store[n].error is None]
        if not self._texts or not new:
            return list(names)
        systems = [self.store[n].system for n in new]
        for of_kind in (r for r in requests if r.kind == TEXT):
            for name, found in zip(new, full_texts(self.scorer, of_kind, self._texts, systems), strict=True):
                if isinstance(found, Exception):
                    self._failed[name] = f"The full cache's texts could not be read: {first_line(found)}."
                self._found.setdefault(name, {}).update({} if isinstance(found, Exception) else found)
        return list(names)

    def added(self, name: str, result: dict[str, Any], documents: pd.DataFrame) -> pd.DataFrame:
        """A cell's documents with `COLUMNS`, if the texts were read; if not, a note in its `result` says why."""
        if name in self._failed:
            result["notes"].append({"text": self._failed.pop(name)})
        found = self._found.pop(name, None)
        if found is None:
            return documents
        each = [found.get(hashes[0], (math.nan, 0)) for hashes in documents["request_hashes"]]
        return documents.assign(**dict(zip(COLUMNS, zip(*each, strict=True), strict=True)))

    def _tokens(self, answers: Mapping[str, Answer]) -> dict[str, list[int]]:
        """The tokens of the texts, of several drawn for a prompt those of the first; those of older results made anew.

        A conversation has none: between its answers are questions, which the full cache did not write.
        """
        encode = self.scorer.lm.tok_encode
        return {
            key: [int(t) for t in encode(a.value, add_special_tokens=False)] if a.tokens is None else a.tokens
            for key, a in answers.items()
            if "#" not in key and a.turns is None
        }
