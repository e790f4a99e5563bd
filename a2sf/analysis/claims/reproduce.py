"""The paper, run as far as a machine can and compared with the published numbers: what `a2sf reproduce` does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from a2sf import atomic
from a2sf.analysis.claims.models import check_over_models
from a2sf.analysis.claims.verdicts import (
    MARGIN,
    Claim,
    Verdict,
    check_factor,
    check_figures,
    check_headline,
    check_shape,
)
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import STEP, Grid
from a2sf.analysis.results.selection import Selection
from a2sf.errors import UserError
from a2sf.store.archive import is_archive

FIGURES, HEADLINES = "a2sf_authors_0shot.csv", "a2sf_headlines.csv"


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        reference: directory of the published numbers.
        paper: sweep directory of the published models.
        small: sweep directories to look for the small model in, in that order.
        factors: the same for the small model's sweep over forgetting factors.
    """

    reference: Path
    paper: Path
    small: tuple[Path, ...]
    factors: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Findings:
    """All verdicts, the published models' and the small model's, and notes for the reader.

    Attributes:
        over_models: claims over several models, with one verdict for all of them.
    """

    headlines: list[Claim]
    figures: list[Claim]
    shape: list[Claim]
    notes: list[str]
    over_models: list[Claim] = field(default_factory=list)


def published_figures(reference: Path) -> pd.DataFrame:
    """The authors' own accuracies."""
    file = reference / FIGURES
    if not file.is_file():
        raise UserError(f"{file} is missing, so there is nothing to compare with.")
    return pd.read_csv(file)


def run_sweep(preset: str, overrides: Sequence[str] = (), download: bool = False) -> str:
    """Run or resume a preset of conf/sweep.

    Args:
        download: whether models may be fetched; otherwise only what the machine has is used.

    Returns:
        "" where it finished, else the reason: the last line that it printed.
    """
    command = [sys.executable, "-P", "-m", "a2sf.cli", "run", "-m", f"+sweep={preset}", *overrides]
    environment = os.environ if download else os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment) as process:
        last = ""
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    return "" if process.returncode == 0 else last or f"it exited with {process.returncode}"


def compare(places: Places, why_not: Mapping[str, str], margin: float = MARGIN) -> Findings:
    """Compare what is on disk with the published claims.

    Args:
        why_not: published model -> why its cells are missing where they are.
        margin: within which two systems are as good as each other.
    """
    notes: list[str] = []
    paper = _grid([places.paper], notes)
    published = published_figures(places.reference)
    headlines = pd.read_csv(places.reference / HEADLINES).to_dict("records")
    small, swept = _first(places.small), _first(places.factors)
    shape: list[Claim] = []
    over_models = check_over_models(paper, published=published)
    if small is None:
        notes.append(f"No small model's results in {' or '.join(map(str, places.small))}: its shape is not checked.")
    elif (grid := _grid([small], notes)) is not None:
        models = ", ".join(sorted(grid.frame["model"].unique()))
        notes.append(
            f"The shape below is of {models} from {small}, not of the published models: it says whether the same order "
            "shows on another model, not whether the published numbers hold."
        )
        shape = check_shape(grid, set(published["policy"]), margin=margin)
        over_models += check_over_models(grid)
    if swept is not None and (grid := _grid([swept], notes)) is not None:
        checked = {c.claim for c in shape if c.verdict is not Verdict.NOT_RUN}
        found = [c for c in check_factor(grid) if c.claim not in checked]
        shape = [c for c in shape if c.claim not in {f.claim for f in found}] + found
        notes.append(f"Where the best forgetting factor lies is from {swept}.")
    return Findings(
        headlines=[check_headline(row, paper, why_not, margin) for row in headlines],
        figures=check_figures(published, paper, why_not),
        shape=shape,
        notes=notes,
        over_models=over_models,
    )


def claims_frame(claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per claim."""
    return pd.DataFrame([vars(c) | {"verdict": c.verdict.value} for c in claims])


def counts(claims: Sequence[Claim]) -> dict[str, int]:
    """Verdict -> number of claims, in the verdicts' order."""
    return {v.value: n for v in Verdict if (n := sum(c.verdict is v for c in claims))}


def write_claims(directory: Path, findings: Findings) -> list[Path]:
    """Write every verdict as `claims.csv` and `claims.md`; the latter folds figures that were not run by their reason."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = {
        "Headline claims": findings.headlines,
        "Over several models": findings.over_models,
        "Published figures": findings.figures,
        "Shape on the small model": findings.shape,
    }
    atomic.write(
        directory / "claims.csv", claims_frame([c for claims in parts.values() for c in claims]).to_csv(index=False)
    )
    lines = ["# Claims and verdicts", "", *(f"- {note}" for note in findings.notes)]
    for title, claims in parts.items():
        summary = "; ".join(f"{n} {verdict}" for verdict, n in counts(claims).items())
        lines += ["", f"## {title}", "", f"{summary}." if claims else "Nothing was compared."]
        rows = claims
        if claims is findings.figures:
            rows = [c for c in claims if c.verdict is not Verdict.NOT_RUN]
            lines += _not_run([c for c in claims if c.verdict is Verdict.NOT_RUN])
        if rows:
            lines += ["", "| Claim | Published | Measured | Verdict | Why |", "| :-- | --: | --: | :-- | :-- |"]
            lines += [
                f"| {c.claim} | {_share(c.published)} | {_share(c.measured)} | {c.verdict.value} | {c.why} |"
                for c in rows
            ]
    atomic.write(directory / "claims.md", "\n".join(lines) + "\n")
    return [directory / "claims.csv", directory / "claims.md"]


def _not_run(figures: Sequence[Claim]) -> list[str]:
    """A line of Markdown for each reason, after an empty one."""
    by_reason: dict[str, list[str]] = {}
    for c in figures:
        by_reason.setdefault(c.why, []).append(c.claim.partition(" ")[0])  # its model
    reasons = [f"- {len(of)} of {', '.join(dict.fromkeys(of))} not run: {why}" for why, of in by_reason.items()]
    return ["", *reasons] if reasons else []


def _first(places: tuple[Path, ...]) -> Path | None:
    return next((d for d in places if is_archive(d) or (d.is_dir() and any(d.iterdir()))), None)


def _grid(directories: list[Path], notes: list[str]) -> Grid | None:
    try:
        # what is published was measured step by step
        grid = gather(directories, Selection(metric="acc")).with_schedule(STEP)
    except UserError as error:
        notes.append(str(error))
        return None
    notes += grid.notes
    return grid


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
