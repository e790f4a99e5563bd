"""The README's example of a bounded cache, run as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


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
