"""`a2sf pack` and `a2sf unpack`: a sweep as one file, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from a2sf.commands.arguments import Parser
from a2sf.errors import counted


def main_pack(arguments: Sequence[str]) -> None:
    """Write an archive of a sweep."""
    parser = Parser("a2sf pack", description="One archive of a sweep's results, which `a2sf tables` reads.")
    parser.add_argument("run", type=Path, help="a sweep's directory, such as runs/demo")
    parser.add_argument("archive", type=Path, nargs="?", help="the file (default: next to the directory)")
    parser.add_argument("--no-traces", action="store_true", help="leave out recorded evictions, which may be large")
    args = parser.parse_args(arguments)
    from a2sf.store.archive import pack

    written = pack(args.run, args.archive, traces=not args.no_traces)
    _print(f"Written: {written} ({written.stat().st_size / 2**10:.0f} KiB)")


def main_unpack(arguments: Sequence[str]) -> None:
    """Write an archive's cells to a sweep's directory."""
    parser = Parser("a2sf unpack", description="The cells of an archive, so that `a2sf run` can resume the sweep.")
    parser.add_argument("archive", type=Path, help="a file that a2sf pack wrote")
    parser.add_argument("run", type=Path, nargs="?", help="a sweep's directory (default: next to the archive)")
    args = parser.parse_args(arguments)
    from a2sf.store.archive import is_archive, place_of, unpack

    directory = args.run or place_of(args.archive)
    if not args.archive.exists():
        parser.error(f"there is no file {args.archive}")
    if not is_archive(args.archive):
        parser.error(f"{args.archive} is no archive that `a2sf pack` wrote")
    written = unpack(args.archive, directory)
    _print(f"{counted(len(written), 'cell')} written to {directory}; cells that existed there were not changed")


def _print(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
