"""The command line: what is run, what is said about a mistake, what the shell is offered."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import datasets
import pytest
import yaml
from hydra.errors import MissingConfigException

from a2sf import cli
from a2sf.app import grid, process
from a2sf.commands import compare, run, tables
from a2sf.commands import lm_eval as lm_eval_command
from a2sf.commands.policy import layer_errors
from a2sf.commands.policy.describe import attributes, idea_and_deviations, paper
from a2sf.errors import ConfigError, Notice, UserError
from a2sf.policies.base import WHEN
from a2sf.policies.find import built_in, defaults
from a2sf.policies.renamed import notice
from a2sf.shipped import shipped
from a2sf.store.archive import read_sweep
from a2sf.store.runs import load_sweep
from a2sf.sweep.config import folder as config_dir
from a2sf.sweep.config import schema
from baselines.by import By
from tests.sweep_fixture import Plan, write_sweep


@pytest.fixture(autouse=True)
def _process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a2sf"])
    monkeypatch.setattr("signal.signal", lambda *_: None)


@pytest.fixture
def hydra(monkeypatch):
    """What Hydra would read, instead of Hydra."""
    monkeypatch.setattr(run, "hydra_main", lambda: None)
    return lambda *arguments: run.main(arguments) or sys.argv[1:]


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.main(["tabels"])
    said = capsys.readouterr().err
    assert said.startswith("a2sf has no command tabels (did you mean tables?); it has run, tables,")
    assert len(said.splitlines()) == 1


def test_what_a_command_reads(monkeypatch):
    got = []
    monkeypatch.setattr(tables, "main", got.append)
    cli.main(["tables", "runs/x", "--stderr"])
    assert got == [["runs/x", "--stderr"]]
    assert sys.argv == ["a2sf tables", "runs/x", "--stderr"]


def test_every_command_finds_modules_of_the_current_folder(monkeypatch, tmp_path):
    """The installed script has its own folder in `sys.path`, and not the current one."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "main", lambda _: print(importlib.import_module("found_here").here))
    (tmp_path / "found_here.py").write_text("here = 1\n")
    cli.main(["tables"])
    assert sys.path[-1] == str(tmp_path)


def test_a_command_of_the_previous_version(monkeypatch, capsys):
    monkeypatch.setattr(layer_errors, "main", lambda arguments: print(arguments, sys.argv[0]))
    notice.cache_clear()
    cli.main(["errors", "h2o"])
    said = capsys.readouterr()
    assert said.out == "['h2o'] a2sf layer-errors\n"
    assert said.err == "a2sf errors is now called a2sf layer-errors; the old name works in this version only.\n"


def test_every_command_has_a_main():
    for place, summary in cli.COMMANDS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function or "main"))
        assert summary


