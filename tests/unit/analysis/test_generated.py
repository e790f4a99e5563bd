"""What eviction does to texts: loops, cut-offs, first differences, and the table, on texts that can be judged by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from a2sf.analysis.comparisons.generated import text_changes, text_frame
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.labels import DASH
from a2sf.analysis.results.selection import Selection
from a2sf.analysis.statistics.loops import ends_in_loop
from a2sf.errors import UserError
from a2sf.report.output import TableOptions, show
from a2sf.report.tables.generated import generated_tables
from a2sf.store.runs import StoredCell, load_sweep, write_cell
from tests.sweep_fixture import Plan, write_sweep


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("", False),
        ("the cat sat on the mat", False),
        ("a b a b", False),
        ("so a b a b a b", True),
        ("so a b a b a b a", True),  # cut off within the phrase
        ("a b a b a b, then something else", False),
        ("no no no", False),  # a phrase of one word
        ("no no no no no no", True),
        ("Wait. Let me check. Wait. Let me check. Wait. Let me check.", True),
        ("x = 1000000", False),
        ("1, 2, 3, 4, 5, 6", False),
        ("答案是一。答案是一。答案是一。", True),
        ("很 高 兴 认 识 你", False),
        (f"the number is {'37' * 60}", True),
        ("word " * 300, True),
        (" ".join(map(str, range(900))), False),
    ],
)
def test_texts_that_end_in_a_loop(text: str, loops: bool):
    assert ends_in_loop(text) is loops


FULL = ["one two three", "four five", "six", "seven eight", "nine"]
PRUNED = ["one two three", "four six", "six six six six six six", "seven", "ten"]
TOKENS = {w: i for i, w in enumerate(dict.fromkeys(" ".join(FULL + PRUNED).split()))}


def write(directory: Path, texts: dict[str, list[str]], stored: bool = True) -> list[StoredCell]:
    """Cells of five documents with these texts, one token a word."""
    plan = Plan(policies=list(texts), budgets=(0.2,), documents={"story": 5})
    for cell in write_sweep(directory / "choices", plan):
        of = texts[cell.cell["policy"]]
        full = cell.cell["policy"] == "full"
        documents = cell.documents.assign(
            choices=[[]] * 5,
            gold=-1,
            prediction=-1,
            loglikelihoods=[[]] * 5,
            continuation_tokens=[[len(t.split())] for t in of],
            target="x",
            generated=of,
            ended=[len(t.split()) < 6 for t in of],
        )
        if stored:
            documents = documents.assign(
                tokens=[[TOKENS[w] for w in t.split()] for t in of],
                cache_bytes=2**20 * (5 if full else 1),
                full_text_loglikelihood=np.array([-3.0, -2.0, -1.0, -2.0, -1.0]) - (0 if full else 0.5),
                full_text_tokens=[len(t.split()) for t in FULL],
            )
        result = {k: v for k, v in cell.result.items() if k not in ("checksums", "schema_version")}
        result["timing"] = {**result["timing"], "seconds": 4.0, "reused_requests": 0}
        write_cell(directory / "s" / cell.path.name, result, documents, "policy: x\n")
    return load_sweep(directory / "s")


def test_differences_by_document(tmp_path: Path):
    cells = {c.cell["policy"]: c for c in write(tmp_path, {"full": FULL, "h2o": PRUNED})}
    frame, texts = text_changes(cells["h2o"], cells["full"])
    assert not texts.shared
    assert frame["equal"].tolist() == [1, 0, 0, 0, 0]
    assert frame["first_difference"].tolist() == [3, 1, 1, 1, 0]
    assert frame["tokens"].tolist() == [3, 2, 6, 1, 1]
    assert frame["loop"].tolist() == [0, 0, 1, 0, 0]
    assert frame["cut_off"].tolist() == [0, 0, 1, 0, 0]
    assert frame["full_text_shift"].tolist() == pytest.approx([-0.5 / 3, -0.25, -0.5, -0.25, -0.5])


def test_a_table_of_them(tmp_path: Path):
    write(tmp_path, {"full": FULL, "h2o": PRUNED, "a2sf": FULL})
    grid = gather([tmp_path / "s"], Selection())
    effects, documents = text_frame(grid)
    assert len(documents) == 15
    (h2o,) = effects[effects["policy"] == "h2o"].to_dict("records")
    assert (h2o["tokens"], h2o["tokens_change"]) == (pytest.approx(2.6), pytest.approx(0.8))
    assert h2o["tokens_change_low"] < 0.8 < h2o["tokens_change_high"]
    assert (h2o["first_difference"], h2o["equal"]) == (1, pytest.approx(0.2))
    assert h2o["tokens_per_second"] == pytest.approx(13 / 4)
    (table,) = generated_tables(grid, effects)
    rows = {r["Policy"]: r for r in table.frame.to_dict("records")}
    assert rows["H2O"]["Cut off (%)"] == "20.0"
    assert rows["H2O"]["Δ loop"].startswith("+20.0 [")
    assert rows["H2O"]["Differs at"] == "1"
    assert (rows["Full cache"]["Cache (MiB)"], rows["H2O"]["Cache (MiB)"]) == ("5.00", "1.00")
    assert rows["A2SF"]["Equal (%)"] == "100.0"
    assert rows["A2SF"]["Differs at"] == DASH
    shown = show([tmp_path / "s"], Selection(), TableOptions(report=False))
    assert {"texts.csv", "texts_documents.csv", "texts-tiny-0shot-story.png"} <= {f.name for f in shown.files}
    assert "Generated texts: story" in (tmp_path / "s" / "tables" / "tables.md").read_text()


def test_older_results_have_fewer_columns(tmp_path: Path):
    write(tmp_path, {"full": FULL, "h2o": PRUNED}, stored=False)
    grid = gather([tmp_path / "s"], Selection())
    effects, _ = text_frame(grid)
    (table,) = generated_tables(grid, effects)
    assert {"Tokens", "Loop (%)", "Equal (%)"} <= set(table.frame)
    assert not {"Differs at", "Δ log-likelihood", "Cache (MiB)"} & set(table.frame)


def test_choices_have_no_texts(tmp_path: Path):
    write_sweep(tmp_path / "s", Plan(policies=("full", "h2o"), budgets=(0.2,), documents={"piqa": 5}))
    grid = gather([tmp_path / "s"], Selection())
    effects, documents = text_frame(grid)
    assert generated_tables(grid, effects) == []
    assert documents.empty
    with pytest.raises(UserError, match="no generated texts"):
        text_changes(*load_sweep(tmp_path / "s"))
