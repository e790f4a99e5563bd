"""Runs the cells of a sweep, a group at a time, and stores each result.

`Runner.run` computes a group of cells; `finish` writes the table and lists failures. Many processes may work on one
`runs/` directory: a cell is computed by whoever holds its lease.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml

from a2sf import __version__, atomic
from a2sf.engine import trace as traces
from a2sf.errors import ConfigError, UserError
from a2sf.hf import loading
from a2sf.hf.devices import devices_of
from a2sf.hf.warned import Warned
from a2sf.scoring.scorer import Scorer
from a2sf.store.runs import TRACES, DiskError, StoredCell, finished_cells, settings_of, write_cell, write_table, writing
from a2sf.sweep import answer_store
from a2sf.sweep.cell import ENGINE_VERSION, Cell
from a2sf.sweep.config import folder as config_dir
from a2sf.sweep.group import CellGroup, Computed, with_notes
from a2sf.sweep.reuse import Finished, results_of
from a2sf.tasks.prompting import SAMPLING_SEED
from a2sf.tasks.warned import collected
from a2sf.tracking.tracker import Tracker

LEASE_SECONDS = 60.0
FEW_PRUNED = 0.2
"""Share of the scored tokens that saw a pruned cache; below it a sweep prints a notice."""
FREE_BYTES_NEEDED = 20 * 2**20
VERSIONS = ("torch", "transformers", "lm-eval", "datasets", "numba", "hydra-core", "pandas")


@dataclass
class Outcome:
    """What became of a cell: `status` is done, stored (finished before), busy (another process computes it) or failed."""

    name: str
    status: str
    error: str | None = None


@dataclass
class Loaded:
    """A model as the cells of a sweep use it.

    Attributes:
        warned: what libraries warned of while it was loaded.
        weights_format: which kind of file the weights were read from.
    """

    model: Any
    tokenizer: Any
    warned: Warned
    weights_format: str | None
    scorers: dict[str, Scorer] = field(default_factory=dict)


@dataclass
class Runner:
    """Computes cells of one sweep; keeps the model loaded from one cell to the next.

    Attributes:
        directory: `runs/<sweep>`.
        tracker: where finished cells are logged besides.
        batch_size: sequences per forward pass, None for auto.
        trace: the number of first documents of each cell whose evictions are recorded in its `traces.npz`
            (`a2sf.engine.trace`).
        checkpoint: seconds of work after which the answers of unfinished cells are written.
        full_texts: whether the full cache's texts are read under each system (`a2sf.sweep.full_texts`).
    """

    directory: Path
    tracker: Tracker
    batch_size: int | None = None
    trace: int = 0
    checkpoint: float = 60.0
    full_texts: bool = False
    _group: CellGroup | None = None
    _loaded: dict[loading.ModelSpec, Loaded] = field(default_factory=dict)
    _broken: dict[loading.ModelSpec, UserError] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell], planned: Collection[str] | None = None) -> list[Outcome]:
        """Compute the cells of a group, except those that are finished and those that another process computes.

        A cell that raises is recorded under `failures/` and does not stop the others.

        Args:
            cells: equal in `group.group_key`.
            planned: names of the planned cells; a cell that has another name, because a file was changed since, is left
                out. None: all are computed.

        Raises:
            DiskError: if results cannot be written.
        """
        check_disk(self.directory)
        outcomes, todo = [], []
        for cell in cells:
            try:
                todo.append(_resolved(cell))
            except UserError as error:
                outcomes.append(self.fail(cell, error))
        if planned is not None:
            todo = [c for c in todo if c.name in planned]
        with ExitStack() as leases:
            held: dict[str, Any] = {}
            for cell in todo:
                if (lease := self._lease(cell, leases)) is not None:
                    held[cell.name] = lease
                elif cell.stopping_rule is not None:  # all cells of a group decide together when it stops
                    return [*outcomes, *(Outcome(c.name, "busy") for c in todo)]
                else:
                    outcomes.append(Outcome(cell.name, "busy"))
            leased = [c for c in todo if c.name in held]
            finished = Finished(self.directory.iterdir() if leased else (), leased)
            stored = {c.name for c in leased if finished.has(c)}
            outcomes += [Outcome(name, "stored") for name in stored]
            mine = [c for c in leased if c.name not in stored]
            for computed in self._compute(mine):
                outcomes.append(self._store(computed))
                held[computed.cell.name].release()  # others need not wait for the rest of the group
        return outcomes

    def _lease(self, cell: Cell, leases: ExitStack) -> filelock.SoftFileLease | None:
        """The lease of a cell until `leases` closes; None: another process computes the cell.

        Raises:
            DiskError: if its file cannot be written.
        """
        file = _lock_file(self.directory, cell)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return leases.enter_context(filelock.SoftFileLease(file, lease_duration=LEASE_SECONDS, timeout=0))
        except filelock.Timeout:
            return None
        except OSError as error:  # another user's folder
            raise DiskError(f"{file} cannot be written ({error.strerror or error})") from error

    @property
    def underway(self) -> dict[str, float]:
        """For each cell that is being computed, by its name: the share of its work that is done."""
        group = self._group  # which the thread that computes may take away
        return group.shares() if group else {}

    def _compute(self, cells: Sequence[Cell]) -> Iterator[Computed]:
        if not cells:
            return
        try:
            scorer = self._scorer(cells[0])
        except Exception as error:
            yield from (Computed(c, error=error) for c in cells)
            return
        self._group = CellGroup(cells, scorer, self.directory, self.checkpoint, self.trace, self.full_texts)
        try:
            yield from self._group.compute()
        finally:
            self._group = None

    def _store(self, computed: Computed) -> Outcome:
        """Write what was computed of a cell, and log it; or record its failure."""
        cell, path = computed.cell, self.directory / computed.cell.name
        if computed.error is not None:
            return self.fail(cell, computed.error)
        assert computed.result is not None
        assert computed.documents is not None
        loaded = self._loaded[cell.model]
        result = with_notes(computed.result, loaded.warned) | {"provenance": provenance(loaded, computed.ran)}
        noted = {TRACES: traces.dumps(computed.traces)} if computed.traces else {}
        config = yaml.safe_dump(cell.describe(), sort_keys=False)
        with writing(path):
            stored = write_cell(path, result, computed.documents, config, noted)
        _clear_failures(self.directory, stored.cell)
        self.tracker.log_cell(stored)
        return Outcome(cell.name, "done")

    def fail(self, cell: Cell, error: Exception) -> Outcome:
        """Record that a cell failed.

        Raises:
            DiskError: if that cannot be written.
        """
        text = str(error).strip() or type(error).__name__
        record = {
            "cell": cell.describe(),
            "error": text if isinstance(error, UserError) else f"{type(error).__name__}: {text}",
            "traceback": "".join(traceback.format_exception(error)),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        file = failure_file(self.directory, cell.name)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            _clear_failures(self.directory, cell.describe())
            atomic.write(file, json.dumps(record, indent=2))
        return Outcome(cell.name, "failed", str(record["error"]))

    def _scorer(self, cell: Cell) -> Scorer:
        """The scorer of a cell's model, which is loaded if necessary."""
        from a2sf.scoring.lm import PrunedLM

        loaded = self._load(cell)
        if cell.backend not in loaded.scorers:
            lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer, add_bos_token=cell.model.add_bos_token)
            loaded.scorers[cell.backend] = Scorer(lm, cell.backend, self.batch_size, SAMPLING_SEED)
        return loaded.scorers[cell.backend]

    def _load(self, cell: Cell) -> Loaded:
        if cell.model in self._loaded:
            return self._loaded[cell.model]
        self._loaded.clear()  # one model at a time
        if cell.model in self._broken:
            raise self._broken[cell.model]
        try:
            with collected() as warned:
                loaded = loading.load(cell.model)
        except UserError as error:  # it will be so for its other cells
            self._broken[cell.model] = error
            raise
        adapter = (cell.identity.get("adapter") or {}).get("weights")
        for key, value, found, planned in (
            ("model.path", cell.model.path, loaded.fingerprint, cell.identity["weights"]),
            ("model.adapter", cell.model.adapter, loaded.adapter, adapter),
        ):
            if found != planned:
                raise ConfigError(key, value, "its files changed after the sweep began; start it again")
        self._loaded[cell.model] = Loaded(loaded.model, loaded.tokenizer, warned, loaded.format)
        return self._loaded[cell.model]


