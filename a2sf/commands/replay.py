"""`a2sf replay FILE`: score and generate with exactly the tokens that another engine retained.

FILE is a replay file (docs/replay.md), or the folder of a cell that was run with trace=N. Each text is read with the
recorded positions and with the full cache, and as many tokens are generated as it has. With --export a cell's traces are
written as a replay file, and nothing is computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from a2sf.analysis.results.labels import DASH
from a2sf.app.process import quiet
from a2sf.commands.arguments import Parser
from a2sf.commands.policy.calibrate import add_model, model_spec
from a2sf.errors import ConfigError, UserError
from a2sf.report.tables.screen import Blocks

if TYPE_CHECKING:
    from a2sf.engine.replay import Replay
    from a2sf.scoring.replay import Replayed

COLUMNS = {
    "task": "task",
    "document": "document",
    "prompt": "prompt",
    "text": "text",
    "retained": "retained",
    "loglikelihood": "log-lik.",
    "full": "full cache",
    "deviation": "deviation",
    "first_difference": "differs at",
}
LEADING = 2
"""Columns that say which text a row is of."""
LEGEND = (
    "prompt, text: tokens; retained: tokens cached at the end, mean over layers and KV heads. log-lik.: log-likelihood of "
    "the text per token (nats), with the recorded positions and with the full cache; deviation: largest difference of a "
    "token's log-likelihood from the file's; differs at: the first generated token that is not the text's, from 0."
)


def main(arguments: Sequence[str]) -> None:
    """Read, compute, show and write."""
    parser = Parser(prog="a2sf replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a replay file, or the folder of a cell with traces")
    add_model(parser)
    parser.set_defaults(model=None)
    parser.add_argument("--backend", default="auto", help="auto, torch or reference")
    parser.add_argument("--export", type=Path, metavar="JSON", help="only write the traces of a cell as a replay file")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write the table, with the generated texts")
    parser.add_argument(
        "--tolerance", type=float, metavar="NATS", help="fail if a token's log-likelihood deviates by more"
    )
    parser.add_argument("--same-text", action="store_true", help="fail if the generated tokens differ from the text's")
    args = parser.parse_args(arguments)
    quiet()

    from a2sf.engine import replay as files

    if args.tolerance is not None and not args.tolerance >= 0:
        raise ConfigError("--tolerance", args.tolerance, "give a number of nats, at least 0")
    given = _of_cell(args.file) if args.file.is_dir() else files.read(args.file)
    console = Console(highlight=False)
    if args.export is not None:
        if not args.file.is_dir():
            raise ConfigError(
                "--export", args.export, f"{args.file} is a replay file already; give the folder of a cell"
            )
        files.write(args.export, given)
        console.print(f"Written: {args.export} ({len(given.documents)} texts)", markup=False, soft_wrap=True)
        return
    done, decode = _computed(args, given, console)
    frame = frame_of(done)
    console.print(table_of(frame))
    if args.out is not None:
        frame["generated"] = [decode(list(r.generated)) for r in done]
        frame.to_csv(args.out, index=False)
        console.print(f"Written: {args.out}", markup=False, soft_wrap=True)
    _judge(args, done)


def _of_cell(folder: Path) -> Replay:
    """The traces of a cell as a replay file's content.

    Raises:
        UserError: if the folder is no cell, or has no traces.
    """
    from a2sf.engine.replay import of_traces
    from a2sf.engine.trace import load
    from a2sf.store.runs import is_cell, read_cell

    if not is_cell(folder):
        raise UserError(f"{folder} is no folder of a cell; give one under runs/SWEEP/, or a replay file")
    cell = read_cell(folder)
    file = cell.open_traces()
    if file is None:
        raise UserError(
            f"{folder} has no traces; run the cell with trace=N in another runs_dir, which records N documents"
        )
    about = cell.cell
    with file:
        return of_traces(
            load(file),
            task=about["task"],
            model=about["model_path"],
            weights=about["identity"]["weights"],
            system=f"a2sf: {about['name']}",
        )


def _computed(args: argparse.Namespace, given: Replay, console: Console) -> tuple[list[Replayed], Any]:
    """The results of each text, and a function that decodes tokens."""
    from a2sf.engine.kernels import check_backend
    from a2sf.hf import loading
    from a2sf.scoring.replay import Replayer, check_model

    check_backend(args.backend)
    requested = args.model
    if requested is None and given.model is None:
        raise UserError("the file names no model; give one with --model")
    args.model = requested or given.model
    spec = model_spec(args)
    if given.model is not None and not {_short(requested or given.model), _short(spec.path)} & {_short(given.model)}:
        raise ConfigError(
            "--model",
            requested,
            f"the file is of {given.model}; if that has the same weights, leave `model` out of the file",
        )
    weights = loading.fingerprint(spec)
    if given.weights is not None and given.weights != weights:
        raise ConfigError(
            "weights", given.weights, f"those of {spec.path} are {weights}, so the file was made with other weights"
        )
    loaded = loading.load(spec)
    check_model(given, loaded.model)
    replayer = Replayer(loaded.model, args.backend)
    done = [replayer.run(d) for d in track(given.documents, "texts", console=console, transient=True)]
    return done, loaded.tokenizer.decode


def _short(name: str) -> str:
    """The last part of a model's name or path, without its ending."""
    return Path(name).name.removesuffix(".gguf").casefold()


def frame_of(done: Sequence[Replayed]) -> pd.DataFrame:
    """One row per text."""
    rows = []
    for r in done:
        n = len(r.recorded.text)
        place = {"task": r.recorded.task, "document": r.recorded.document, "prompt": len(r.recorded.prompt), "text": n}
        means = {"retained": r.retained, "loglikelihood": sum(r.loglikelihoods) / n, "full": sum(r.full) / n}
        rows.append({**place, **means, "deviation": r.deviation, "first_difference": r.first_difference})
    frame = pd.DataFrame(rows)
    return frame.astype({"deviation": "float64", "first_difference": "Int64"})


def table_of(frame: pd.DataFrame) -> Blocks:
    """The same for a screen of any width."""
    rows = []
    decimals = {"retained": 1, "loglikelihood": 4, "full": 4, "deviation": 6}
    for row in frame.to_dict("records"):
        cells = [row[name] for name in COLUMNS]
        texts = [
            DASH if pd.isna(x) else f"{x:.{decimals[name]}f}" if name in decimals else escape(str(x))
            for name, x in zip(COLUMNS, cells, strict=True)
        ]
        rows.append(texts)
    title = f"{len(frame)} texts with recorded positions"
    return Blocks(title, tuple(COLUMNS.values()), LEADING, rows, escape(LEGEND))


def _judge(args: argparse.Namespace, done: Sequence[Replayed]) -> None:
    """Raise `UserError` if something deviates more than it may."""
    if args.tolerance is not None:
        if missing := [r for r in done if r.deviation is None]:
            raise ConfigError("--tolerance", args.tolerance, f"{len(missing)} texts of the file have no loglikelihoods")
        far = [r for r in done if r.deviation is not None and not r.deviation <= args.tolerance]
        if far:
            raise UserError(
                f"{len(far)} of {len(done)} texts deviate by more than {args.tolerance} nats from the file's "
                f"log-likelihoods, the first is document {far[0].recorded.document}"
            )
    other = [r for r in done if r.first_difference is not None]
    if args.same_text and other:
        raise UserError(
            f"{len(other)} of {len(done)} generated texts differ from the file's, the first is document "
            f"{other[0].recorded.document}, from its token {other[0].first_difference} on"
        )
