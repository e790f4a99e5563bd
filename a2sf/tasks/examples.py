"""Few-shot examples: never the document itself, and always the same for a document.

A document's examples depend only on the seed, the document and the number of shots; not on the number of documents, their
order, or the number of processes. They are those that lm-eval draws, unless lm-eval would draw the document itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from lm_eval.api.samplers import ContextSampler, FirstNSampler

from a2sf.errors import ConfigError, UserError, first_line
from a2sf.tasks.checks import missing_label
from a2sf.tasks.numbers import index_of
from a2sf.tasks.prompting import Prompting

Document = dict[str, Any]
CHECKED_POOL = 2000
"""Largest pool for which every document is checked, before scoring, to have enough other documents as examples."""
SHOWN = 200
"""Characters of a document in a message."""
DOCUMENT_SEED = 0
"""Seed of the random numbers in a task's processing of its documents; lm-eval's default."""


class Examples:
    """The examples of each document of a task.

    Args:
        pool: documents from which examples are drawn.
        scored: the scored documents in their order.
        printed: gives question and answer of a document as an example prints them; None: it cannot be an example.
        shots: number of examples of each document.
        seed: of the draws.
        kind: the task's sampler, a class of lm-eval.
        headroom: whether one more is drawn, as lm-eval does if the pool may contain the document itself.
        task: the task's name, for messages.

    Attributes:
        used: positions in the pool of all examples given so far; empty for a task with another sampler.
    """

    def __init__(
        self,
        pool: Sequence[Document],
        scored: Sequence[Document],
        printed: Callable[[Document], tuple[str, str] | None],
        *,
        shots: int,
        seed: int,
        kind: type[ContextSampler] = ContextSampler,
        headroom: bool = False,
        task: str = "the task",
    ) -> None:
        self.task = task
        self.pool, self.printed = pool, printed
        self.shots, self.seed, self.kind, self.headroom = shots, seed, kind, headroom
        self._place: dict[str, int] = {}
        for i, document in enumerate(scored):
            self._place.setdefault(_text(document), i)
        self.used: set[int] = set()
        self._draws = self._sequence()
        self._drawn: list[list[int]] = []
        self._prints: dict[int, tuple[str, str] | None] = {}

    def of(self, document: Document) -> list[Document]:
        """The examples of a document.

        Raises:
            ConfigError: if the pool has not enough other documents.
        """
        as_example = self.printed(document)
        if self.kind is FirstNSampler:
            chosen = list(self._others(document, as_example, range(len(self.pool))))
        elif self.kind is ContextSampler:
            drawn = self._draw(document)
            chosen = list(self._others(document, as_example, drawn))
            if len(chosen) < self.shots:
                rest = random.Random(f"{self.seed} {_text(document)}").sample(range(len(self.pool)), len(self.pool))
                chosen += self._others(
                    document, as_example, [i for i in rest if i not in drawn], self.shots - len(chosen)
                )
        else:  # another sampler of the task: the document is not in its pool
            pool = [self.pool[i] for i in self._others(document, as_example, range(len(self.pool)), len(self.pool))]
            self._enough(len(pool))
            sampler = self.kind(pool, rnd=random.Random(f"{self.seed} {_text(document)}").getrandbits(32))
            return list(sampler.sample(self.shots, None))
        self._enough(len(chosen))
        self.used.update(chosen[: self.shots])
        return [self.pool[i] for i in chosen[: self.shots]]

    def check(self, documents: Sequence[Document]) -> None:
        """Refuse more shots than there are other documents, before anything is scored.

        Raises:
            ConfigError: with both numbers.
        """
        if len(self.pool) <= CHECKED_POOL and self.shots > len(self.pool) // 2:
            for document in documents:
                as_example = self.printed(document)
                self._enough(sum(1 for _ in self._others(document, as_example, range(len(self.pool)), len(self.pool))))
        self._enough(len(self.pool))

    def _enough(self, others: int) -> None:
        if others < self.shots:
            raise ConfigError(
                "shots",
                self.shots,
                f"{self.task} has only {others} documents to take examples from, besides the scored one; "
                f"give at most {others}, or another data.fewshot_split",
            )

    def _others(
        self, document: Document, as_example: tuple[str, str] | None, which: Sequence[int], most: int | None = None
    ) -> Iterator[int]:
        """The positions in `which` of other documents: with other fields, and other question or answer as an example."""
        left = self.shots if most is None else most
        for i in which:
            if left <= 0:
                return
            if i not in self._prints:
                self._prints[i] = self.printed(self.pool[i])
            if self.pool[i] == document or (as_example is not None and self._prints[i] == as_example):
                continue
            left -= 1
            yield i

    def _draw(self, document: Document) -> list[int]:
        place = self._place.get(_text(document))
        if place is None:  # the task makes other documents each time
            size = min(len(self.pool), self.shots + self.headroom)
            return random.Random(f"{self.seed} {_text(document)}").sample(range(len(self.pool)), size)
        while len(self._drawn) <= place:
            self._drawn.append(next(self._draws))
        return self._drawn[place]

    def _sequence(self) -> Iterator[list[int]]:
        """lm-eval's draws, one per document, from one generator."""
        generator = random.Random(self.seed)
        size = min(len(self.pool), self.shots + self.headroom)
        while True:
            yield generator.sample(range(len(self.pool)), size)