def _resolved(cell: Cell) -> Cell:
    """The same cell with the commit of its model and the fingerprint of its documents."""
    if not cell.model.pinned:
        cell = dataclasses.replace(cell, model=loading.pin(cell.model)[0])
    return cell.with_content()


def check_disk(directory: Path) -> None:
    """Refuse to compute what could not be stored.

    Raises:
        DiskError: if the directory cannot be written or the disk is full.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(directory).free
    if free < FREE_BYTES_NEEDED:
        raise DiskError(
            f"the disk of {directory} is full ({free >> 20} MiB free, {FREE_BYTES_NEEDED >> 20} MiB needed)"
        )


def finish(directory: Path, cells: Sequence[Cell]) -> tuple[list[StoredCell], list[dict[str, Any]]]:
    """Write `results.csv` from all results of a sweep; returns those of `cells`, and the records of `cells` that failed."""
    everything = finished_cells(directory)
    if everything:
        write_table(directory, everything)
    results = results_of(cells, everything)
    finished = sorted({s.path: s for s in results.values()}.values(), key=lambda s: s.path)
    failures = []
    for cell in cells:
        if cell.name in results:  # of a process that ended between the two
            answer_store.remove(directory, cell)
    for cell in sorted(cells, key=lambda c: c.name):
        file = failure_file(directory, cell.name)
        if file.exists() and cell.name not in results:
            failures.append(json.loads(file.read_text(encoding="utf-8")))
    return finished, failures


def hardly_pruned(stored: Iterable[StoredCell]) -> str | None:
    """One sentence about cells with a budget in which few scored tokens saw a pruned cache; None if there are none."""
    shares = {s.path.name: s.pruned_share for s in stored if s.cell["budget"] is not None}
    few = {name: share for name, share in shares.items() if share is not None and share < FEW_PRUNED}
    if not few:
        return None
    least = min(few, key=few.__getitem__)
    share, saw = f"{100 * few[least]:.0f} %", "of the scored tokens saw a pruned cache"
    which = f"In {len(few)} cells, less than {100 * FEW_PRUNED:.0f} % {saw} (the least in {least}: {share})"
    return (
        f"{which if len(few) > 1 else f'In {least}, only {share} {saw}'}. Tokens before the first "
        "eviction have the full cache's scores under every policy; a smaller budget or another schedule prunes more."
    )


def _clear_failures(directory: Path, cell: dict[str, Any]) -> None:
    """Remove recorded failures of cells with the same settings, also if weights or documents have changed since."""
    for file in (directory / "failures").glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if settings_of(json.loads(file.read_text(encoding="utf-8"))["cell"]) == settings_of(cell):
                file.unlink()


def failure_file(directory: Path, name: str) -> Path:
    return directory / "failures" / f"{name}.json"


def _lock_file(directory: Path, cell: Cell) -> Path:
    return directory.parent / ".locks" / f"{cell.tail}.lock"


def provenance(loaded: Loaded, ran: Collection[str]) -> dict[str, Any]:
    """What a reader needs to repeat the run; `ran`: which implementations of the recursion ran."""
    return {
        **_git(),
        "a2sf": __version__,
        "engine": ENGINE_VERSION,
        "backend": "+".join(sorted(ran)) or "none",
        "weights_format": loaded.weights_format,
        "versions": {name: version(name) for name in (*VERSIONS, *({"triton"} & set(ran)))}
        | {"python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            **({"devices": spread} if (spread := devices_of(loaded.model)) else {}),
        },
        "command": " ".join([sys.argv[0], *map(shlex.quote, [*config_dir.option(), *sys.argv[1:]])]),
    }


@cache
def _git() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        where = Path(__file__).parent
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=where, capture_output=True, encoding="utf-8", errors="replace", check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = None, None
    with suppress(OSError):
        # an environment inside another project's repository is not at that repository's commit
        if git("ls-files", "--error-unmatch", Path(__file__).name) is not None:
            commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


@cache
def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
