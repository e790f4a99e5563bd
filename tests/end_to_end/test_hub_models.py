"""Models of the hub, over loopback: right numbers of a known commit, no needless request, a message for each refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from a2sf.store.runs import load_sweep
from tests.hub import cases
from tests.hub.build import SMOLLM2, write_model
from tests.hub.server import Hub, Rule
from tests.hub.store import Store
from tests.started import called

pytestmark = pytest.mark.full

COPA = ["tasks=[copa]", "data=bundle", "limit=3", "model.device=cpu"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Small models: llama, another llama of the same shape, and an OPT as a pickle."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llama": write_model(root / "llama", tokens=1000),
        "other": write_model(root / "other", tokens=1000, seed=1),
        "opt": write_model(root / "opt", "opt", tokens=1000, weights="bin"),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory, checkpoints):
    """A hub, and the environment of a process with an empty cache that knows of it."""
    root = tmp_path_factory.mktemp("hub")
    with Hub(Store(root / "store")) as hub:
        hub.store.model("org/llama").commit_folder(checkpoints["llama"])
        hub.store.model("facebook/opt-2.7b").commit_folder(checkpoints["opt"])
        yield hub, {**os.environ, **hub.environment(root / "home"), "HF_HUB_ETAG_TIMEOUT": "3"}


@pytest.fixture
def ask(world):
    """Calls a function of `cases` in such a process, and gives what it gave and the requests that it made."""
    hub, environment = world
    hub.rules = []

    def call(function, *arguments, rules=(), **more):
        hub.rules = list(rules)
        hub.requests()
        given = called(function, *arguments, environment=environment, **more)
        return given, hub.requests()

    return call


def evaluate(ask, runs: Path, *arguments: str, rules=()) -> tuple[cases.Done, list[str]]:
    return ask(cases.evaluate, *arguments, *COPA, f"runs_dir={runs}", rules=rules)


def likelihoods(cell) -> list[list[float]]:
    return [list(x) for x in cell.documents["loglikelihoods"]]


def test_the_same_weights_give_the_same_numbers_from_the_hub(world, ask, tmp_path):
    """SmolLM2 as safetensors of the hub, over a line that breaks, and out of the package: to the bit."""
    from a2sf.hf.loading import ModelSpec, local_checkpoint

    hub, _ = world
    folder = local_checkpoint(ModelSpec(SMOLLM2))
    commit = hub.store.model("org/smol").commit_folder(folder)
    hub.store.digests(folder / "model.safetensors")  # now, since it takes longer than the hub may
    grid = ["-m", f"model.path=org/smol,{SMOLLM2}", "policy=full,h2o", "sweep_name=s"]
    broken = Rule("/files/", break_after=200 * 2**20, times=1)
    done, requests = evaluate(ask, tmp_path, *grid, rules=[broken])
    assert done.code == 0, done.err
    assert f"downloading org/smol at commit {commit[:12]}: 541.6 MB" in done.out
    cells = {(c.cell["model_path"], c.cell["policy"]): c for c in load_sweep(tmp_path / "s")}
    assert len(cells) == 4
    for policy in ("full", "h2o"):
        of_hub, of_package = cells["org/smol", policy], cells[SMOLLM2, policy]
        assert likelihoods(of_hub) == likelihoods(of_package)
        assert of_hub.cell["identity"]["weights"] == commit
        assert of_hub.result["provenance"]["weights_format"] == "safetensors"
        assert of_package.result["provenance"]["weights_format"] == "gguf"
    first, second = (line for line in requests if line.startswith("GET /files/"))
    assert "bytes=" not in first
    assert int(re.search(r"bytes=(\d+)-", second)[1]) > 100 * 2**20  # where the line broke, not from the start
    again, requests = evaluate(ask, tmp_path, *grid)
    assert "4 cells, 4 done, 0 to run" in again.out
    assert [r for r in requests if "/org/smol" in r] == requests[:1]  # which commit main is now


def test_a_chat_template_is_looked_for_once_the_tokenizer_is_here(ask, tmp_path):
    done, _ = evaluate(ask, tmp_path, "model.path=org/llama", "policy=full", "chat_template=true")
    assert done.code == 1
    assert done.err.strip() == (
        "chat_template=true is not allowed: the tokenizer of org/llama has no chat template; give false."
    )
    assert not list(tmp_path.glob("single/*__*"))


def test_an_opt_of_pickles_is_read_without_a_conversion_service(ask, tmp_path):
    answer, requests = ask(cases.load, "facebook/opt-2.7b")
    assert answer.startswith("ok")
    wanted = r"(GET /api/models/facebook/opt-2.7b/(revision|tree)/|(HEAD|GET) /facebook/opt-2.7b/resolve/|GET /files/)"
    assert all(re.match(wanted, line) for line in requests), requests  # and no other host
    # commit, files, config, weights, two of the tokenizer
    assert len([r for r in requests if r.startswith("GET")]) == 6
    done, _ = evaluate(ask, tmp_path, "model=opt-2.7b", "policy=full")
    assert done.code == 0, done.err
    (cell,) = load_sweep(tmp_path / "single")
    assert cell.cell["model"] == "opt-2.7b"
    assert cell.result["provenance"]["weights_format"] == "bin"


def test_other_spellings_are_the_same_cell(world, ask, tmp_path):
    hub, _ = world
    first, _ = evaluate(ask, tmp_path, "model.path=org/llama", "policy=full")
    assert "1 to run" in first.out, first.err
    for path in (
        "org/llama/",
        f"{hub.url}/org/llama",
        f"{hub.url}/org/llama/tree/main",
        "https://huggingface.co/org/llama/",
    ):
        again, _ = evaluate(ask, tmp_path, f"model.path={path}", "policy=full")
        assert "1 done, 0 to run" in again.out, (path, again)


def test_a_gguf_file_of_the_hub(world, ask, tmp_path, monkeypatch):
    from tests.unit.hf.test_loading import write_gguf

    hub, _ = world
    file = write_gguf(tmp_path / "small.gguf")
    commit = hub.store.model("org/gguf").commit({"sub/small.gguf": file, "small.gguf": file, "README.md": "x" * 9})
    answer, _ = ask(cases.load, "org/gguf/sub/small.gguf")
    assert answer == f"ok {commit} gguf"
    answer, _ = ask(cases.load, "org/gguf")
    assert "name one of them (small.gguf, sub/small.gguf)" in answer
    answer, _ = ask(cases.load, "org/gguf/large.gguf")
    assert "has no file of that name; it has small.gguf, sub/small.gguf" in answer


@pytest.fixture
def moving(world, checkpoints, tmp_path):
    """A branch that moves during a sweep: its repository, its first commit, its second, and the rule that moves it."""
    repository = world[0].store.model(f"org/{tmp_path.name}")
    first = repository.commit_folder(checkpoints["llama"])
    second = repository.commit_folder(checkpoints["other"], ref=None)
    moves = Rule(r"/resolve/.*/config\.json", times=1, then=lambda: repository.move("main", second))
    return repository, first, second, moves


def check_unmoved(done: cases.Done, runs: Path, moving) -> None:
    """All cells are of the first commit, under the planned names."""
    repository, first, second, _ = moving
    assert done.code == 0, (done.out, done.err)
    assert "2 cells in" in done.out
    cells = load_sweep(runs / "s")
    assert {c.cell["identity"]["weights"] for c in cells} == {first}
    assert all(c.path.name == c.cell["name"] for c in cells)
    assert repository.refs["main"] == second


def test_a_branch_that_moves_during_a_sweep_changes_nothing(ask, moving, tmp_path):
    repository, first, second, moves = moving
    grid = ["-m", f"model.path={repository.name}", "policy=full,h2o", "sweep_name=s"]
    done, _ = evaluate(ask, tmp_path, *grid, rules=[moves])
    check_unmoved(done, tmp_path, moving)
    again, _ = evaluate(ask, tmp_path, *grid)
    assert "2 cells, 0 done, 2 to run" in again.out  # main is another model now
    after = {c.cell["identity"]["weights"]: c for c in load_sweep(tmp_path / "s") if c.cell["policy"] == "full"}
    assert set(after) == {first, second}
    assert likelihoods(after[first]) != likelihoods(after[second])
    at_first, _ = evaluate(ask, tmp_path, *grid, f"model.revision={first}")
    assert "2 cells, 2 done, 0 to run" in at_first.out


def test_a_branch_that_moves_changes_nothing_in_workers(world, moving, tmp_path):
    hub, _ = world
    hub.rules = [moving[-1]]
    grid = ["-m", f"model.path={moving[0].name}", "policy=full,h2o", "sweep_name=s", *COPA, f"runs_dir={tmp_path}"]
    command = [sys.executable, str(cases.SCRIPTS / "evaluate.py"), *grid, "hydra/launcher=processes"]
    environment = {**os.environ, **hub.environment(tmp_path / "home")}  # of a process of their own, which they outlive
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    check_unmoved(cases.Done(ran.returncode, ran.stdout, ran.stderr), tmp_path, moving)


def test_a_model_that_cannot_be_loaded_is_reported_once_and_the_others_run(world, ask, checkpoints, tmp_path):
    hub, _ = world
    gated = hub.store.model("org/gated")
    gated.commit_folder(checkpoints["other"])
    gated.set(gated=True)
    lacks = hub.store.model("org/lacks")
    config = json.loads((checkpoints["llama"] / "config.json").read_text()) | {"num_hidden_layers": 5}
    files = {f.name: f for f in checkpoints["llama"].iterdir()} | {"config.json": json.dumps(config)}
    lacks.commit(files)  # type: ignore[arg-type]
    grid = ["-m", "model.path=org/gated,org/lacks,org/llama", "policy=full,h2o,window", "sweep_name=s"]
    done, requests = evaluate(ask, tmp_path, *grid)
    assert done.code == 1
    assert "left out: model.path=org/gated" in done.out
    assert "3 cells in" in done.out  # the table of those that could be had
    assert "6 of 9 cells failed" in done.out
    assert done.out.count("ask for access at") == 2  # at once and at the end
    assert done.out.count("which would be random") == 1
    assert {c.cell["model"] for c in load_sweep(tmp_path / "s")} == {"llama"}
    assert len(list((tmp_path / "s" / "failures").glob("*.json"))) == 6
    assert not [r for r in requests if "/org/gated/resolve/" in r and "model.safetensors" in r]
    alone, _ = evaluate(ask, tmp_path, "model.path=org/gated", "policy=full")
    assert (alone.code, len(alone.err.strip().splitlines())) == (1, 1)
    assert f"ask for access at {hub.url}/org/gated, then log in (`hf auth login`, or set HF_TOKEN)" in alone.err


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (Rule("/api/", status=401), r"asks who you are \(401\); log in"),
        (Rule("/api/", status=403), r"forbids it \(403\); check at http\S+/org/fresh"),
        (Rule("/files/", status=403), r"forbids it \(403\)"),
        (
            Rule("/api/", status=429, headers={"Retry-After": "7"}),
            r"too many requests from here \(429\); start again in 7 s",
        ),
        (Rule("/api/", status=500), r"a problem of its own \(500\); try again later"),
        (Rule("/api/", status=504), r"a problem of its own \(504\); try again later"),
        (Rule("/api/", status=403, code="GatedRepo"), "ask for access"),
        (Rule("/api/", status=404, code="RevisionNotFound"), r"model\.revision=main .* no such branch, tag or commit"),
        (
            Rule("/api/", status=401, code="RepoNotFound"),
            "not on this disk, and the hub .* no model of that name, or it is private",
        ),
        (
            Rule("/api/", stall=6),
            r"cannot be reached \(ReadTimeout.*check the network, take what is cached \(.*/.*data=bundle",
        ),
        (Rule("/files/", break_after=0), "the line to 127.0.0.1 broke .*complete files are not downloaded again"),
    ],
    ids=lambda x: f"{x.path}-{x.status or x.code or 'line'}" if isinstance(x, Rule) else "",
)
def test_each_refusal_has_its_own_sentence(checkpoints, world, ask, rule, why, request):
    hub, _ = world
    name = f"org/fresh-{abs(hash(request.node.name))}"  # nothing of it is in the cache
    hub.store.model(name).commit_folder(checkpoints["other"])
    answer, _ = ask(cases.load, name, rules=[rule])
    assert re.search(why, answer), answer
    assert len(answer.splitlines()) == 1
    answer, _ = ask(cases.load, name)
    assert answer.startswith("ok")  # once the fault is gone


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["model.path=facebook/opt-2.7"], r"no model of that name.*\(did you mean model=opt-2.7b"),
        (["model.path=opt-6.7b"], r"no model of that name.*\(did you mean model=opt-6.7b"),
        (["model.path=nobody/nothing", "plan_only=true"], "no model of that name"),
        (["model.path=org/llama", "model.revision=v9"], "model.revision=v9 .*no such branch, tag or commit"),
        (["model.path=a/b/c", "plan_only=true"], "no such directory"),
        (["model.path=./my-model", "plan_only=true"], "no such directory"),
        (["model.path=/data/models/llama", "plan_only=true"], "no such directory"),
        (["'model.path=my model'", "plan_only=true"], "no such directory"),
    ],
)
def test_a_path_that_names_nothing_is_one_sentence(ask, tmp_path, arguments, why):
    arguments = [a.strip("'") for a in arguments]
    done, _ = evaluate(ask, tmp_path, *arguments)
    assert done.code == 1
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert re.search(why, done.err), done.err


def test_a_broken_download_is_continued(world, ask, checkpoints):
    """The next start keeps the files that are complete. (That the library continues within a file: see the first test.)"""
    hub, _ = world
    commit = hub.store.model("org/breaks").commit_folder(checkpoints["other"])
    size = (checkpoints["other"] / "model.safetensors").stat().st_size
    answer, _ = ask(cases.load, "org/breaks", rules=[Rule("/files/", break_after=size // 2)])
    assert "broke" in answer
    answer, requests = ask(cases.load, "org/breaks")
    assert answer.startswith(f"ok {commit}")
    assert not [r for r in requests if r.startswith("GET") and "tokenizer.json" in r]


def test_a_download_that_is_interrupted_ends_within_a_file(world, ask, checkpoints):
    """Where the library alone would continue to its end."""
    hub, _ = world
    hub.store.model("org/stopped").commit_folder(checkpoints["other"])
    there, _ = ask(cases.interrupted, "org/stopped")
    assert "config.json" in there
    assert "model.safetensors" not in there
    answer, _ = ask(cases.load, "org/stopped")
    assert answer.startswith("ok")


def test_without_the_hub_the_cache_is_used_with_a_notice(world, ask, tmp_path):
    """Without the hub, cached models run, and one that is missing, completely or in part, gives a message."""
    hub, environment = world
    answer, _ = ask(cases.load, "org/llama")
    _, commit, _ = answer.split()
    partly = hub.store.model("org/part").commit_folder(hub.store.model("org/llama").path / commit)
    ask(cases.prepare, "org/part")  # its config only
    unreachable = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    first, second = tmp_path / "gone", tmp_path / "offline"
    for environment, runs, why in ((unreachable, first, "did not answer"), (offline, second, "HF_HUB_OFFLINE is set")):

        def run(*arguments: str) -> cases.Done:
            return called(cases.evaluate, *arguments, *COPA, f"runs_dir={runs}", environment=environment)  # noqa: B023

        done = run("model.path=org/llama", "policy=full")
        assert done.code == 0, done.err
        assert why in done.out
        assert f"what the cache has is used, commit {commit[:12]}" in done.out
        part = called(cases.load, "org/part", environment=environment)
        assert "holds only a part of org/part" in part
        assert partly not in part
        none = run("model.path=org/never")
        assert none.code == 1
        for text in (
            "not hold org/never, nor is there a folder",
            "take what is cached",
            "model=smollm2-135m data=bundle",
        ):
            assert text in none.err
        plan = run("model.path=org/never", "plan_only=true")
        assert plan.code == 0, plan.err
        assert "provisional" in plan.out
    assert [c.path.name for c in load_sweep(first / "single")] == [c.path.name for c in load_sweep(second / "single")]


def test_a_cache_that_cannot_be_written_is_reported(world, tmp_path):
    hub, _ = world
    (tmp_path / "file").touch()
    answer = called(cases.load, "org/llama", environment={**os.environ, **hub.environment(tmp_path / "file")})
    assert "cache folder cannot be written" in answer
    assert "HF_HOME" in answer
