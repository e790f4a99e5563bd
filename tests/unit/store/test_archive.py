"""A sweep packed into one file: equal when read in place, continued when unpacked, and a changed byte is reported."""

from __future__ import annotations

import random

import pandas as pd
import pytest

from a2sf.analysis.results.gather import gather
from a2sf.commands.archive import main_pack
from a2sf.errors import UserError
from a2sf.report.output import TableOptions, show
from a2sf.store.archive import SUFFIX, pack, place_of, read_archive, unpack
from a2sf.store.runs import TRACES, CorruptCell, is_cell, load_sweep, read_cell, write_cell
from tests.sweep_fixture import Plan, write_sweep


@pytest.fixture
def sweep(tmp_path):
    """Two tasks, one of them with a column of its own, and a cell with traces."""
    write_sweep(tmp_path / "s", Plan(documents={"arc_easy": 30, "piqa": 40}))
    (one, *_) = load_sweep(tmp_path / "s")
    more = one.documents.assign(**{"metric/f1": 0.5}, target="text")
    result = {k: v for k, v in one.result.items() if k != "checksums"}
    write_cell(
        tmp_path / "s" / "another", result | {"cell": result["cell"] | {"id": "x"}}, more, "a: 1\n", {TRACES: b"t"}
    )
    return tmp_path / "s"


def test_what_is_packed_is_read_in_place(sweep):
    archive = pack(sweep)
    assert archive == sweep.with_name("s" + SUFFIX)
    before, packed = load_sweep(sweep), read_archive(archive)
    assert [c.path for c in packed] == [c.path for c in before]
    for a, b in zip(before, packed, strict=True):
        assert {k: v for k, v in a.result.items() if k != "checksums"} == b.result
        pd.testing.assert_frame_equal(a.documents, b.documents)
        assert (a.path / "config.yaml").read_text() == b.config
    noted = {c.path.name: file.read() for c in packed if (file := c.open_traces())}
    assert noted == {"another": b"t"}


def test_recorded_evictions_may_be_left_out(sweep, tmp_path):
    main_pack([str(sweep), str(tmp_path / "small"), "--no-traces"])
    packed = read_archive(tmp_path / f"small{SUFFIX}")
    assert len(packed) == len(load_sweep(sweep))
    assert not any(c.open_traces() for c in packed)
    for stored in unpack(tmp_path / f"small{SUFFIX}", tmp_path / "again"):
        read_cell(stored.path)


def test_tables_are_the_same_from_an_archive(tmp_path):
    write_sweep(tmp_path / "s")
    archive = pack(tmp_path / "s")
    options = TableOptions(plots=False)
    from_cells = show([tmp_path / "s"], None, options)
    tables = (tmp_path / "s" / "tables" / "tables.md").read_text()
    from_archive = show([archive], None, TableOptions(plots=False, out=tmp_path / "other"))
    assert from_archive.notes == from_cells.notes
    assert (tmp_path / "other" / "tables" / "tables.md").read_text() == tables
    assert place_of(archive) == tmp_path / "s"
    assert len(gather([archive]).cells) == len(gather([tmp_path / "s"]).cells)


def test_unpacked_cells_are_complete_and_existing_ones_stay(sweep, tmp_path):
    archive = pack(sweep)
    there = load_sweep(sweep)[0]
    unpack(archive, tmp_path / "again")
    for cell in load_sweep(sweep):
        back = read_cell(tmp_path / "again" / cell.path.name)
        assert back.metrics == cell.metrics
        pd.testing.assert_frame_equal(back.documents, cell.documents)
    assert (tmp_path / "again" / "another" / TRACES).read_bytes() == b"t"
    assert (
        pd.read_csv(tmp_path / "again" / "results.csv").equals(pd.read_csv(sweep / "results.csv")) is False
    )  # one more
    stamp = (there.path / "result.json").stat().st_mtime_ns
    assert unpack(archive, sweep) == []
    assert (there.path / "result.json").stat().st_mtime_ns == stamp
    assert all(is_cell(c.path) for c in load_sweep(sweep))


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_byte_is_reported(sweep, seed):
    archive = pack(sweep)
    content = bytearray(archive.read_bytes())
    where = random.Random(seed).randrange(len(content))
    content[where] ^= 1
    archive.write_bytes(bytes(content))
    with pytest.raises(CorruptCell, match="not the archive that was packed"):
        read_archive(archive)


def test_a_damaged_or_missing_sweep_is_not_packed(sweep, tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        pack(tmp_path / "nowhere")
    (sweep / "another" / "documents.parquet").write_bytes(b"")
    with pytest.raises(CorruptCell):
        pack(sweep)
    assert not list(tmp_path.glob(f"*{SUFFIX}"))
