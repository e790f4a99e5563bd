"""What the README says: its example of generation runs as printed; and the map of the code is true."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.started import started

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.mark.full
def test_the_example_of_generation_runs_as_printed(tmp_path):
    code, printed = re.findall(
        r"```python\n(from a2sf import A2SF.*?)```\n```text\n(.*?)```", README.read_text(), re.DOTALL
    )[0]
    (tmp_path / "example.py").write_text(code)
    done = started(tmp_path / "example.py", environment=dict(os.environ), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.rstrip("\n").splitlines()
    assert "".join(text).strip()
    # the text may differ in its last words on another processor; what the cache holds does not
    assert re.fullmatch(r"\d+ tokens, 64 in each head's cache, 3\.6 MiB", last)
    assert printed.rstrip("\n").splitlines()[-1].split(" tokens")[1] == last.split(" tokens")[1]


def test_the_map_is_true():
    """Each folder at the top and each package is in the map of docs/architecture.md, and nothing that is not there."""
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("```\n")[2].partition("```")[0]
    top = {m[1] for m in re.finditer(r"^([a-z_0-9]+)/", tree, re.MULTILINE)}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert top | {"docs"} == {f.partition("/")[0] for f in tracked if "/" in f and not f.startswith(".")}
    packages = set(re.findall(r"^(?:a2sf/)? +([a-z]+)/ ", tree, re.MULTILINE)) | {"commands"}
    assert packages == {f.split("/")[1] for f in tracked if f.startswith("a2sf/") and f.count("/") > 1}
