"""Few-shot examples: never the document itself, and the same ones for a document whatever else is run.

A document's examples follow from the seed, the document and the number of shots alone: not from how many documents are
scored, in which order, or by how many processes. They are those that lm-eval draws, wherever lm-eval does not draw the
document itself.
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
from a2sf.tasks.numbers import index_of
from a2sf.tasks.prompting import Prompting

Document = dict[str, Any]
CHECKED_POOL = 2000
"""Up to so many examples, whether enough are left is checked for each document before anything is scored."""
SHOWN = 200
"""Characters of a document in a message."""
DOCUMENT_SEED = 0
"""Of the shuffles in a task's own processing of its documents; lm-eval's default."""


class Examples:
    """The examples of each document of a task.

    Args:
        pool: what examples are drawn from.
        scored: the documents in their order.
        printed: what an example of a document would print: question and answer; None if it cannot be one.
        shots: how many for each.
        seed: of the draws.
        kind: lm-eval's sampler that the task asks for.
        headroom: draw one more, as lm-eval does where it expects the document itself in the pool.
        task: its name, for messages.

    Attributes:
        used: places in the pool of those that were given, but where a task has a sampler of its own.
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
        """The examples that stand before a document.

        Raises:
            ConfigError: if there are not enough others.
        """
        own = self.printed(document)
        if self.kind is FirstNSampler:
            chosen = list(self._others(document, own, range(len(self.pool))))
        elif self.kind is ContextSampler:
            drawn = self._draw(document)
            chosen = list(self._others(document, own, drawn))
            if len(chosen) < self.shots:
                rest = random.Random(f"{self.seed} {_text(document)}").sample(range(len(self.pool)), len(self.pool))
                chosen += self._others(document, own, [i for i in rest if i not in drawn], self.shots - len(chosen))
        else:  # a sampler of the task's own: it never sees the document
            pool = [self.pool[i] for i in self._others(document, own, range(len(self.pool)), len(self.pool))]
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
        self._enough(len(self.pool))
        if len(self.pool) <= CHECKED_POOL and self.shots > len(self.pool) // 2:
            for document in documents:
                own = self.printed(document)
                self._enough(sum(1 for _ in self._others(document, own, range(len(self.pool)), len(self.pool))))

    def _enough(self, others: int) -> None:
        if others < self.shots:
            raise ConfigError(
                "shots",
                self.shots,
                f"{self.task} has only {others} documents to take examples from, besides the one that is asked about; "
                f"give at most {others}, or another data.fewshot_split",
            )

    def _others(
        self, document: Document, own: tuple[str, str] | None, which: Sequence[int], most: int | None = None
    ) -> Iterator[int]:
        """Those of `which` that are not the document: neither its fields nor what it would print as an example."""
        left = self.shots if most is None else most
        for i in which:
            if left <= 0:
                return
            if i not in self._prints:
                self._prints[i] = self.printed(self.pool[i])
            if self.pool[i] == document or (own is not None and self._prints[i] == own):
                continue
            left -= 1
            yield i

    def _draw(self, document: Document) -> list[int]:
        place = self._place.get(_text(document))
        if place is None:  # its task makes it anew each time
            size = min(len(self.pool), self.shots + self.headroom)
            return random.Random(f"{self.seed} {_text(document)}").sample(range(len(self.pool)), size)
        while len(self._drawn) <= place:
            self._drawn.append(next(self._draws))
        return self._drawn[place]

    def _sequence(self) -> Iterator[list[int]]:
        """lm-eval's draws: one after the other from one generator, in the order of the documents."""
        generator = random.Random(self.seed)
        size = min(len(self.pool), self.shots + self.headroom)
        while True:
            yield generator.sample(range(len(self.pool)), size)


class _Chosen(ContextSampler):
    """Gives what was chosen already."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Document]:
        return list(self.df)


class OwnDocuments:
    """Mixed into a task of lm-eval's: reads its documents as `a2sf.tasks.data.documents` does, and gives examples as above.

    Attributes:
        read_documents: reads them; None: the task's own way.
        shots, fewshot_seed: of its examples.
        made: its requests, once `make_requests` has made them.
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
        """As lm-eval's; but requests that were made already are given again, without answers."""
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
        """As the task's own.

        Raises:
            UserError: if that fails, with the document: a right answer that is no choice's, most often.
        """
        try:
            return dict(super().process_results(doc, results))  # type: ignore[misc]
        except Exception as error:
            name, shown = self.config.task, f"{_text(doc):.{SHOWN}}"  # type: ignore[attr-defined]
            why = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"tasks={name}: its metrics fail at a document ({why}): {shown}") from error

    def _printed(self, document: Document) -> tuple[str, str] | None:
        """Question and answer as lm-eval writes them in an example."""
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
        except Exception:  # a document that has no answer, or other fields than the task's own examples
            return None


@contextmanager
def seeded() -> Iterator[None]:
    """What a task's own processing draws at random is the same in every process; the caller's generators are left alone."""
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