class _Chosen(ContextSampler):
    """An lm-eval sampler that returns the examples it was made with."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Document]:
        return list(self.df)


class TaskMixin:
    """Mixin for a task of lm-eval: its documents come from `a2sf.tasks.data.documents`, its examples from `Examples`.

    Attributes:
        read_documents: reads the documents; None: the task reads them itself.
        shots, fewshot_seed: of the examples.
        made: the requests, after `make_requests`.
    """

    read_documents: Callable[[], Any] | None = None
    shots: int = 0
    fewshot_seed: int = 0
    _examples: Examples | None = None
    _scored: Any = None
    made: list[Any] | None = None

    def make_requests(self, lm: Any, prompting: Prompting, limit: int | None) -> list[Any]:
        """lm-eval's requests of the first `limit` documents (None: of all); evaluations use them from now on.

        Args:
            lm: an `HFLM`, which applies the chat template.

        Raises:
            ConfigError: if a setting of generation would have no effect on this task.
        """
        prompting.configure(self)
        super().build_all_requests(limit=limit, **prompting.arguments(lm))  # type: ignore[misc]
        self.made = list(self.instances)  # type: ignore[attr-defined]
        return self.made

    def build_all_requests(self, samples: list[int] | None = None, **settings: Any) -> None:
        """As in lm-eval; but if requests were made already, the same ones are used again, without answers."""
        if self.made is None:
            return super().build_all_requests(samples=samples, **settings)  # type: ignore[misc]
        for instance in self.made:
            instance.resps, instance.filtered_resps = [], {}
        self._instances = list(self.made)
        if samples is not None:  # lm-eval numbers chosen documents from 0
            place = {document: i for i, document in enumerate(samples)}
            chosen = [i for i in self.made if i.doc_id in place]
            numbered = [(i.metadata[0], place[i.doc_id], *i.metadata[2:]) for i in chosen]
            self._instances = [replace(i, metadata=m) for i, m in zip(chosen, numbered, strict=True)]
        return None

    def download(self, *arguments: Any, **settings: Any) -> None:
        if self.read_documents is None:
            super().download(*arguments, **settings)  # type: ignore[misc]
        else:
            self.dataset = self.read_documents()

    @property
    def eval_docs(self) -> Any:
        if self._scored is None:
            with seeded():
                self._scored = super().eval_docs  # type: ignore[misc]
        return self._scored

    def fewshot_docs(self) -> Any:
        return super().fewshot_docs() if self.shots else None  # type: ignore[misc]

    def examples(self) -> Examples:
        if self._examples is None:
            task: Any = self
            self._examples = Examples(
                list(task.sampler.df),
                task.eval_docs,
                self._printed,
                shots=self.shots,
                seed=self.fewshot_seed,
                kind=type(task.sampler),
                headroom=task.fewshot_cfg.split == task.config.test_split,
                task=task.config.task or "the task",
            )
        return self._examples

    def fewshot_context(self, doc: Document, **settings: Any) -> Any:
        if self.shots:
            examples = self.examples().of(doc)
            self.sampler = _Chosen(examples)
        return super().fewshot_context(doc=doc, **settings)  # type: ignore[misc]

    def process_results(self, doc: Document, results: Any) -> dict[str, Any]:
        """The task's metrics of a document.

        Raises:
            UserError: with the document, if the task's code fails; most often because no choice is the right answer.
        """
        try:
            return dict(super().process_results(doc, results))  # type: ignore[misc]
        except Exception as error:  # any code of the task
            name, shown = self.config.task, f"{_text(doc):.{SHOWN}}"  # type: ignore[attr-defined]
            why = f"{type(error).__name__}: {first_line(error)}{missing_label(self, doc)}"
            raise UserError(f"tasks={name}: its metrics fail at a document ({why}): {shown}") from error

    def _printed(self, document: Document) -> tuple[str, str] | None:
        """Question and answer as lm-eval prints them in an example."""
        task: Any = self
        how = task.fewshot_cfg
        try:
            question = task.doc_to_text(document, how.doc_to_text)
            choices = task.doc_to_choice(document, how.doc_to_choice) if how.doc_to_choice else None
            answer = task.doc_to_target(document, how.doc_to_target)
            if task.multiple_input and choices:
                question, choices = choices[question], None
            if choices and (index := index_of(answer)) is not None:
                answer = choices[index]
            return str(question), str(answer[0] if isinstance(answer, list) else answer)
        except Exception:  # any code of the task; a document may have no answer, or not the fields of an example
            return None


@contextmanager
def seeded() -> Iterator[None]:
    """Fix the seed of a task's processing of its documents; the caller's random state is restored afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    random.seed(DOCUMENT_SEED)
    np.random.seed(DOCUMENT_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _text(document: Document) -> str:
    return json.dumps(document, sort_keys=True, default=str)
