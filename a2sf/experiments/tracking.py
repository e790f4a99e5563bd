"""Logging cells to Weights & Biases; a tracker that fails never costs a result."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from a2sf.errors import ConfigError, nearest
from a2sf.experiments.runs import StoredCell

log = logging.getLogger(__name__)
KINDS = ("none", "wandb")


@dataclass(frozen=True)
class TrackerSpec:
    """Where results are logged besides the disk.

    Attributes:
        kind: `none` or `wandb`.
        project, entity: as W&B names them.

    Raises:
        ConfigError: if `kind` is unknown.
    """

    kind: str = "none"
    project: str = "a2sf"
    entity: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("tracker", self.kind, f"give one of {', '.join(KINDS)}{nearest(self.kind, KINDS)}")


class Tracker:
    """Logs finished cells of one sweep: one run per cell, grouped by sweep, and a summary run at the end."""

    def __init__(self, spec: TrackerSpec, sweep: str, directory: Path) -> None:
        self.spec, self.sweep, self.directory = spec, sweep, directory
        self.failed: str | None = None
        self.mode = _mode() if spec.kind == "wandb" else "disabled"

    @property
    def note(self) -> str | None:
        """One line for the screen: where the runs went, and how to sync them."""
        if self.failed:
            return f"W&B failed ({self.failed}); results on disk are complete."
        if self.mode == "offline":
            return (
                f"W&B is offline (not logged in); send the runs with: wandb sync {self.directory}/wandb/offline-run-*"
            )
        return None

    def log_cell(self, stored: StoredCell, config: dict[str, Any]) -> None:
        """One run: config, and metrics such as `acc/piqa/0shot`; the same cell continues the same run."""
        cell, timing = stored.cell, stored.result["timing"]
        where = f"{cell['task']}/{cell['shots']}shot"
        values: dict[str, Any] = {f"{name}/{where}": m["value"] for name, m in stored.metrics.items()}
        values |= {f"{name}_stderr/{where}": m["stderr"] for name, m in stored.metrics.items()}
        values |= {"tokens_per_second": timing["tokens_per_second"], "seconds": timing["seconds"]}
        values |= {"cache_share": timing["cache_share"]}
        self._log(cell["name"], "cell", {**config, "cell": cell}, {k: v for k, v in values.items() if v is not None})

    def log_summary(self, table: pd.DataFrame, pictures: dict[str, Path]) -> None:
        """One run for the sweep: the results table, and the plots that exist."""
        if self.spec.kind != "wandb" or self.failed:
            return
        import wandb

        text = table.astype(object).where(table.notna(), None)
        values: dict[str, Any] = {"results": wandb.Table(dataframe=text)}
        values |= {name: wandb.Image(str(file)) for name, file in pictures.items()}
        self._log(f"{self.sweep}-summary", "summary", {"sweep": self.sweep}, values)

    def _log(self, name: str, job_type: str, config: dict[str, Any], values: dict[str, Any]) -> None:
        if self.spec.kind != "wandb" or self.failed:
            return
        try:
            import wandb

            self.directory.mkdir(parents=True, exist_ok=True)
            run = wandb.init(
                project=self.spec.project,
                entity=self.spec.entity,
                name=name,
                id=f"{self.sweep}-{name}"[-120:],
                group=self.sweep,
                job_type=job_type,
                config=config,
                dir=str(self.directory),
                mode=self.mode,  # type: ignore[arg-type]
                resume="allow",
                reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30),
            )
            run.log(values)
            run.finish()
        except Exception as error:
            self.failed = str(error).strip().partition("\n")[0] or type(error).__name__
            log.debug("W&B failed", exc_info=True)


def _mode() -> str:
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    try:
        return "online" if wandb.login(prompt=False, timeout=10) else "offline"
    except Exception:  # whatever keeps us from logging in, offline always works
        return "offline"
