"""Logging cells to Weights & Biases; a tracker that fails never costs a result."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from a2sf.errors import ConfigError, nearest
from a2sf.experiments.names import safe
from a2sf.experiments.runs import StoredCell

log = logging.getLogger(__name__)
KINDS = ("none", "wandb")
LONGEST_NAME = 128
"""Characters that W&B takes for a name."""


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

        def values() -> dict[str, Any]:
            cell, timing = stored.cell, stored.result["timing"]
            where = f"{cell['task']}/{cell['shots']}shot"
            found: dict[str, Any] = {f"{name}/{where}": m["value"] for name, m in stored.metrics.items()}
            found |= {f"{name}_stderr/{where}": m["stderr"] for name, m in stored.metrics.items()}
            found |= {key: timing[key] for key in ("tokens_per_second", "seconds", "cache_share")}
            return {k: v for k, v in found.items() if v is not None}

        self._log(stored.path.name, "cell", {**config, "cell": stored.cell}, values)

    def log_summary(self, table: pd.DataFrame, pictures: dict[str, Path]) -> None:
        """One run for the sweep: the results table, and the plots that exist."""

        def values() -> dict[str, Any]:
            import wandb

            shown: dict[str, Any] = {"results": wandb.Table(dataframe=one_type_per_column(table))}
            return shown | {name: wandb.Image(str(file)) for name, file in pictures.items()}

        self._log("summary", "summary", {"sweep": self.sweep}, values)

    def _log(self, name: str, job_type: str, config: dict[str, Any], values: Callable[[], dict[str, Any]]) -> None:
        if self.spec.kind != "wandb" or self.failed:
            return
        try:
            import wandb

            self.directory.mkdir(parents=True, exist_ok=True)
            run = wandb.init(
                project=self.spec.project,
                entity=self.spec.entity,
                name=safe(name, LONGEST_NAME),
                id=run_id(self.sweep, name),
                group=safe(self.sweep, LONGEST_NAME),
                job_type=job_type,
                config=config,
                dir=str(self.directory),
                mode=self.mode,  # type: ignore[arg-type]
                resume="allow",
                reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30),
            )
            run.log(values())
            run.finish()
        except Exception as error:
            self.failed = str(error).strip().partition("\n")[0] or type(error).__name__
            log.debug("W&B failed", exc_info=True)


def run_id(sweep: str, name: str) -> str:
    """The W&B id of a sweep's run: the same for the same names, another for others, whatever characters they hold."""
    digest = hashlib.sha256(f"{sweep}\0{name}".encode()).hexdigest()[:12]
    return f"{safe(sweep, 40)}-{safe(name, 60)}-{digest}"


def one_type_per_column(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every column either all numbers or all text, missing values aside, as W&B's tables want them."""
    columns = {}
    for name in table:
        column = table[name]
        present = column[column.notna()]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)
        written = present.astype(float) if numbers else present.map(str)
        columns[name] = written.astype(object).reindex(column.index).where(column.notna(), None)
    return pd.DataFrame(columns, index=table.index)


def _mode() -> str:
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    try:
        return "online" if wandb.login(prompt=False, timeout=10) else "offline"
    except Exception:  # whatever keeps us from logging in, offline always works
        return "offline"
