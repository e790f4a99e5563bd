"""TensorBoard: a folder of event files per cell, and one for the summary; no account, server or network is needed.

Columns are hyperparameters in TensorBoard, so that its HPARAMS page is a table of cells with filters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from a2sf.tracking.content import CellRun, Summary

EVENTS = "events.out.tfevents.*"
"""Pattern of the names of TensorBoard's files."""


class TensorBoardFiles:
    """Logs to TensorBoard's files (see `a2sf.tracking.content.Destination`).

    Args:
        directory: for this sweep's folders.
    """

    label = "TensorBoard"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def marks(self) -> Path:
        return self.directory / ".logged"

    @property
    def note(self) -> str | None:
        return f"TensorBoard has the sweep: tensorboard --logdir {self.directory}"

    def log_cell(self, run: CellRun) -> None:
        from torch.utils.tensorboard.summary import hparams

        columns = {name: _shown(value) for name, value in run.columns.items() if value is not None}
        # without the first of the three, TensorBoard collects the columns of all cells, not only those of the first
        _, start, end = hparams(columns, run.metrics)
        with self._writer(run.name) as writer:
            for name, value in run.metrics.items():
                writer.add_scalar(name, value, 0)
            writer.file_writer.add_summary(start)
            writer.file_writer.add_summary(end)
            writer.add_text("cell", f"```json\n{json.dumps(run.cell, indent=2)}\n```")

    def log_summary(self, summary: Summary) -> None:
        import matplotlib.image

        with self._writer("summary") as writer:
            writer.add_text("results", markdown(summary.table))
            for name, file in summary.pictures.items():
                writer.add_image(name, matplotlib.image.imread(file)[..., :3], dataformats="HWC")

    @contextmanager
    def _writer(self, name: str) -> Iterator[Any]:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.directory / name
        for before in folder.glob(EVENTS):
            before.unlink()  # of an earlier result of the same cell
        with SummaryWriter(str(folder)) as writer:
            yield writer


def _shown(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value  # TensorBoard would show 1 and 0


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, with missing values as empty text."""
    rows = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    rows += [["" if pd.isna(v) else str(v).replace("|", "\\|") for v in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
