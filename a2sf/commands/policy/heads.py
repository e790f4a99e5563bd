"""`a2sf heads`: find the heads that copy tokens from far back (retrieval heads), on the texts of the needle task.

The score of a head is the share of the needle's tokens to which it attends most when the model has to produce them. The
key/value heads with the highest scores are the setting of a policy: policy=heads policy.heads=FILE. As many heads drawn at
random are written to a second file, for comparison.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

from a2sf.app.process import quiet
from a2sf.commands.arguments import Parser
from a2sf.commands.policy.calibrate import FOLDER, add_model, file_of, model_spec
from a2sf.errors import ConfigError

LENGTHS = (100, 250, 500)


def main(arguments: Sequence[str]) -> None:
    """Measure, choose, and write the heads."""
    parser = Parser(prog="a2sf heads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--count", type=int, help="how many key/value heads to choose (default: a tenth)")
    parser.add_argument("--documents", type=int, default=30, help="how many texts are read")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), help="lengths of texts in words, in turns"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts and of the random heads")
    parser.add_argument("--out", type=Path, help=f"the file (default: {FOLDER}/MODEL-heads.json)")
    args = parser.parse_args(arguments)
    for key in ("documents", "count"):
        if (value := getattr(args, key)) is not None and value < 1:
            raise ConfigError(f"--{key}", value, "give a whole number, at least 1")
    if min(args.lengths) < 1:
        raise ConfigError("--lengths", min(args.lengths), "give whole numbers of words, at least 1")
    quiet()
    measure(args, Console(highlight=False))


def measure(args: argparse.Namespace, console: Console) -> None:
    """Load the model, measure, write and show the heads."""
    from a2sf import atomic
    from a2sf.calibration import retrieval
    from a2sf.hf import loading
    from a2sf.report.heads import heads_figure
    from a2sf.report.plots.style import save

    loaded = loading.load(model_spec(args))
    texts = retrieval.needles(loaded.tokenizer, args.documents, args.lengths, args.seed)
    found = retrieval.scores(loaded.model, track(texts, "texts", console=console, transient=True))
    layers, queries = found.shape
    kv_heads = loading.kv_heads_of(loaded.model.config) or queries
    of_kv = retrieval.of_kv_heads(found, kv_heads)
    count = args.count or max(1, of_kv.size // 10)
    chosen = retrieval.chosen_heads(of_kv, count)
    drawn = retrieval.random_heads(layers, kv_heads, count, args.seed)

    out = file_of(args, "heads.json")
    other = out.with_name(f"{out.stem}-random{out.suffix}")
    atomic.write(out, json.dumps(sorted(chosen)))
    atomic.write(other, json.dumps(drawn))
    scores = [{"layer": layer, "query_head": head, "score": score} for (layer, head), score in np.ndenumerate(found)]
    atomic.write(out.with_suffix(".csv"), pd.DataFrame(scores).to_csv(index=False, float_format="%.6f"))
    title = f"Retrieval score, {args.documents} needles; framed: the {count} key/value heads chosen"
    figure = heads_figure(
        found, title, "share of needle tokens copied", [(a, b) for a, b in chosen], queries // kv_heads
    )
    pictures = save(figure, out.with_suffix(""))
    console.print(
        f"{(found >= 0.1).sum()} of {found.size} query heads copy a tenth of the tokens or more; the best "
        f"{float(found.max()):.2f}, the median {float(np.median(found)):.3f}."
    )
    for layer, head in chosen[:10]:
        console.print(f"  layer {layer:2}, key/value head {head}: {of_kv[layer, head]:.2f}")
    console.print(f"{count} heads: {out}; at random: {other}; all scores: {out.with_suffix('.csv')}", soft_wrap=True)
    console.print(f"Pictures: {', '.join(map(str, pictures))}", soft_wrap=True)
    console.print(f"Score them with: a2sf run policy=heads policy.heads={out}", soft_wrap=True, markup=False)
