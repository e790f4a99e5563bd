"""From the answers of a cell's system to its result: lm-eval's metrics, and a table with a row per document."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import pandas as pd

from a2sf.errors import Notice, UserError, first_line
from a2sf.policies.base import UNLIMITED
from a2sf.policies.slots import leaves_choice
from a2sf.scoring.counts import Counts
from a2sf.scoring.doubts import doubts, not_numbers
from a2sf.scoring.generation.memory import cache_bytes
from a2sf.scoring.recorded import RecordedLM
from a2sf.scoring.requests import Requests, keys_of_draws, request_hash
from a2sf.scoring.scorer import Scorer
from a2sf.scoring.systems import Answer, Answers
from a2sf.sweep.cell import Cell
from a2sf.sweep.samples import of_draws
from a2sf.tasks import shared_texts
from a2sf.tasks.numbers import index_of, number_of
from a2sf.tasks.spec import provenance
from a2sf.tasks.turns import TurnAnswers, joined
from a2sf.tasks.warned import collected

BOOTSTRAP = 1000


def evaluate(
    cell: Cell,
    task: Any,
    requests: Sequence[Requests],
    answers: Answers,
    scorer: Scorer,
    chosen: list[int] | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """A cell's result from recorded answers; nothing is computed by the model.

    Args:
        task: lm-eval's, which has made its requests.
        requests: those of the documents that are evaluated; each has an answer.
        chosen: numbers of these documents, ascending; None: the first `limit`.

    Returns:
        The body of `result.json` (without provenance), and the per-document table. `notes` is there even if it is empty.
    """
    where = provenance(task)
    started, clock = datetime.now(UTC), time.perf_counter()
    with collected() as warned:
        evaluations = [
            _lm_eval_results(cell, task, RecordedLM(answers, n), chosen) for n in range(cell.prompting.samples or 1)
        ]
    evaluated = evaluations[0]
    for of_kind in requests:
        scorer.count(of_kind, answers)
    samples = evaluated["samples"][cell.task_name]
    documents, metrics = _documents(samples, task, answers, len(evaluations)), _metrics(evaluated, cell.task_name)
    if len(evaluations) > 1:
        of_each = [e["samples"][cell.task_name] for e in evaluations]
        documents, metrics = of_draws(
            documents,
            [_documents(one, task, answers) for one in of_each],
            [_extracted_by_document(one) for one in of_each],
            [_metrics(e, cell.task_name) for e in evaluations],
        )
    if task.OUTPUT_TYPE == "generate_until":
        size = cache_bytes(scorer, requests, answers)
        documents["cache_bytes"] = [fmean(size[key] for key in keys) for keys in documents["request_hashes"]]
    seconds = time.perf_counter() - clock + answers.progress.seconds
    counts = answers.counts
    if field := shared_texts.field_of(task, cell.data.cluster):
        keys = {s["doc_id"]: shared_texts.key_of(s["doc"], field) for s in samples}
        documents[shared_texts.COLUMN] = documents["doc_id"].map(keys)
        where |= {"cluster": field, "clusters": len(set(keys.values()))}
    result = {
        "cell": cell.describe(),
        "metrics": metrics,
        "documents": {"n": len({s["doc_id"] for s in samples}), **where},
        "notes": [
            *doubts(task, samples, requests, answers),
            *_policy_notes(cell, counts),
            *not_numbers(cell.task_name, evaluated["results"][cell.task_name]),
            *warned.notes,
        ],
        "scored": {"tokens": counts.targets, "pruned": counts.pruned},
        "lengths": counts.lengths,
        "timing": {
            "seconds": seconds,
            "tokens": counts.tokens,
            "computed_tokens": counts.computed,
            "shared": counts.together / max(1, counts.needed),
            "tokens_per_second": counts.tokens / seconds,
            "kept_tokens_mean": counts.kept_tokens,
            "cache_share": counts.cache_share,
            **({"cache_share_max": max(counts.shares)} if counts.shares else {}),
            "reused_requests": counts.reused,
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    return result, documents if cell.log_samples else _without_texts(documents)


def _lm_eval_results(cell: Cell, task: Any, lm: RecordedLM, chosen: list[int] | None) -> dict[str, Any]:
    """What `lm_eval.evaluate` gives for recorded answers; `chosen` as in `evaluate`.

    Raises:
        UserError: if the metrics of the task cannot be computed from them.
    """
    import lm_eval

    try:
        evaluated: dict[str, Any] = lm_eval.evaluate(
            lm,
            task_dict={"tasks": {cell.task_name: task}},
            limit=cell.limit if chosen is None else None,
            samples=None if chosen is None else {cell.task_name: chosen},
            bootstrap_iters=BOOTSTRAP,
        )
    except UserError:
        raise
    except Exception as error:  # any code of lm-eval's, or the task's, metrics
        names = ", ".join(dict.fromkeys(str(m) for m in task.aggregation()))
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"tasks={cell.task_name}: its metrics ({names}) fail at the answers of all documents ({why})"
        ) from error
    return evaluated


def _policy_notes(cell: Cell, counts: Counts) -> list[dict[str, Any]]:
    """Notes on a threshold that makes no difference between the tokens of a task, and on a budget that leaves no choice."""
    unranked = counts.unranked_note
    if unranked and not leaves_choice(cell.policy.retention(UNLIMITED, 0)):
        unranked = None  # a window has no choice at any budget, which is no news
    found = [counts.doubt, unranked]
    return [
        {"text": f"{cell.task_name}: {cell.policy.label} ({_threshold_settings(cell)}): {text}."}
        for text in found
        if text
    ]


def _threshold_settings(cell: Cell) -> str:
    """The policy's threshold and window, for a note; its name if it has neither."""
    found = cell.policy.stored_settings()
    return ", ".join(f"{name} {found[name]}" for name in ("threshold", "window") if name in found) or cell.policy.name


