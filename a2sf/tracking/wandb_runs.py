"""Weights & Biases: one run per cell, grouped by sweep, and one for the summary; offline if the user is not logged in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from a2sf.store.names import safe
from a2sf.tracking.content import CellRun, Summary

ATTEMPTS = 3
"""Number of ids to try for a run, because W&B refuses the id of a deleted run."""
LONGEST_NAME = 128
"""Largest number of characters of a name in W&B."""
BASELINE = "baseline"
"""The tag of full-cache runs."""


class WandbRuns:
    """Logs to W&B (see `a2sf.tracking.content.Destination`).

    Args:
        directory: of the sweep; runs that are not sent yet are in its `wandb/`.
        project, entity: of W&B.
    """

    label = "W&B"

    def __init__(self, sweep: str, directory: Path, project: str, entity: str | None) -> None:
        self.sweep, self.directory, self.project, self.entity = sweep, directory, project, entity

    @property
    def marks(self) -> Path | None:
        if os.environ.get("WANDB_MODE") == "disabled":
            return None
        return self.directory / "wandb" / f".logged-{safe(self.project)}-{safe(self.entity or 'default')}"

    @property
    def note(self) -> str | None:
        if self.mode != "offline":
            return None
        return f"W&B is offline (not logged in); send the runs with: wandb sync {self.directory}/wandb/offline-run-*"

    @cached_property
    def mode(self) -> str:
        """W&B's mode: that of `WANDB_MODE`, else online if the user is logged in."""
        if os.environ.get("WANDB_MODE"):
            return os.environ["WANDB_MODE"]
        import wandb

        try:
            return "online" if wandb.login(prompt=False, timeout=10) else "offline"
        except Exception:  # any error of the login: offline always works
            return "offline"

    def log_cell(self, run: CellRun) -> None:
        # columns at the top level, where W&B's table of runs can filter by them
        config = {**run.columns, "cell": run.cell}
        self._log(run.name, "cell", config, lambda: dict(run.metrics), [BASELINE] if run.baseline else [])

    def log_summary(self, summary: Summary) -> None:
        def values() -> dict[str, Any]:
            import wandb

            pictures = {name: wandb.Image(str(file)) for name, file in summary.pictures.items()}
            return {"results": wandb.Table(dataframe=summary.table), **pictures}

        self._log("summary", "summary", {"sweep": self.sweep}, values, [])

    def _log(
        self, name: str, job_type: str, config: dict[str, Any], values: Callable[[], dict[str, Any]], tags: list[str]
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        run = self._start(
            run_id(self.sweep, name),
            project=self.project,
            entity=self.entity,
            name=safe(name, LONGEST_NAME),
            group=safe(self.sweep, LONGEST_NAME),
            job_type=job_type,
            config=config,
            tags=tags,
            dir=str(self.directory),
            mode=self.mode,
            resume="allow",
            reinit="finish_previous",
        )
        try:
            run.log(values())  # the last values logged are the run's summary
        finally:
            run.finish()

    def _start(self, identity: str, **given: Any) -> Any:
        """Start a run with its id; if the server refuses the id, with another one, which is the same each time.

        Raises:
            wandb.errors.Error: if the server refuses all ids, or does not answer.
        """
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return wandb.init(id=identity if attempt == 1 else f"{identity}-{attempt}", settings=settings, **given)
            except wandb.errors.Error as error:
                of_no_id = isinstance(error, wandb.errors.AuthenticationError) or "timed out" in str(error)
                if of_no_id or attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")


def run_id(sweep: str, name: str) -> str:
    """The W&B id of a sweep's run: equal for equal names, different for different ones, for names with any characters."""
    digest = hashlib.sha256(f"{sweep}\0{name}".encode()).hexdigest()[:12]
    return f"{safe(sweep, 40)}-{safe(name, 60)}-{digest}"