def test_a_sweep_is_packed_and_unpacked(tmp_path, capsys):
    write_sweep(tmp_path / "s", Plan(documents={"piqa": 5}))
    cli.main(["pack", str(tmp_path / "s")])
    cli.main(["unpack", str(tmp_path / "s.a2sf.zip"), str(tmp_path / "again")])
    assert len(load_sweep(tmp_path / "again")) == len(load_sweep(tmp_path / "s"))
    assert len(read_sweep(str(tmp_path / "s"))) == len(read_sweep(str(tmp_path / "s.a2sf.zip"))) > 0
    with pytest.raises(SystemExit):
        cli.main(["pack", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        cli.main(["unpack", str(tmp_path / "s")])
    with pytest.raises(SystemExit):
        cli.main(["unpack", str(tmp_path / "none.a2sf.zip")])
    said = capsys.readouterr().err
    assert "nowhere is not a directory" in said
    assert "there is no file" in said
    assert "is no archive that `a2sf pack` wrote" in said


def test_the_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("layer or head (default: layer)", "(default: 4096)", "(default: 48 96 192 384)", "(default: 0)"):
        assert part in said
    assert "False" not in said
    assert "(default: )" not in said
    assert "None" not in said


def test_a_preset_is_a_grid(hydra):
    assert hydra("+sweep=demo") == ["--multirun", "+sweep=demo"]
    assert hydra("sweep=demo") == ["--multirun", "+sweep=demo"]
    assert hydra("-m", "+sweep=demo", "limit=3") == ["-m", "+sweep=demo", "limit=3"]
    assert hydra("+sweep=demo", "--cfg", "job") == ["--cfg", "job", "+sweep=demo"]  # shown, not run


def test_a_swept_key_in_a_presets_parameters_is_preset_overrides():
    """Hydra puts the preset's one value in: 0.3's file for every budget. What is not swept stays as it puts it in."""
    from omegaconf import OmegaConf

    from hydra_plugins.cell_sweeper import CellSweeper

    written = {"policy.file": "'${place}/a-${budget.ratio}.yaml'", "budget.ratio": "0.1,0.2", "limit": "${place}"}
    config = OmegaConf.create({"hydra": {"sweeper": {"params": written}}, "budget": {"ratio": 0.3}, "place": 7})
    sweeper = CellSweeper(max_batch_size=None, params=dict(config.hydra.sweeper.params))
    sweeper.config = config
    assert sweeper._preset_overrides([]) == [
        "policy.file='${place}/a-${budget.ratio}.yaml'",
        "budget.ratio=0.1,0.2",
        "limit=7",
    ]
    assert sweeper._preset_overrides(["+place=1,2"])[2] == "limit=${place}"


def test_options_among_overrides(hydra, tmp_path):
    (tmp_path / "a=b").mkdir()
    given = ["policy=h2o", "--config-dir", str(tmp_path / "a=b"), "limit=3", "-m", "~budget.base"]
    assert hydra(*given) == ["-m", "policy=h2o", "limit=3", "~budget.base"]
    assert config_dir.option() == ["--config-dir", str(tmp_path / "a=b")]  # which Hydra looks in as config_dir says
    assert hydra("limit=3", f"-cd={tmp_path}", "-p", "a") == ["-p", "a", "limit=3"]
    assert config_dir.option() == ["--config-dir", str(tmp_path)]
    with pytest.raises(UserError, match="--config-dir nowhere is not allowed: there is no such folder"):
        hydra("limit=3", "--config-dir=nowhere")
    hydra("limit=3")
    assert config_dir.option() == []


def test_two_things_at_once(hydra):
    with pytest.raises(UserError, match="--cfg shows one configuration and runs nothing, so it cannot go with -m"):
        hydra("-m", "policy=h2o,full", "--cfg", "job")


def test_every_key_and_choice_is_in_the_help():
    text = run.help_text([shipped("conf")])
    for name, group in {"": schema.Config, **schema.groups()}.items():
        about = attributes(group)
        for key in vars(group()):
            assert key in schema.RENAMED or about[key], key
            if key not in {**schema.groups(), **schema.RENAMED}:
                assert f"\n  {name + '.' if name else ''}{key} " in text
    for choice in (*built_in(), "smollm2-135m*", "+sweep=paper_small The grid of `paper`", "slurm_local"):
        assert choice in " ".join(text.split())


def test_what_the_policies_command_prints(capsys):
    from a2sf.commands.policy import listing

    listing.main([])
    said = capsys.readouterr().out
    assert said.count("\n    Schedules: ") == len(built_in())
    assert said.count("not causal") == 1 + said.count("Future (not causal)")
    assert "Schedules: all (step, every, prompt)" in said
    assert "Schedules: step; not causal: an oracle (upper bound)" in said


def test_the_docs_have_every_policy_with_its_settings_and_schedules():
    """Each row of the table in docs/policies.md, held to the class: name, label, settings with their defaults, schedules."""
    table = (Path(__file__).parents[2] / "docs/policies.md").read_text(encoding="utf-8")
    rows = {}
    for line in table.splitlines():
        if (found := re.match(r"\| `(\w+)`(?: \(([^)]*)\))? \|", line)) is not None:
            rows[found[1]] = (found[2], [c.strip() for c in line.strip("|").split("|")])
    assert set(rows) == set(built_in())
    assert len(rows) == 33
    for name, cls in built_in().items():
        label, (_, _, settings, schedules, _) = rows[name]
        assert label in (None, cls.label), name
        when = "all" if set(cls.schedules) == set(WHEN) else ", ".join(cls.schedules)
        assert schedules == ("those of `by`" if issubclass(cls, By) else when), name
        known = defaults(cls)
        listed = set(re.findall(r"`(\w+)`", settings))
        if (other := re.match(r"as `(\w+)`", settings)) is not None:
            listed = listed - {other[1]} | set(defaults(built_in()[other[1]]))
        assert listed == set(known), name
        for setting, value in re.findall(r"`(\w+)` (\d+(?:\.\d+)?)", settings):
            assert known[setting] == float(value), (name, setting)
        assert ("not causal" in rows[name][1][1]) == (not cls.causal), name


def test_every_policy_says_what_it_is():
    """From docstrings and fields: what `a2sf policies` prints is written nowhere else."""
    for cls in built_in().values():
        assert set(attributes(cls)) >= {f.name for f in dataclasses.fields(cls)}, cls
    assert paper(built_in()["h2o"]) == "Zhang et al., 2023 (arXiv 2306.14048)"  # of its module
    assert paper(built_in()["a2sf"]) == "Jo and Shin, 2024 (arXiv 2407.20485)"  # of the class
    assert (
        paper(built_in()["cam"]) == "Zhang et al., 2024 (Cache Merging, ICML 2024, openreview LCTmppB165)"
    )  # no arXiv
    assert paper(built_in()["heads"]).endswith("arXiv 2404.15574); Xiao et al., 2024 (DuoAttention, 2410.10819)")  # two
    assert paper(built_in()["random"]) == "none"


def test_idea_and_deviations_of_a_docstring():
    idea, deviations = idea_and_deviations(built_in()["h2o"])  # of its module
    assert idea.startswith("A few tokens, the heavy hitters, receive most of the attention.")
    assert deviations.startswith("The budget is divided after it is rounded")
    assert "2306.14048" not in idea + deviations
    idea, deviations = idea_and_deviations(built_in()["a2sf"])  # of the class
    assert idea.startswith("Old tokens have more accumulated attention")
    assert deviations.startswith("None.")
    assert "forgetting_factor" not in idea + deviations
    assert idea_and_deviations(built_in()["future"])[1] == ""


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("a2sf ", " ".join(cli.COMMANDS)),
        ("a2sf po", "policies"),
        ("a2sf tables r", ""),
    ],
)
def test_completion_of_commands(line, offered, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    run.complete(["query=bash"], list(cli.COMMANDS))
    assert capsys.readouterr().out.strip() == offered


@pytest.mark.parametrize("arguments", [[], ["install=tcsh"], ["remove=bash"], ["install"]])
def test_completion_of_no_shell(arguments):
    with pytest.raises(UserError, match="give -sc install=bash"):
        run.complete(arguments, [])


def test_output_that_nobody_reads(tmp_path):
    """`a2sf run --help | head -1` is no fault."""
    script = f"{sys.executable} -P -m a2sf.cli run --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.strip() in ("141", "0")  # 0 where all was written before the reader went


@pytest.mark.parametrize("launcher", ["processes", "slurm", "slurm_local", "ray_cluster"])
def test_a_launcher_that_is_not_installed(launcher):
    """Hydra names the plugin's own configuration, which a user has not heard of."""
    (plugin,) = yaml.safe_load((shipped("conf/hydra/launcher") / f"{launcher}.yaml").read_text())["defaults"]
    said = f"In 'hydra/launcher/{launcher}': Could not load 'hydra/launcher/{plugin}'."
    message = process.explain(MissingConfigException(said, missing_cfg_file=f"hydra/launcher/{plugin}", options=[]))
    extra = re.fullmatch(rf'hydra/launcher={launcher} is not installed: pip install "a2sf\[(\w+)\]"\.', message)
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert extra
    assert extra[1] in declared["optional-dependencies"]


def test_of_all_warnings_ours_are_printed(capsys):
    with warnings.catch_warnings():
        warnings.resetwarnings()
        process.quiet()
        for text in ("A kernel is slow.", "A kernel is slow.", "Another one."):
            warnings.warn(text, Notice, stacklevel=1)
        warnings.warn("a library's", UserWarning, stacklevel=1)
    assert capsys.readouterr().err.splitlines() == ["A kernel is slow.", "Another one."]


def interrupted(monkeypatch, capsys, kind, saves=None):
    """What a command says, and its exit code, when it is interrupted."""
    monkeypatch.setattr(process, "_saves_in", [])
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)

    def command() -> None:
        if saves is not None:
            process.saves_in(saves)
        raise kind

    with pytest.raises(SystemExit) as end:
        process.guard(command)
    out, said = capsys.readouterr()
    assert out == ""
    return said.strip(), end.value.code


