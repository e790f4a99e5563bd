"""A slip on the command line is reported before a model library is loaded, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLIPS = {
    "tabels": "did you mean tables?",
    "tables": "the following arguments are required: runs",
    "tables --metrc acc": "unrecognized arguments",
    "pack": "the following arguments are required: run",
    "unpack": "the following arguments are required: archive",
    "check": "the following arguments are required: policy",
    "policies --x": "unrecognized arguments",
    "doctor --x": "unrecognized arguments",
    "layer-errors": "the following arguments are required: POLICY",
    "heads --x": "unrecognized arguments",
    "calibrate --x": "unrecognized arguments",
    "reproduce --x": "unrecognized arguments",
    "run polcy=h2o": "polcy is not a key of the configuration (did you mean policy?)",
    "run +polcy=h2o": "polcy is not a key of the configuration (did you mean policy?)",
    "run budget.ration=1": "budget.ration is not a key of the configuration (did you mean budget.ratio",
    "run policy=h3o": "(did you mean h2o?)",
    "run policy=h2o policy.heavy=3": "policy.heavy=3 is not allowed: h2o has recent_share",
    "run limit=some": "limit=some is not allowed: give a whole number, or null.",
    "run plan_only=maybe": "plan_only=maybe is not allowed: give true or false.",
    "run -m limit=0.5,1": "limit=0.5 is not allowed: give a whole number, or null.",
    "run -m policy=h2o,,": "there is an empty value beside a comma",
    "run policy=h2o,a2sf": "policy=h2o,a2sf is several values: give -m to run each value",
    "run limit=1,2": "limit=1,2 is several values: give -m to run each value",
    "run policy=3 data=bundle": "policy=3 is not allowed: give one of a2sf, ",
    "tables --margin abc": "argument --margin: invalid float value: 'abc'; see a2sf tables --help.",
    "run --foo": "a2sf run has no option --foo",
    "run limit": "limit is not an override",
    "run +sweep=dmo": "(did you mean demo?)",
    "run tracker=[wandb,x]": "tracker=x is not allowed",
    "run -m polcy=h2o policy=full,vatp": "polcy is not a key of the configuration",
    "run -m +polcy=h2o policy=full,vatp": "polcy is not a key of the configuration",
    "run -m policy=full,h3o": "(did you mean h2o?)",
    "run -m policy=full,mine:Own": "; a policy of your own needs a file policy/NAME.yaml in --config-dir (`a2sf new ",
}
EACH = """
import contextlib, io, sys
from a2sf import cli
for line in {lines!r}:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            cli.main(line.split())
        except SystemExit as end:
            assert end.code, line
    loaded = [m for m in ("torch", "transformers", "lm_eval", "matplotlib") if m in sys.modules]
    print(repr((line, said.getvalue(), loaded)))
    if loaded:
        break
"""


def test_slips_are_reported_at_once():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    done = subprocess.run(
        [sys.executable, "-c", EACH.format(lines=list(SLIPS))],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    answers = [eval(line) for line in done.stdout.splitlines()]
    for line, said, loaded in answers:
        assert SLIPS[line] in " ".join(said.split()), line
        assert "usage:" not in said, line
        assert "Traceback" not in said
        assert not loaded, f"{line} loads {loaded}"
    assert [line for line, _, _ in answers] == list(SLIPS)
