"""Documents through the real command: a hub on loopback, data that change, tasks of many names."""

from __future__ import annotations

import json
import shutil
import subprocess

import pandas as pd
import pytest

from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate, tables
from tests.hub.build import write_model
from tests.hub.paper import commit_dataset, paper_documents
from tests.hub.server import Hub, Rule
from tests.hub.store import Store

PAPER = ["openbookqa", "winogrande", "piqa", "copa", "mathqa", "arc_easy", "arc_challenge"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tokens=1000)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A hub and a folder for a cache: the same for all, so that all starts have one environment."""
    root = tmp_path_factory.mktemp("hub")
    with Hub(Store(root)) as made:
        yield made, root / "home"


@pytest.fixture
def hub(place, tmp_path):
    """The hub, empty, and nothing cached."""
    made, home = place
    made.store, made.rules = Store(tmp_path / "hub"), []
    made.requests()
    shutil.rmtree(home, ignore_errors=True)
    return made


@pytest.fixture
def run(hub, place, tiny, tmp_path):
    """Runs the command against the hub."""
    environment = hub.environment(place[1])

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        model = [] if any(a.startswith("model") for a in arguments) else [f"model.path={tiny}"]
        return evaluate(*arguments, *model, runs=tmp_path / "runs", **{**environment, "OMP_NUM_THREADS": "1", **more})

    return run


def questions(n=20, label=0, train=None):
    rows = [{"goal": f"Goal number {i}", "sol1": f"right {i}", "sol2": f"wrong {i}", "label": label} for i in range(n)]
    return {None: {"train": rows[:5], "validation": rows}}


def numbers(text: str) -> list[str]:
    """The rows of the tables on a screen, without marks."""
    return [
        line.replace("↓", " ").split() for line in text.splitlines() if line.strip().startswith(("Full", "H2O", "A2SF"))
    ]


@pytest.mark.full
def test_the_papers_seven_tasks_from_a_hub(hub, run, tmp_path):
    paper_documents(hub.store)
    done = run("-m", "policy=full,h2o", "budget.ratio=0.2", "tasks=paper", "shots=0,1", "limit=4", "sweep_name=seven")
    assert done.returncode == 0, done.stderr + done.stdout
    stored = load_sweep(tmp_path / "runs" / "seven")
    assert {(s.cell["task"], s.cell["shots"]) for s in stored} == {(t, n) for t in PAPER for n in (0, 1)}
    for s in stored:
        where = s.result["documents"]
        commit = hub.store.dataset(where["dataset_path"]).refs["main"]
        assert where["content"] == s.cell["identity"]["data"]["content"] == commit
        for prompt in s.documents["context"] if s.cell["shots"] else []:
            assert "\n\n" in prompt
    assert set(pd.read_csv(tmp_path / "runs" / "seven" / "results.csv")["data"].str.len()) == {40}
    assert "Fetching regisss/math_qa from the hub for mathqa: " in done.stdout
    requests = hub.requests()
    assert not [line for line in requests if line.startswith("CONNECT")]  # nobody else, no counter
    for name in ("aps/super_glue", "allenai/ai2_arc"):
        # once, and once more to note it for a time without the hub
        assert sum(f"/api/datasets/{name} " in line for line in requests) == 2

    again = run("-m", "policy=full,h2o", "budget.ratio=0.2", "tasks=paper", "shots=0,1", "limit=4", "sweep_name=seven")
    assert "28 cells, 28 done, 0 to run" in again.stdout
    assert len(hub.requests()) == 6  # one per dataset


@pytest.mark.full
def test_a_main_branch_that_moves_between_two_starts(hub, run, tmp_path):
    first = commit_dataset(hub.store, "baber/piqa", questions())
    grid = ["-m", "budget.ratio=0.3", "tasks=[piqa]", "sweep_name=moved"]
    assert run(*grid, "policy=full,h2o").returncode == 0
    second = commit_dataset(hub.store, "baber/piqa", questions(label=1))
    done = run(*grid, "policy=full,h2o,a2sf")
    assert "3 cells, 0 done, 3 to run" in done.stdout
    stored = load_sweep(tmp_path / "runs" / "moved")
    assert [s.result["documents"]["content"] for s in stored].count(first) == 2
    assert [s.result["documents"]["content"] for s in stored].count(second) == 3
    printed = tables(tmp_path / "runs" / "moved")
    assert numbers(printed.stdout) == numbers(done.stdout) != []
    assert "piqa: 2 cells of documents that have changed since are left out" in " ".join(printed.stdout.split())
    back = run(*grid, "policy=full", f"data.revision={first}")
    assert "1 cell, 1 done, 0 to run" in back.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=processes", "hydra.launcher.n_jobs=2"]], ids=["here", "workers"]
)
def test_a_main_branch_that_moves_during_a_sweep(hub, run, tmp_path, launcher):
    """All cells are of the commit that the sweep began with, and are found again under the planned names."""
    first = commit_dataset(hub.store, "baber/piqa", questions())
    moved = []

    class Moves(Rule):
        def takes(self, method, path):
            if "/resolve/" in path and not moved:
                moved.append(commit_dataset(hub.store, "baber/piqa", questions(label=1)))
            return False

    hub.rules.append(Moves(""))
    done = run("-m", "policy=full,h2o", "budget.ratio=0.3", "tasks=[piqa]", "sweep_name=during", *launcher)
    assert done.returncode == 0, done.stderr + done.stdout
    assert moved
    assert "2 cells, 0 done, 2 to run" in done.stdout
    assert "H2O" in done.stdout
    stored = load_sweep(tmp_path / "runs" / "during")
    assert [s.result["documents"]["content"] for s in stored] == [first, first]


@pytest.mark.full
def test_local_data_that_change_between_two_starts(run, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()

    def labels(value):
        rows = questions(8, value)[None]["validation"]
        (folder / "piqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    grid = ["-m", f"data.dir={folder}", "tasks=[piqa]", "budget.ratio=0.3", "sweep_name=flipped"]
    labels(0)
    before = run(*grid, "policy=full")
    labels(1)
    after = run(*grid, "policy=full,h2o")
    assert "2 cells, 0 done, 2 to run" in after.stdout
    value = [float(numbers(d.stdout)[0][-2 if "Δ" in d.stdout else -1]) for d in (before, after)]
    assert value[0] == pytest.approx(100 - value[1])
    assert numbers(tables(tmp_path / "runs" / "flipped").stdout) == numbers(after.stdout)


@pytest.mark.full
def test_a_broken_dataset_is_reported_once_and_stops_no_other(hub, run):
    paper_documents(hub.store)
    hub.rules.append(Rule("winogrande/resolve/.*parquet", status=404, code="EntryNotFound"))
    done = run("-m", "policy=full,h2o,window", "tasks=[winogrande,piqa]", "limit=3", "sweep_name=broken")
    assert done.returncode == 1
    assert "piqa" in done.stdout
    said = " ".join(done.stdout.split())
    assert said.count("tasks=winogrande") == 1
    assert "3 cells were not run: tasks=winogrande cannot be loaded" in said
    hub.rules.clear()
    assert (
        run("-m", "policy=full,h2o,window", "tasks=[winogrande,piqa]", "limit=3", "sweep_name=broken").returncode == 0
    )


@pytest.mark.full
def test_without_the_hub_cached_documents_are_used(hub, run, tmp_path):
    commit_dataset(hub.store, "baber/piqa", questions())
    assert run("policy=full", "tasks=[piqa]", "limit=3").returncode == 0
    hub.rules.append(Rule("", status=503))
    down = run("policy=h2o", "tasks=[piqa]", "limit=3")
    assert down.returncode == 0, down.stderr
    assert "The hub answers 503: cached documents are used." in down.stdout
    offline = run("policy=window", "tasks=[piqa]", "limit=3", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0
    assert "HF_HUB_OFFLINE is set: cached documents are used." in offline.stdout
    other = run("policy=full", "tasks=[copa]", "limit=3", "plan_only=true")
    assert other.returncode == 0
    assert "names of cells of copa are provisional" in " ".join(other.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tasks=[piqa]", "data.split=dev"], ["data.split=dev", "baber/piqa has train, validation"]),
        (["tasks=[piqa]", "shots=1", "data.fewshot_split=tran"], ["data.fewshot_split=tran", "did you mean train"]),
        (["tasks=[piqa]", "data.revision=v3"], ["data.revision=v3", "no such branch, tag or commit"]),
        (["tasks=[piqa]", "shots=20"], ["shots=20", "piqa has only 19 documents"]),
        (["tasks=[copa]"], ["tasks=copa", "no dataset of that name"]),
        (["tasks=[mathqa]"], ["tasks=mathqa", "ask for access at", "regisss/math_qa"]),
        (["tasks=[winogrande]"], ["tasks=winogrande", "is a script"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_what_the_hub_does_not_give_is_one_sentence(hub, run, arguments, parts):
    commit_dataset(hub.store, "baber/piqa", questions())
    paper_documents(hub.store) if "mathqa" in arguments[0] else None
    hub.store.dataset("regisss/math_qa").path.mkdir(parents=True, exist_ok=True)
    hub.store.dataset("regisss/math_qa").set(gated=True)
    hub.store.dataset("allenai/winogrande").commit({"README.md": "x", "winogrande.py": "import os\n"})
    done = run("policy=full", *arguments)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.full
def test_tasks_with_parentheses_and_yaml_files_reach_the_workers(hub, run, tmp_path):
    name = "tmmluplus_education_(profession_level)"
    rows = [{"question": f"q{i}", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "A"} for i in range(4)]
    folder = tmp_path / "data (mine)"
    (folder / name).mkdir(parents=True)
    for split in ("train", "test"):
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{folder / name / 'test.jsonl'}'}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: [A, B]\n"
        "doc_to_target: 0\n"
    )
    done = run(
        "-m",
        "policy=full,h2o",
        f"tasks=['{name}','{tmp_path / 'mine.yaml'}']",
        f"data.dir='{folder}'",
        "sweep_name=odd",
        "hydra/launcher=processes",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert {s.cell["task"] for s in load_sweep(tmp_path / "runs" / "odd")} == {name, "mine"}


def test_a_yaml_that_takes_another_tasks_name_is_refused(run, tmp_path):
    (tmp_path / "x.yaml").write_text("task: piqa\ndataset_path: json\nvalidation_split: validation\n")
    done = run("policy=full", f"tasks=[piqa,{tmp_path / 'x.yaml'}]", "data=bundle")
    assert done.returncode == 1
    assert "it is called piqa, as " in done.stderr
