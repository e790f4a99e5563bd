"""Verdicts on published claims: synthetic results for each of them, and the way reproduce.py reports them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from a2sf.analysis.claims.reproduce import Findings, Places, compare, counts, write_claims
from a2sf.analysis.claims.verdicts import NO_CELL, Claim, Verdict, check_figures, check_headline, check_shape
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import Grid
from a2sf.commands.reproduce import REFERENCE_SWEEPS
from a2sf.shipped import shipped
from a2sf.store.archive import read_archive
from tests.sweep_fixture import NOISE, Plan, write_sweep

pytestmark = pytest.mark.usefixtures("few_flips")

ROOT = Path(__file__).parents[3]
REFERENCE = ROOT / "runs" / "reference"
HEADLINE = {
    "claim": "up to +5 points over the earlier methods",
    "model": "tiny",
    "first": "a2sf",
    "others": "window/h2o",
    "shots": 0,
    "value": 0.05,
    "tasks": "arc_easy/piqa",
    "source": "paper",
}
HALF = {"dtype": "float16"}
WHY = dict.fromkeys(("tiny", "llama-2-7b", "opt-2.7b"), "no such model here")


def test_the_small_models_own_reference_is_where_it_is_looked_for():
    assert all((shipped("runs/reference") / name).is_file() for name in REFERENCE_SWEEPS)


@pytest.mark.full
def test_the_small_models_own_reference_can_be_read():
    assert [len(read_archive(shipped("runs/reference") / name)) for name in REFERENCE_SWEEPS] == [264, 69]


def made(directory: Path, **plan: object) -> Grid:
    write_sweep(directory, Plan(**{"extra": HALF, **plan}))  # type: ignore[arg-type]
    return gather([directory])


def published(grid: Grid, shift: float = 0.0, n: int | None = None, model: str = "tiny") -> pd.DataFrame:
    """What the grid measured, as if it had been published `shift` lower."""
    frame = grid.frame[(grid.frame.policy == "h2o") & (grid.frame.task == "piqa")].head(1)
    row = frame[["policy", "budget_ratio", "forgetting_factor", "shots", "task", "metric", "value", "n"]].copy()
    row["value"] -= shift
    row["n"] = row["n"] if n is None else n
    return row.assign(model=model, source="paper")


@pytest.mark.parametrize(
    ("shift", "documents", "verdict"),
    [(0.009, 150, Verdict.REPRODUCED), (0.05, 150, Verdict.UNCLEAR), (0.05, 4000, Verdict.NOT_REPRODUCED)],
)
def test_a_figure(tmp_path: Path, shift: float, documents: int, verdict: Verdict) -> None:
    grid = made(tmp_path / "s", documents={"piqa": documents}, policies=("h2o",))
    (claim,) = check_figures(published(grid, shift), grid, WHY)
    assert claim.verdict is verdict
    assert f"{100 * shift:+.1f} points" in claim.why


def test_a_figure_of_another_protocol(tmp_path: Path) -> None:
    grid = made(tmp_path / "s", extra={"dtype": "float32"}, policies=("h2o",))
    (claim,) = check_figures(published(grid, n=1838), grid, WHY)
    assert claim.verdict is Verdict.PROTOCOL
    assert "150 documents, published 1838" in claim.why
    assert "float32, published float16" in claim.why


def test_a_figure_that_was_not_run(tmp_path: Path) -> None:
    grid = made(tmp_path / "s", policies=("h2o",))
    large, tiny = published(grid, model="large"), published(grid)
    for rows, there, why in ((large, grid, NO_CELL), (large, grid, "not here"), (tiny, None, "not here")):
        (claim,) = check_figures(rows, there, {} if why == NO_CELL else {"large": why, "tiny": why})
        assert (claim.verdict, claim.why, claim.measured) == (Verdict.NOT_RUN, why, None)


def test_factors_tell_figures_apart(tmp_path: Path) -> None:
    grid = made(tmp_path / "s", policies=("a2sf",), factors=(0.1, 0.9))
    rows = grid.frame[grid.frame.task == "piqa"].assign(source="paper", n=150)
    assert [c.measured for c in check_figures(rows, grid, WHY)] == rows["value"].tolist()


@pytest.mark.parametrize(
    ("documents", "value", "verdict"),
    [(120, 0.05, Verdict.REPRODUCED), (120, 0.60, Verdict.NOT_REPRODUCED), (20, 0.05, Verdict.UNCLEAR)],
)
def test_a_headline(tmp_path: Path, documents: int, value: float, verdict: Verdict) -> None:
    grid = made(tmp_path / "s", documents={"arc_easy": documents, "piqa": documents})
    claim = check_headline(HEADLINE | {"value": value}, grid, WHY)
    assert claim.verdict is verdict
    assert "the largest gain is" in claim.why


def test_a_headline_of_another_protocol_or_not_run(tmp_path: Path) -> None:
    grid = made(tmp_path / "s", extra={"dtype": "float32", "limit": 150})
    claim = check_headline(HEADLINE | {"tasks": "arc_easy/copa"}, grid, WHY)
    assert claim.verdict is Verdict.PROTOCOL
    for how in ("tasks not run: copa", "other tasks: piqa", "only 150 documents", "float32 instead of float16"):
        assert how in claim.why
    assert check_headline(HEADLINE | {"shots": 1}, grid, WHY).verdict is Verdict.NOT_RUN
    assert check_headline(HEADLINE, None, WHY).verdict is Verdict.NOT_RUN


def test_the_shape_of_the_published_results(tmp_path: Path) -> None:
    grid = made(tmp_path / "s", factors=(0.0, 0.2, 0.9), documents={"arc_easy": 500, "piqa": 600})
    claims = check_shape(grid, ["a2sf", "h2o", "window"])
    assert verdict_of(claims, "a2sf above h2o at budget 0.2") is Verdict.REPRODUCED
    assert verdict_of(claims, "a2sf above window") is Verdict.REPRODUCED
    assert verdict_of(claims, "best forgetting factor") is Verdict.REPRODUCED


def test_the_opposite_shape(tmp_path: Path) -> None:
    noise = NOISE | {"a2sf": 4.0, "h2o": 0.5, "window": 0.5}
    grid = made(tmp_path / "s", noise=noise, documents={"arc_easy": 500, "piqa": 600})
    claims = check_shape(grid, ["a2sf", "h2o", "window"], factors=(0.4, 0.6))
    assert verdict_of(claims, "a2sf above h2o at budget 0.2") is Verdict.NOT_REPRODUCED
    assert verdict_of(claims, "a2sf above window") is Verdict.NOT_REPRODUCED
    assert verdict_of(claims, "best forgetting factor") is Verdict.NOT_RUN


def test_equal_systems_are_called_equal_where_there_are_enough_documents(tmp_path: Path) -> None:
    noise = NOISE | {"a2sf": 0.2, "h2o": 0.2}
    grid = made(tmp_path / "s", noise=noise, documents={"arc_easy": 900, "piqa": 900}, budgets=(0.5, 0.8))
    claims = check_shape(grid, ["a2sf", "h2o", "window"], margin=0.05)
    assert verdict_of(claims, "a2sf above h2o at budget 0.8") is Verdict.EQUAL
    (claim,) = [c for c in claims if "a2sf above h2o at budget 0.8" in c.claim]
    assert claim.why.endswith("; within 5 points: yes.")
    narrow = check_shape(grid, ["a2sf", "h2o", "window"], margin=0.001)
    assert verdict_of(narrow, "a2sf above h2o at budget 0.8") is Verdict.UNCLEAR
    assert all("within 0.1 points" in c.why for c in narrow if "above" in c.claim)


def test_the_best_factor_outside(tmp_path: Path) -> None:
    grid = made(tmp_path / "s", factors=(0.2, 0.9), documents={"arc_easy": 500, "piqa": 600})
    claims = check_shape(grid, ["a2sf", "h2o"], factors=(0.8, 1.0))
    assert verdict_of(claims, "best forgetting factor") is Verdict.NOT_REPRODUCED


def test_too_few_documents_for_a_shape(tmp_path: Path) -> None:
    grid = made(tmp_path / "s", factors=(0.2, 0.5), documents={"arc_easy": 6, "piqa": 7})
    assert {c.verdict for c in check_shape(grid, ["a2sf", "h2o", "window"])} == {Verdict.UNCLEAR}


def verdict_of(claims: list[Claim], text: str) -> Verdict:
    (found,) = [c.verdict for c in claims if text in c.claim]
    return found


def test_published_numbers_are_all_there() -> None:
    places = Places(REFERENCE, ROOT / "runs" / "no such sweep", ())
    findings = compare(places, WHY)
    assert counts(findings.figures) == {"not run": 264}
    assert [c.published for c in findings.headlines] == [0.051, 0.078]
    assert findings.shape == []
    assert all(c.source for c in findings.figures + findings.headlines)


def test_findings_are_written(tmp_path: Path) -> None:
    write_sweep(tmp_path / "small")
    findings = compare(Places(REFERENCE, tmp_path / "paper", (tmp_path / "none", tmp_path / "small")), WHY)
    assert any("of tiny from" in note and "not of the published models" in note for note in findings.notes)
    csv, md = write_claims(tmp_path / "out", findings)
    assert len(pd.read_csv(csv)) == 267 + len(findings.shape)  # 264 figures, 2 headlines, 1 over the published models
    text = md.read_text()
    figures = pd.read_csv(REFERENCE / "a2sf_authors_0shot.csv")["model"].value_counts()
    assert "264 not run." in text
    assert (
        f"- {figures['llama-2-7b'] + figures['opt-2.7b']} of llama-2-7b, opt-2.7b not run: no such model here\n" in text
    )
    assert f"- {figures['llama-7b']} of llama-7b not run: {NO_CELL}\n" in text  # each model its own reason
    assert text.count("no such model here") == 3  # once for the figures, and for each headline
    assert "llama-2-7b full" not in text


def test_headlines_and_shape_that_were_not_run_keep_their_rows(tmp_path: Path) -> None:
    claims = [Claim(name, Verdict.NOT_RUN, "for want of it") for name in "ab"]
    for findings in (Findings(claims, [], [], []), Findings([], [], claims, [])):
        _, md = write_claims(tmp_path, findings)
        assert "| a |  |  | not run | for want of it |\n| b |  |  | not run | for want of it |\n" in md.read_text()


def test_the_best_factor_comes_from_the_sweep_over_factors(tmp_path: Path) -> None:
    write_sweep(tmp_path / "small", Plan(factors=(0.1,)))
    write_sweep(tmp_path / "factors", Plan(factors=(0.0, 0.2, 0.9), documents={"arc_easy": 500, "piqa": 600}))
    places = Places(REFERENCE, tmp_path / "paper", (tmp_path / "small",))
    without = compare(places, WHY).shape
    assert verdict_of(without, "best forgetting factor") is Verdict.NOT_RUN
    findings = compare(replace(places, factors=(tmp_path / "factors",)), WHY)
    assert verdict_of(findings.shape, "best forgetting factor") is Verdict.REPRODUCED
    assert len(findings.shape) == len(without)
    assert any("factors" in note for note in findings.notes)


def test_the_command_compares_without_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from a2sf.commands import reproduce

    write_sweep(tmp_path / "paper_small")
    reproduce.main(["--no-run", "--runs", str(tmp_path)])
    assert "264 not run" in capsys.readouterr().out
    assert (tmp_path / "claims" / "claims.md").exists()


def test_script_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "reproduce.py", "--no-run", "--reference", tmp_path]
    missing = subprocess.run([*command, "--runs", tmp_path], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr
    assert "a2sf_authors_0shot.csv is missing" in missing.stderr


def test_the_authors_present_algorithm_is_run_beside_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a published model: the small sweep, then the authors' cells in the same directory, then the factors."""
    from a2sf.commands import reproduce

    started = []

    def run_sweep(preset: str, overrides: list[str], download: bool = False) -> str:
        started.append((preset, overrides[-1]))
        return "no hub" if preset == "paper" else ""

    monkeypatch.setattr(reproduce, "run_sweep", run_sweep)
    monkeypatch.setattr(reproduce, "REFERENCE_SWEEPS", ("none", "none"))  # 333 cells, which take seconds
    reproduce.main(["--runs", str(tmp_path), "--reference", str(REFERENCE)])
    assert [a for a in started if a[0] != "paper"] == [
        ("paper_small", "sweep_name=paper_small"),
        ("paper_authors", "sweep_name=paper_small"),
        ("forgetting", "sweep_name=forgetting"),
    ]
