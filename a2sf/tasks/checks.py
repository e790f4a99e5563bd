"""Mistakes in a task's definition that lm-eval accepts without a word, and that would give no numbers or wrong ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from lm_eval.api.registry import aggregation_registry, filter_registry, metric_registry

from a2sf.compat.lm_eval import DEFAULT_METRICS, METRICS, OF_EACH_DOCUMENT
from a2sf.errors import ConfigError, UserError, counted, nearest
from a2sf.tasks.numbers import number_of
from a2sf.tasks.templates import KEYS, null_fields

WORD = re.compile(r"[^\W\d]\w*(?:[.-]\w+)*")
"""A template that is a single word is the name of a field; lm-eval prints it as it stands if there is no such field."""
CONSTANT = {"doc_to_text": "prompt", "doc_to_target": "right answer"}


def named_metrics(config: Mapping[str, Any]) -> list[Any]:
    """The metrics of a task's file: names, or functions; lm-eval's for that kind of task where the file has none."""
    given = config.get("metric_list")
    if given is None:
        return list(DEFAULT_METRICS.get(config.get("output_type"), ()))
    return [m.get("metric") if isinstance(m, Mapping) else m for m in given]


def check_metrics(name: str, config: Mapping[str, Any]) -> None:
    """Refuse metrics that lm-eval does not compute for this kind of task, as far as the file shows.

    Args:
        config: the task's definition.

    Raises:
        ConfigError: naming the first one.
    """
    if not _computed_by_lm_eval(config):
        return
    kind = config["output_type"]
    for metric in named_metrics(config):
        if metric not in METRICS[kind]:
            allowed = f"{name} is a task of {kind}, of which lm-eval computes {', '.join(METRICS[kind])}"
            raise ConfigError("metric_list", metric, allowed + nearest(str(metric), METRICS[kind]))


def _computed_by_lm_eval(config: Mapping[str, Any]) -> bool:
    """Whether lm-eval computes the metrics, and no function of the task, whose metrics may have any name."""
    return not (config.get("process_results") or config.get("class")) and config.get("output_type") in METRICS


def check_registered(name: str, config: Mapping[str, Any]) -> None:
    """Refuse names of metrics, aggregations and filters that lm-eval does not know once the task's code is imported.

    Args:
        config: the task's definition with its functions imported, which may register names.

    Raises:
        ConfigError: naming the first one.
    """
    if config.get("class"):
        return
    steps = [s for f in config.get("filter_list") or () for s in f.get("filter") or () if isinstance(s, Mapping)]
    _known("filter_list", name, (s.get("function") for s in steps), filter_registry)
    listed = [m for m in config.get("metric_list") or () if isinstance(m, Mapping)]
    _known("aggregation", name, (m.get("aggregation") for m in listed), aggregation_registry)
    # where the aggregation is named, lm-eval looks for the metric in the library evaluate, too
    sought = [m.get("metric") for m in listed if not m.get("hf_evaluate") and m.get("aggregation") is None]
    _known("metric_list", name, sought, metric_registry)


def _known(key: str, task: str, names: Iterable[Any], registry: Any) -> None:
    for name in names:
        if isinstance(name, str) and name not in registry:
            known = sorted(registry)
            raise ConfigError(
                key, name, f"{task} may give a function, or one of {', '.join(known)}{nearest(name, known)}"
            )


def check_made(task: Any) -> None:
    """Refuse what only shows when lm-eval has made a task: metrics that it did not find, and names of no field.

    Raises:
        ConfigError: naming key and value.
    """
    if not _configurable(task):
        return
    config = task.config
    if not callable(config.process_results):
        for metric, function in task._metric_fn_list.items():
            if function is None:
                found = f"{config.task} has a metric that neither lm-eval nor the library evaluate gives"
                raise ConfigError("metric_list", metric, found + nearest(metric, metric_registry))
    if task.prompt is None:
        _check_fields(task, config)
        if task.shots:
            _check_fields(task, task.fewshot_cfg)


def _check_fields(task: Any, templates: Any) -> None:
    """Refuse templates that are a word but no field.

    Args:
        templates: has `doc_to_text` and the like.
    """
    for key, what in CONSTANT.items():
        word = getattr(templates, key)
        if not _is_no_field(word, task.features):
            continue
        if key == "doc_to_target" and (callable(task.config.process_results) or word in _choices(task)):
            continue  # the target is not read, or is a right answer
        allowed = (
            f"the documents of {task.config.task} have no such field, so that it would be the {what} of each; they have "
            f"{', '.join(task.features)}{nearest(word, task.features)}; a text for all documents is \"{{{{'{word}'}}}}\""
        )
        raise ConfigError(key, word, allowed)


def _is_no_field(template: Any, fields: Collection[str]) -> TypeGuard[str]:
    """Whether a template is the name of a field, and the documents have no such field."""
    return isinstance(template, str) and WORD.fullmatch(template) is not None and template not in fields


def choices_without_field(config: Mapping[str, Any], fields: Iterable[str]) -> ConfigError | None:
    """The error if `doc_to_choice` is a word that is no field of the documents, at which lm-eval fails; else None."""
    word, fields = config.get("doc_to_choice"), list(fields)
    if not _is_no_field(word, fields):
        return None
    has = f"the documents of {config.get('task')} have no such field; they have {', '.join(fields)}"
    return ConfigError("doc_to_choice", word, has + nearest(word, fields))


def check_labels(task: Any, limit: int | None) -> None:
    """Refuse documents without a right answer where lm-eval's code would fail at them.

    Args:
        limit: how many documents are scored; None: all.

    Raises:
        UserError: naming the field, and the first of these documents.
    """
    target = task.config.doc_to_target if _configurable(task) else None
    if not isinstance(target, str) or target not in task.features or callable(task.config.process_results):
        return  # a template prints None, of which a note tells
    if task.OUTPUT_TYPE == "generate_until":
        return  # the same
    without = [i for i, d in enumerate(_first(task.eval_docs, limit)) if d[target] is None]
    if without:
        raise UserError(
            f"tasks={task.config.task}: the field {target} (doc_to_target) is missing or null in "
            f"{counted(len(without), 'document')}, the first is number {without[0]}; give it, or leave them out"
        )


def check_stopping_metric(task: Any, metric: str) -> None:
    """Refuse early stopping by a metric that the documents of a task do not have, by invented answers to the first.

    Raises:
        ConfigError: with the metrics that they have.
    """
    task.build_all_requests(samples=[0])
    answers = [(-1.0 - i, False) for i in range(len(task.instances))]
    try:
        made = task.process_results(task.instances[0].doc, answers)
    except UserError:
        return  # its code needs answers of a model
    check_stopping(task.config.task, metric, of_each(made))


def of_each(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of a document's metrics that are numbers from 0 to 1, which early stopping can compare."""
    found = {m: number_of(v) for m, v in metrics.items()}
    return {m: number for m, number in found.items() if number is not None and 0 <= number <= 1}


