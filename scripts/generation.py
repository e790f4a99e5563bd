"""The table and the figure of docs/generation.md: `python scripts/generation.py run | figures`.

run        the preset `generation`, resumable, and its archive in runs/reference (hours on a CPU)
figures    table and figure from that archive (seconds)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from a2sf.analysis.comparisons.generated import text_frame
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.selection import Selection
from a2sf.errors import UserError
from a2sf.report.generated import generated_plots
from a2sf.report.output import replace_block
from a2sf.report.tables.generated import generated_tables
from a2sf.report.tables.layout import build_tables
from a2sf.report.tables.text import text_markdown
from a2sf.report.tables.write import markdown
from a2sf.store.archive import pack

PRESETS = ("generation", "generation_long")
METRICS = {"generation": "exact_match,remove_whitespace", "generation_long": "recall"}
STORE = Path("runs/reference")
FIGURES = Path("docs/figures/generation")
PAGE = Path("docs/generation.md")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "figures"))
    parser.add_argument("overrides", nargs="*", help="of the presets, such as limit=20")
    args = parser.parse_args(arguments)
    run(args.overrides) if args.what == "run" else figures()


def run(overrides: Sequence[str]) -> None:
    """Run the presets, and put their results into one archive each."""
    for preset in PRESETS:
        command = [sys.executable, "scripts/evaluate.py", f"+sweep={preset}", "runs_dir=runs", *overrides]
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)  # the command has said why
        pack(Path("runs") / preset, STORE / f"smollm2-135m-{preset}.a2sf.zip", traces=False)


def figures(store: Path = STORE, page: Path = PAGE, directory: Path = FIGURES) -> list[Path]:
    """Write table and figures from the archives; returns the files.

    Raises:
        UserError: if an archive is missing.
    """
    grids = []
    for preset in PRESETS:
        archive = store / f"smollm2-135m-{preset}.a2sf.zip"
        if not archive.exists():
            raise UserError(f"{archive} is missing; make it with: python scripts/generation.py run")
        grids.append(gather([archive], Selection(metric=METRICS[preset])))
    short, long = grids
    effects, texts = text_frame(short)
    drawn = generated_plots(effects, texts, directory)
    # six documents of a task, some of one text, are too few for differences of their texts
    replace_block(page, text_markdown(generated_tables(short, effects)) + "\n" + markdown(build_tables(long)))
    return [page, *drawn]


if __name__ == "__main__":
    main()