def test_only_a_command_that_saves_its_work_says_so_when_it_is_interrupted(monkeypatch, capsys, tmp_path):
    assert interrupted(monkeypatch, capsys, KeyboardInterrupt) == ("Interrupted.", 130)
    said, code = interrupted(monkeypatch, capsys, process.Terminated, tmp_path)
    assert said == f"Interrupted. All finished work is saved in {tmp_path}; the same command resumes from there."
    assert code == 143
    said, _ = interrupted(monkeypatch, capsys, process.Terminated, tmp_path / "removed")
    assert said == f"Interrupted. {tmp_path / 'removed'} no longer exists, so its results are not saved."


def test_a_folder_of_results_that_cannot_be_made_names_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"runs_dir=.*file is not allowed: .*cannot be written \(.*\)"):
        grid.check_folder(str(tmp_path / "file"), tmp_path / "file" / "single")


def test_a_run_is_not_compared_with_itself(tmp_path):
    with pytest.raises(UserError, match="is given twice; give each run once"):
        compare.main([str(tmp_path), str(tmp_path / "." / "")])


def test_what_lm_eval_cannot_fetch_is_one_sentence(monkeypatch):
    """By the real error of datasets without a network; other errors pass."""
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: datasets.load_dataset("nobody/nothing"))
    monkeypatch.setattr("sys.argv", list(sys.argv))
    with pytest.raises(UserError, match=r"nobody/nothing cannot be fetched .*HF_HUB_OFFLINE is set.*--include_path"):
        lm_eval_command.main(["--tasks", "piqa"])

    def wrong() -> None:
        raise KeyError("tasks")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", wrong)
    with pytest.raises(KeyError):
        lm_eval_command.main([])