def stopping_metrics(config: Mapping[str, Any]) -> list[str] | None:
    """The metrics by which a task can stop early, as far as its file shows; None: its code decides."""
    if not _computed_by_lm_eval(config):
        return None
    return [m for m in named_metrics(config) if m in OF_EACH_DOCUMENT]


def check_stopping(task: str, metric: str, known: Iterable[str]) -> None:
    """Refuse early stopping by a metric that is not among those of a task's documents.

    Raises:
        ConfigError: with those.
    """
    if metric not in (known := list(known)):
        has = f"{task} has {', '.join(known) or 'no metric from 0 to 1'} of each document{nearest(metric, known)}"
        raise ConfigError("early_stopping.metric", metric, has)


def missing_label(task: Any, document: Any) -> str:
    """The fields of the right answer that a document lacks, as part of a sentence; "" if it lacks none."""
    if not _configurable(task):
        return ""
    missing = null_fields([getattr(task.config, key) for key in KEYS], document)
    return f"; it has no {', '.join(missing)}" if missing else ""


def _configurable(task: Any) -> bool:
    from lm_eval.api.task import ConfigurableTask

    return isinstance(task, ConfigurableTask)


def _choices(task: Any) -> Iterator[str]:
    for document in task.eval_docs if task.config.doc_to_choice is not None else ():
        yield from task.doc_to_choice(document)


def _first(documents: Any, limit: int | None) -> Iterator[Any]:
    for number, document in enumerate(documents):
        if number == limit:
            return
        yield document
