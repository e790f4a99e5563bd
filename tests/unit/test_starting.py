"""What the command sets before libraries are loaded, and that a program that imports the package is left alone."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from a2sf.starting import WAITING, importing

ROOT = Path(__file__).parents[2]
SEEN = "; import os, sys; print({n: os.environ.get(n) for n in ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME')}, 'torch' in sys.modules)"
COMMAND = "from a2sf.app import process; from a2sf import cli; cli._run = lambda *_: None; cli.main(['run'])"


def seen(code: str, **environment: str) -> str:
    """What a new process says of the variables, and whether torch has been imported."""
    ours = {k: v for k, v in os.environ.items() if k not in (*WAITING, "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code + SEEN],
        env=ours | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def test_waiting_threads_leave_their_cores_to_others_under_the_command():
    assert seen(COMMAND) == f"{WAITING} False"  # torch reads it when it is loaded


@pytest.mark.parametrize(
    ("theirs", "left"),
    [
        ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": None, "KMP_BLOCKTIME": None}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": None}),
    ],
)
def test_what_a_user_has_chosen_stays(theirs, left):
    assert seen(COMMAND, **theirs) == f"{left} False"


def test_importing_the_package_sets_nothing():
    assert seen("import a2sf").startswith(str(dict.fromkeys(WAITING)))


def test_a_sweeps_table_loads_neither_tests_nor_pictures():
    """They take more than a second; a sweep's own table has none."""
    code = (
        "import sys, numpy, a2sf.report.tables.screen as t; from a2sf.analysis.statistics.paired import holm; holm([]); "
        "print([m for m in ('scipy.stats', 'statsmodels', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_collector_rests_only_while_libraries_are_imported():
    before = gc.isenabled()
    gc.enable()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()
