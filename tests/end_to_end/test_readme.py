"""What the README says: its example runs as it is printed, its keys and its map are those that are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from a2sf.experiments import schema

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ROWS = re.compile(r"^\| (`[^|]+) \|", re.MULTILINE)


def test_the_example_of_generation_runs_as_printed():
    code, printed = re.findall(
        r"```python\n(from a2sf import A2SF.*?)```\n```text\n(.*?)```", README.read_text(), re.DOTALL
    )[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, last = done.stdout.rstrip("\n").splitlines()
    assert "".join(text).strip()
    # the text may differ in its last words on another processor; what the cache holds does not
    assert re.fullmatch(r"\d+ tokens, 64 in each head's cache, 3\.6 MiB", last)
    assert printed.rstrip("\n").splitlines()[-1].split(" tokens")[1] == last.split(" tokens")[1]


def test_the_readme_and_the_schema_have_the_same_keys():
    """Each key of the configuration is a row (or part of one) of the README's table, and each there is a key."""
    table = README.read_text().partition("## Configuration\n")[2].partition("\n## ")[0]
    told = {k for row in ROWS.findall(table) for k in re.findall(r"`([a-z_.]+)`", row)}
    keys = {f"{group}.{key}" for group, cls in schema.groups().items() for key in vars(cls())}
    keys |= {key for key in vars(schema.Config()) if key not in ("budget", "until")}
    # chosen by the group's file
    assert told == keys - {"data.source", "tracker.kinds"}


def test_the_map_is_true():
    """Each folder at the top and each room is in the README's map, and nothing that is not there."""
    tree = README.read_text().partition("## Layout\n```\n")[2].partition("```")[0]
    top = {m[1] for m in re.finditer(r"^([a-z_0-9]+)/", tree, re.MULTILINE)}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert top | {"docs"} == {f.partition("/")[0] for f in tracked if "/" in f and not f.startswith(".")}
    rooms = set(re.findall(r"^(?:a2sf/)? +([a-z]+)/ ", tree, re.MULTILINE)) | {"commands"}
    assert rooms == {f.split("/")[1] for f in tracked if f.startswith("a2sf/") and f.count("/") > 1}
