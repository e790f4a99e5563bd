"""Notes on documents whose scores may mislead, such as those without a right choice.

lm-eval scores them, mostly without a warning. Here they are scored in the same way, counted and named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from lm_eval.api.task import ConfigurableTask

from a2sf.scoring.generation.ends import LENGTH, THINKING
from a2sf.scoring.requests import ROLLING, Requests, request_hash
from a2sf.scoring.systems import Answers
from a2sf.tasks.templates import null_fields

NAMED = 3
"""Documents that a note names at most."""
NO_ANSWER = "the right answer is none of the choices, so that no prediction counts as right"
NO_TARGET = "there is no right answer to compare the text with"
TWICE = "a choice before the right one has the same text, so that lm-eval predicts that one and counts it as wrong"
EMPTY = (
    "a choice is empty: only the space before it is scored, and acc_norm, which divides by its length, never chooses it"
)
JOINED = (
    "the tokens of prompt and continuation together do not begin with the prompt's own; what is scored is the part that "
    "lm-eval scores, not the whole continuation"
)
NULL = "{fields} is null, which the prompt shows as None"
NULL_TARGET = "{fields} is null, so that the right answer is None"
CUT = (
    "the prompt is too long for the model's {positions} positions, and its beginning was not read (up to {cut} tokens)"
)


def doubts(
    task: Any, samples: Sequence[dict[str, Any]], requests: Iterable[Requests], answers: Answers
) -> list[dict[str, Any]]:
    """Notes on the documents of a cell, as `result.json` has them.

    Args:
        samples: lm-eval's.
        requests: those of the samples.
        answers: to them.
    """
    place = {key: (of, i) for of in requests for i, key in enumerate(of.keys)}
    found: dict[str, list[int]] = {}
    documents = {s["doc_id"]: s for s in reversed(samples)}  # there is a sample for each filter
    longest, positions = 0, 0
    for number, sample in sorted(documents.items()):
        requests_of = [place[request_hash(tuple(a))] for a in sample["arguments"]]
        unread = 0
        for (of, i), arguments in zip(requests_of, sample["arguments"], strict=True):
            answer = answers.answer(request_hash(tuple(arguments)))
            unread = max(unread, 0 if answer is None or of.kind == ROLLING else of.unread(i, answer))
            positions = of.lm.max_length
        longest = max(longest, unread)
        joined = any(of.kind == "loglikelihood" and of.joins(*of.instances[i].args) for of, i in requests_of)
        said = [*_of_answers(task, sample), *([CUT] if unread else []), *([JOINED] if joined else [])]
        for what in dict.fromkeys(said):
            found.setdefault(what, []).append(number)
    texts = {CUT: CUT.format(positions=positions, cut=longest)}
    notes = [_note(task, texts.get(what, what), numbers, len(documents)) for what, numbers in found.items()]
    return [*notes, *_of_examples(task), *_of_ends(task, documents.values(), answers)]


def not_numbers(name: str, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Notes on metrics that are not numbers, which results do not store.

    Args:
        name: of the task.
        scores: lm-eval's, by `metric,filter`.
    """
    lost = "so that results have no value of it"
    return [
        {"text": f"{name}: the metric {key.removesuffix(',none')} came out as {value}, {lost}."}
        for key, value in scores.items()
        if "," in key and "_stderr," not in key and isinstance(value, Real) and not math.isfinite(value)
    ]


def _note(task: Any, text: str, numbers: list[int], of: int) -> dict[str, Any]:
    named = ", ".join(map(str, numbers[:NAMED])) + (", …" if len(numbers) > NAMED else "")
    which = f"document{'s' if len(numbers) > 1 else ''} {named}"
    return {"text": f"{task.config.task}: in {len(numbers)} of {of} documents ({which}), {text}."}


def _of_answers(task: Any, sample: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a document's choices and its right answer, by lm-eval's rules (`process_results`)."""
    if not isinstance(task, ConfigurableTask) or callable(task.config.process_results):
        return
    document, target = sample["doc"], sample["target"]
    if missing := null_fields([task.config.doc_to_text], document):
        yield NULL.format(fields=", ".join(missing))
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(document)
        right = task.doc_to_text(document) if task.multiple_input else target
        places = [_place(r, choices) for r in (right if isinstance(right, list) else [right])]
        if not places or any(p is None for p in places):
            yield NO_ANSWER
        elif all(p is not None and choices.index(choices[p]) < p for p in places):
            yield TWICE
        if "" in choices:
            yield EMPTY
    elif task.OUTPUT_TYPE == "generate_until" and "bypass" not in task._metric_fn_list:
        if task.config.doc_to_choice is not None:
            if _place(target, task.doc_to_choice(document)) is None:
                yield NO_ANSWER
        elif missing := null_fields([task.config.doc_to_target], document):
            yield NULL_TARGET.format(fields=", ".join(missing))
        elif target is None or (isinstance(target, str | list) and not target):
            yield NO_TARGET


def _of_examples(task: Any) -> list[dict[str, Any]]:
    """A note on examples whose right answer is none of their choices: lm-eval prints the last choice for -1."""
    if not (task.shots and isinstance(task, ConfigurableTask) and task.config.doc_to_choice is not None):
        return []
    examples, how = task.examples(), task.fewshot_cfg
    wrong = 0
    for i in examples.used:
        right = task.doc_to_target(examples.pool[i], how.doc_to_target)
        wrong += (
            isinstance(right, int) and _place(right, task.doc_to_choice(examples.pool[i], how.doc_to_choice)) is None
        )
    text = (
        f"{task.config.task}: of {len(examples.used)} examples that stand before documents, {wrong} have a right answer"
    )
    return [{"text": f"{text} that is none of their choices, so that they show a wrong one."}] if wrong else []


def _of_ends(task: Any, samples: Iterable[dict[str, Any]], answers: Answers) -> list[dict[str, Any]]:
    """A note on texts that were cut off, with equal words for all cells: only their number differs between policies."""
    if task.OUTPUT_TYPE != "generate_until":
        return []
    every = {**answers.known, **answers.computed}
    # documents may have the same prompt, and a document a sample for each filter
    prompts = Counter(request_hash(tuple(s["arguments"][0])) for s in {s["doc_id"]: s for s in samples}.values())
    finishes: Counter[str | None] = Counter()
    for key, a in every.items():
        finishes[a.finish or (LENGTH if a.ended is False else None)] += prompts[key.partition("#")[0]]
    name = task.config.task
    texts = {
        LENGTH: f"{name}: texts were ended by the limit of their tokens (max_gen_toks), before a stop sequence.",
        THINKING: f"{name}: texts ended before their thinking did, so that they have no answer.",
    }
    return [{"text": text, "times": n} for finish, text in texts.items() if (n := finishes[finish])]


def _place(right: Any, choices: Sequence[Any]) -> int | None:
    """Which of the choices is the right one; None where lm-eval finds none, or counts from the end."""
    if isinstance(right, str):
        return choices.index(right) if right in choices else None
    return next((i for i in range(len(choices)) if i == right), None)
