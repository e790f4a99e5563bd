"""The first step of a sweep: every value of its grid is checked, models and documents are identified."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from a2sf.app.folders import model_names
from a2sf.app.process import screen
from a2sf.app.runners import directory_of
from a2sf.errors import UserError, counted
from a2sf.store.aggregates import TaskGroup
from a2sf.sweep.cell import Cell
from a2sf.sweep.config.grid import check_schedules
from a2sf.sweep.config.settings import Settings, read, refuse_unused
from a2sf.sweep.prepare import documents, models, texts
from a2sf.tasks import spec as tasks

Points = Sequence[tuple[list[str], DictConfig]]
"""The overrides and the composed configuration of each point of a grid."""


@dataclass(frozen=True)
class Checked:
    """The points of a grid after every check that needs neither weights nor documents.

    Attributes:
        settings: of each point, with the cells whose model and documents are identified.
        refused: why cells cannot be computed -> their names.
        notes: what the user should know, one sentence each.
        fields: of the tasks whose documents were read for `data.cluster`.
    """

    points: Points
    settings: list[Settings]
    refused: dict[str, list[str]]
    notes: list[str]
    fields: texts.Known = dataclasses.field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        return [c for s in self.settings for c in s.cells]

    @property
    def directory(self) -> Path:
        """The directory of the sweep."""
        return directory_of(self.settings[0])

    @property
    def aggregates(self) -> list[TaskGroup]:
        """lm-eval's groups, whose scores are computed from those of the tasks."""
        return list(dict.fromkeys(g for s in self.settings for g in s.groups))


def check(points: Points, computes_here: bool) -> Checked:
    """Check a grid; nothing is downloaded but what identifies models and documents.

    Args:
        computes_here: whether jobs use this machine's GPUs.

    Raises:
        UserError: for the first value that is not allowed, or if no cell can be computed.
    """
    check_schedules([composed for _, composed in points])
    settings = [read(composed, model_names(), here=computes_here) for _, composed in points]
    refuse_unused(settings, {o.partition("=")[0].lstrip("+") for overrides, _ in points for o in overrides})
    _check_one_sweep(settings)
    for rule in dict.fromkeys(c.stopping_rule for s in settings for c in s.cells if c.stopping_rule):
        rule.check([c.policy.name for s in settings for c in s.cells if c.stopping_rule == rule])
    documents.check(c for s in settings for c in s.cells)
    settings, unreadable = models.readable(settings, screen)
    models.check_prompting((c for s in settings for c in s.cells), hub=False)
    settings = models.distinguish(models.pin_all(settings, model_names(), screen))
    resolved = documents.resolve_content([s.cells for s in settings], planned_only=settings[0].plan_only)
    settings = [dataclasses.replace(s, cells=cells) for s, cells in zip(settings, resolved.cells, strict=True)]
    _check_each_cell_once(settings)
    documents.check_stopping(c for s in settings for c in s.cells)
    fields = texts.check_field([c for s in settings for c in s.cells])
    includes = dict.fromkeys(s.include for s in settings if s.include)
    hidden = dict.fromkeys(note for include in includes for note in tasks.hidden(*include))
    examples = examples_left_out([s for s, (_, c) in zip(settings, points, strict=True) if c.shots is None])
    return Checked(points, settings, resolved.refused | unreadable, [*hidden, *examples, *resolved.notes], fields)


def examples_left_out(settings: Sequence[Settings]) -> list[str]:
    """A note for each task whose definition has few-shot examples, which lm-eval gives and these `settings` do not.

    Args:
        settings: those without a value of `shots`.
    """
    given = {c.spec.name: c.spec.definition.config.get("num_fewshot") for s in settings for c in s.cells if not c.shots}
    return [
        f"{task}: lm-eval gives {counted(shots, 'few-shot example')}, as the task's file says; this sweep gives none. "
        f"shots={shots} gives them, shots=0 is this without the note."
        for task, shots in given.items()
        if isinstance(shots, int) and shots > 0
    ]


def _check_one_sweep(settings: Sequence[Settings]) -> None:
    if len({s.power for s in settings}) > 1:
        raise UserError("plan.flips and plan.detect are about the whole sweep, so they cannot be swept")
    if len({(s.sweep_name, s.runs_dir) for s in settings}) > 1 or any(
        s.tracker != settings[0].tracker for s in settings
    ):
        raise UserError(
            "sweep_name, runs_dir and tracker name where a sweep's results go, so they cannot be swept; several trackers "
            "are a list, tracker=[wandb,tensorboard]"
        )


def _check_each_cell_once(settings: Sequence[Settings]) -> None:
    """Refuse several values of a key that does not identify a cell: one of them would be computed, and the others dropped.

    Raises:
        UserError: naming the key and its values.
    """
    found: dict[str, dict[str, object]] = {}
    for s in settings:
        of_point: dict[str, object] = {"trace": s.trace, "full_texts": s.full_texts, "checkpoint": s.checkpoint}
        of_point |= {"batch_size": "auto" if s.batch_size is None else s.batch_size}
        for c in s.cells:
            given: dict[str, object] = {
                "model.name": c.model_name,
                "backend": c.backend,
                "log_samples": c.log_samples,
                **of_point,
            }
            first = found.setdefault(c.tail, given)
            for key in (k for k in given if given[k] != first[k]):
                raise UserError(
                    f"{key} is not part of what identifies a cell, so {key}={first[key]} and {key}={given[key]} would be "
                    f"one cell ({c.name}); give one value, or run each with a runs_dir of its own"
                )