def _metrics(evaluated: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    scores = evaluated["results"][task]
    better = evaluated.get("higher_is_better", {}).get(task, {})
    n = Counter((metric, s["filter"]) for s in evaluated["samples"][task] for metric in s["metrics"])
    found = {}
    for key, value in scores.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        if number_of(value) is None:
            message = f"{task}: its metric {metric} is no number but {type(value).__name__}, and is not stored."
            warnings.warn(message, Notice, stacklevel=1)
            continue
        name = metric if filtered == "none" else f"{metric},{filtered}"
        found[name] = {
            "value": _number(value),
            "stderr": _number(scores.get(f"{metric}_stderr,{filtered}")),
            "n": n[metric, filtered],  # a document may have no value of a metric
            "higher_is_better": better.get(metric),
        }
    return found


def _number(value: Any) -> float | None:
    number = number_of(value)
    return number if number is not None and math.isfinite(number) else None


def _extracted_by_document(samples: Iterable[dict[str, Any]]) -> dict[str, dict[int, str]]:
    """By filter and document: what the filter took from the text as its answer."""
    found: dict[str, dict[int, str]] = {}
    for sample in samples:
        found.setdefault(sample["filter"], {})[sample["doc_id"]] = _extracted(sample)
    return found


def _documents(samples: list[dict[str, Any]], task: Any, answers: Answers, draws: int = 1) -> pd.DataFrame:
    """A row per document, from lm-eval's samples.

    Args:
        draws: of a task that generates text, how many answers there are of each document.
    """
    if task.OUTPUT_TYPE == "generate_until":
        rows = [_text_row(sample, answers, draws) for sample in samples]
        # each filter gives a sample, with its metrics: one row per document holds them all
        return pd.DataFrame(rows).groupby("doc_id", as_index=False).first()
    # each filter gives a sample, which differs in its metrics alone
    scored: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = scored.setdefault(sample["doc_id"], {})
        row |= _metric_columns(sample) if row else _scored_row(sample, task, answers)
    return pd.DataFrame(scored.values()).sort_values("doc_id", ignore_index=True)


def _scored_row(sample: dict[str, Any], task: Any, answers: Answers) -> dict[str, Any]:
    """A row of a task that is scored by log-likelihoods: those of each choice, and which is right."""
    scored = [a if isinstance(a, tuple | list) else (a, False) for (a,) in sample["resps"]]
    arguments = [tuple(a) for a in sample["arguments"]]
    given = [_answer(answers, a) for a in arguments]
    columns: dict[str, list[Any]] = {
        "request_hashes": [request_hash(a) for a in arguments],
        "loglikelihoods": [float(a[0]) for a in scored],
        "is_greedy": [bool(a[1]) for a in scored],
        "context_tokens": [a.context for a in given],
        "continuation_tokens": [a.continuation for a in given],
        **({"cached_tokens": [a.cached for a in given]} if any(a.cached for a in given) else {}),
    }
    # a metric may request more than the choices (acc_mutual_info: each without its context)
    n = min(len(arguments), _number_of_choices(sample, task))
    likelihoods = columns["loglikelihoods"][:n]
    return {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "context": arguments[0][0] if len(arguments[0]) > 1 else "",
        "choices": [a[-1] for a in arguments[:n]],
        **(_gold(sample, task) if n > 1 else {"gold": -1}),
        "prediction": max(range(n), key=likelihoods.__getitem__) if n > 1 else -1,
        **{column: values[:n] for column, values in columns.items()},
        **({f"more/{c}": values[n:] for c, values in columns.items()} if n < len(arguments) else {}),
        **_metric_columns(sample),
    }


def _metric_columns(sample: dict[str, Any]) -> dict[str, float]:
    """A sample's metrics that are numbers, under the names of the columns of its filter."""
    end = "" if sample["filter"] == "none" else f",{sample['filter']}"
    return {f"metric/{m}{end}": v for m, v in _numbers(sample, sample["metrics"]).items()}


def _answer(answers: Answers, arguments: tuple[Any, ...]) -> Answer:
    found = answers.answer(request_hash(arguments))
    assert found is not None
    return found


def _without_texts(documents: pd.DataFrame) -> pd.DataFrame:
    """The documents without texts: columns of generated texts are dropped, prompts, choices and targets are empty."""
    empty = {"context": "", "target": ""}
    written = [f"{of}{name}" for of in ("", "draws/") for name in TEXTS]
    written += [str(c) for c in documents if str(c).startswith("extracted")]
    stored = documents.drop(columns=written, errors="ignore")
    stored["choices"] = [[""] * len(c) for c in documents["choices"]]
    return stored.assign(**{k: v for k, v in empty.items() if k in stored})


def _text_row(sample: dict[str, Any], answers: Answers, draws: int) -> dict[str, Any]:
    """A row of a generation task: no choices, but the text, its target, and the numbers that describe the document."""
    arguments = tuple(sample["arguments"][0])
    keys = keys_of_draws(arguments, max(draws, len(sample["resps"][0])))
    drawn = [a for key in keys if (a := answers.answer(key)) is not None]
    answer = drawn[0]
    end = "" if sample["filter"] == "none" else f",{sample['filter']}"
    return {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "request_hashes": keys,
        "context": arguments[0],
        "choices": [],
        "gold": -1,
        "prediction": -1,
        "loglikelihoods": [],
        "is_greedy": [],
        "context_tokens": [a.context for a in drawn],
        "continuation_tokens": [a.continuation for a in drawn],
        **({"cached_tokens": [a.cached for a in drawn]} if any(a.cached for a in drawn) else {}),
        "target": str(sample["target"]),
        **{name: value(answer) for name, value in TEXT_COLUMNS.items()},
        **(
            {f"draws/{name}": [value(a) for a in drawn] for name, value in TEXT_COLUMNS.items()}
            if len(drawn) > 1
            else {}
        ),
        **_turns(drawn),
        **({f"extracted{end}": _extracted(sample)} if end else {}),
        **{f"doc/{k}": v for k, v in _numbers(sample["doc"], sample["doc"]).items()},
        **_metric_columns(sample),
    }


def _turns(drawn: Sequence[Answer]) -> dict[str, Any]:
    """The column of conversations: how many tokens each answer has."""
    if drawn[0].turns is None:
        return {}
    return {"turns": drawn[0].turns} | ({"draws/turns": [a.turns for a in drawn]} if len(drawn) > 1 else {})


def _extracted(sample: dict[str, Any]) -> str:
    """What a filter of the task took from the text as its answer; of several texts from the first."""
    found = sample["filtered_resps"][0]
    while isinstance(found, list | tuple) and found and not isinstance(found, TurnAnswers):
        found = found[0]
    return joined(found) if isinstance(found, TurnAnswers) else str(found)


TEXT_COLUMNS: dict[str, Callable[[Answer], Any]] = {
    "generated": lambda a: a.value,
    "ended": lambda a: a.ended,
    "finish": lambda a: a.finish,
    "tokens": lambda a: a.tokens,
    "thinking": lambda a: a.thinking,
    "thinking_tokens": lambda a: a.thinking_tokens,
}
"""What is stored of a generated text; of several texts of one prompt those of the first, and all under `draws/`."""
TEXTS = ("generated", "tokens", "thinking")
"""Those that hold what was written."""


def _numbers(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """The values under `names` that are numbers."""
    found = {name: number_of(values.get(name)) for name in names}
    return {name: number for name, number in found.items() if number is not None}


def _number_of_choices(sample: dict[str, Any], task: Any) -> int:
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.doc_to_choice is None:
        return len(sample["arguments"])
    return len(task.doc_to_choice(sample["doc"]))


def _gold(sample: dict[str, Any], task: Any) -> dict[str, Any]:
    """Index of the right choice, -1 if there is none; where a task has lists of right choices, -1 and their indices.

    Where the choices are contexts (winogrande), lm-eval numbers them the same way.
    """
    target = sample["target"]
    if task.multiple_input:
        target = task.doc_to_text(sample["doc"])
    choices = task.doc_to_choice(sample["doc"])
    if task.multiple_target:
        several = target if isinstance(target, list) else [target]
        found = sorted({i for t in several if (i := index_of(t)) is not None and 0 <= i < len(choices)})
        return {"gold": -1, "golds": found}
    if (index := index_of(target)) is None:
        index = choices.index(target) if target in choices else -1
    return {"gold": index if 0 <= index < len(choices) else -1}
