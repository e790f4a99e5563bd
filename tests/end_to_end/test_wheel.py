"""The wheel, installed beside nothing of the repository and used from an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from a2sf.policies.find import built_in
from a2sf.store.runs import load_sweep
from tests.outside import installed_package, own_folder, policy
from tests.started import started

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"COLUMNS": "150", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel; dependencies are those of this one, which holds no a2sf that it could see."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    before = _status()
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, env=CLEAN)
    assert _status() == before  # building leaves nothing behind
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, env=CLEAN)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "--python", str(venv / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=CLEAN)
    installed_package(site, "theirs", policy("Theirs", "theirs", "Their policy"))
    return venv / "bin" / "a2sf"


def _status() -> str:
    done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def a2sf(environment: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The environment's command, in a process whose imports are behind it."""
    return started("a2sf", *arguments, environment=CLEAN, folder=cwd, python=str(environment.with_name("python")))


def test_a_sweep_with_own_policies_and_its_report(environment, empty):
    """Built-in, own and installed policy; an own model's name; then the report."""
    own_folder(empty / "own")
    grid = ["policy=full,h2o,mine,theirs", "model=little", "data=bundle", "tasks=[copa]", "limit=2"]
    anew = [environment, "run", "-m", *grid, "--config-dir", "own"]
    done = subprocess.run(anew, cwd=empty, env=CLEAN, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "4 cells, 0 done, 4 to run" in done.stdout
    for label in ("little, 0-shot", "Full cache", "H2O", "My policy", "Their policy"):
        assert label in done.stdout
    stored = load_sweep(empty / "runs" / "single")
    assert {s.cell["policy"]: "policy_source" in s.cell["identity"] for s in stored} == {
        "full": False,
        "h2o": False,
        "mine": True,
        "theirs": True,
    }
    said = stored[0].result["provenance"]["command"]  # can be run as it stands
    assert (
        said
        == "a2sf run --config-dir own -m policy=full,h2o,mine,theirs model=little data=bundle 'tasks=[copa]' limit=2"
    )
    assert stored[0].result["provenance"]["git_commit"] is None

    shown = a2sf(environment, empty, "tables", "runs/single")
    assert shown.returncode == 0, shown.stderr
    assert "My policy" in (empty / "runs" / "single" / "report.html").read_text()
    table = (empty / "runs" / "single" / "tables" / "tables.md").read_text()
    assert "| My policy | 0.2 |" in table
    assert "| Their policy | 0.2 |" in table


def test_own_names_are_among_those_that_an_error_offers(environment, empty):
    own_folder(empty / "own")
    for arguments, part in ((["policy=mne"], "mine"), (["+sweep=our"], "ours")):
        done = a2sf(environment, empty, "run", *arguments, "--config-dir", "own")
        assert done.returncode == 1
        assert f"(did you mean {part}" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_file_that_ours_would_hide_is_refused(environment, empty):
    folder = own_folder(empty / "hiding")
    (folder / "policy" / "mine.yaml").rename(folder / "policy" / "h2o.yaml")
    done = a2sf(environment, empty, "run", "-m", "policy=h2o", "plan_only=true", "--config-dir", "hiding")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "hiding/policy/h2o.yaml has the name of a file that comes with a2sf, and would hide it: give it another name.\n"
    )
    assert len(done.stderr.splitlines()) == 1


def test_a_preset_of_ones_own_and_help(environment, empty):
    own_folder(empty / "own")
    done = a2sf(environment, empty, "run", "sweep=ours", "plan_only=true", "--config-dir=own")
    assert done.returncode == 0, done.stderr
    assert "runs/ours: 2 cells" in done.stdout
    output = a2sf(environment, empty, "run", "--help", "--config-dir=own").stdout
    assert "+sweep=ours A sweep of one's own." in " ".join(output.split())
    (offered,) = re.findall(r"mine, a2sf\*, .*theirs", " ".join(output.split()))
    assert set(offered.replace("*", "").split(", ")) == {"mine", *built_in(), "theirs"}


def test_presets_find_their_settings(environment, empty):
    done = a2sf(environment, empty, "run", "+sweep=heldout", "tasks=[copa]", "plan_only=true")
    assert done.returncode == 0, done.stderr
    assert "68 cells, 0 done, 68 to run" in done.stdout


def test_published_numbers_are_in_the_wheel(environment, empty):
    done = a2sf(environment, empty, "reproduce", "--no-run")
    assert done.returncode == 0, done.stderr
    assert "Headline claims" in done.stdout
    assert (empty / "runs" / "claims" / "claims.csv").is_file()


def test_policies_and_doctor(environment, empty):
    output = a2sf(environment, empty, "policies", "--config-dir", str(own_folder(empty / "own"))).stdout
    assert "theirs  Their policy" in output
    assert "share = 0.5  share of the budget that is for the first tokens\n" in output
    done = a2sf(environment, empty, "doctor", "--json")
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["policies of other packages"] == {"theirs": "someone:Theirs"}
    assert report["kernels"]["auto on cpu"].startswith("works")
    assert "site-packages/a2sf" in report["versions"]["a2sf"]


def test_the_shell_completes_overrides(environment, empty):
    """Bash, Hydra's own function, our command: the words that bash would offer."""
    words = ["a2sf r", "a2sf run poli", "a2sf run policy=", "a2sf run +sweep=de", "a2sf run model.d", "a2sf tables ru"]
    # what pressing the tabulator runs
    ask = 'COMP_LINE="$1"; COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); '
    ask += 'hydra_bash_completion; echo "${COMPREPLY[*]}"'
    script = 'eval "$(a2sf -sc install=bash)"; complete -p a2sf >&2; for line in "$@"; do f "$line"; done'
    path = f"{environment.parent}{os.pathsep}{CLEAN['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"f() {{ {ask}; }}; {script}", "bash", *words],
        env=CLEAN | {"PATH": path},
        cwd=empty,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "-F hydra_bash_completion a2sf" in done.stderr
    offered = done.stdout.splitlines()
    assert offered[0].split() == ["run", "reproduce", "replay"]
    assert "policy=" in offered[1].split()
    assert set(offered[2].split()) >= {"policy=h2o", "policy=theirs"}
    assert offered[3] == "+sweep=demo"
    assert set(offered[4].split()) == {"model.dtype=", "model.device=", "model.device_map="}
