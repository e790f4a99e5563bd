"""The rules of docs/rules.md and the README's own rule run as they are printed, and `a2sf check` finds nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from a2sf import attend
from a2sf.commands.policy import check as command
from a2sf.engine.invariants import INVARIANTS
from a2sf.errors import ConfigError
from a2sf.policies.base import Policy
from a2sf.policies.find import built_in, load

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
RULES = [c for c in CODE.findall((ROOT / "docs" / "rules.md").read_text()) if "(Policy)" in c]
OWN = [c for c in CODE.findall((ROOT / "README.md").read_text()) if "(Policy)" in c]


def test_the_examples_are_there_and_the_readmes_has_twenty_lines():
    assert len(RULES) == 3
    assert len(OWN) == 1
    assert len([line for line in OWN[0].splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("code", [*RULES, *OWN], ids=["data", "function", "merging", "readme"])
def test_an_example_is_a_policy_that_holds_the_invariants(code, tmp_path, monkeypatch, capsys):
    module = f"printed_{abs(hash(code))}"
    cls = re.findall(r"^class (\w+)\(Policy\)", code, re.MULTILINE)[0]
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    command.main([f"{module}:{cls}", "--trials", "1"])
    assert capsys.readouterr().out.count("holds") == len(INVARIANTS)
    # and it does something: not what a policy does that takes the same newest tokens alone
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 30, 8, generator=g) for h in (4, 2, 2))
    made = load(f"{module}:{cls}")()
    kept = [attend(p, q, k, v, budget=8)[1].positions for p in (made, built_in()["window"](), built_in()["h2o"]())]
    assert not any(torch.equal(kept[0], other) for other in kept[1:])


def test_the_sweep_of_methods_has_every_policy():
    params = yaml.safe_load((ROOT / "conf" / "sweep" / "methods.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert sorted(params["policy"].split(",")) == sorted(n for n, cls in built_in().items() if complete(n, cls))


def test_the_sweep_of_one_cut_has_every_policy_that_knows_it():
    params = yaml.safe_load((ROOT / "conf" / "sweep" / "methods_prompt.yaml").read_text())["hydra"]["sweeper"]["params"]
    known = (n for n, cls in built_in().items() if "prompt" in cls.schedules and complete(n, cls))
    assert sorted(params["policy"].split(",")) == sorted(known)


def complete(name: str, cls: type[Policy]) -> bool:
    """Whether a policy can be run as its configuration stands: not where a user has to give a file."""
    node = yaml.safe_load((ROOT / "conf" / "policy" / f"{name}.yaml").read_text())
    try:
        return bool(cls(**{k: v for k, v in node.items() if k != "_target_"}))
    except ConfigError:
        return False
