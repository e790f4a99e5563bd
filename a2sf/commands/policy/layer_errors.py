"""`a2sf layer-errors POLICY ...`: the error of each policy in every layer's output, on plain text.

A policy is a name, with settings after commas: a2sf,forgetting_factor=0.4  calibrated,file=mine.yaml  mine:MyPolicy.
Each layer is measured alone, with the queries, keys and values of the full cache: the squared error of its output after the
projection, divided by the squared output. It takes about a minute and needs no task.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from a2sf.app.process import quiet
from a2sf.commands.arguments import Parser
from a2sf.commands.policy.calibrate import FOLDER, add_model, add_text, check_numbers, file_of, read_passages
from a2sf.errors import ConfigError


def main(arguments: Sequence[str]) -> None:
    """Measure, show and write the errors."""
    parser = Parser(prog="a2sf layer-errors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", metavar="POLICY")
    add_model(parser)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.2], metavar="RATIO", help="one or several")
    add_text(parser)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of text")
    parser.add_argument(
        "--skip", type=int, default=4096, help="tokens of text to skip first, because a2sf calibrate uses them"
    )
    parser.add_argument(
        "--out", type=Path, help=f"the CSV file, and a picture beside it (default: {FOLDER}/MODEL-errors.csv)"
    )
    args = parser.parse_args(arguments)
    check_numbers(args, ("tokens", "skip"))
    policies = {text: policy_of(text) for text in dict.fromkeys(args.policies)}
    quiet()
    measure(args, policies, Console(highlight=False))


def policy_of(text: str) -> Any:
    """The policy of a text `NAME,key=value,...`.

    Raises:
        ConfigError: if there is no such policy or setting, or the text has another form.
    """
    from a2sf.policies.find import make_policy

    name, *given = text.split(",")
    settings = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise ConfigError("POLICY", text, "give a name, and settings as key=value after commas")
        settings[key.strip()] = yaml.safe_load(value)
    return make_policy(name, **settings)


def measure(args: argparse.Namespace, policies: dict[str, Any], console: Console) -> None:
    """Load the model, measure, write and show the errors."""
    import pandas as pd

    from a2sf import atomic
    from a2sf.calibration.by_layer import check_policies, errors_by_layer
    from a2sf.hf import loading
    from a2sf.hf.layer_check import layers_of
    from a2sf.report.heads import errors_figure
    from a2sf.report.plots.style import save

    _, loaded, source, passages = read_passages(args, args.skip, args.tokens)
    cut = passages.held_out
    kv_heads = loading.kv_heads_of(loaded.model.config)
    check_policies(list(policies.values()), args.budget, layers_of(loaded.model), kv_heads)
    found = errors_by_layer(
        loaded.model,
        cut,
        list(policies.values()),
        args.budget,
        lambda items: track(items, "passages", console=console, transient=True),
    )
    frame = pd.DataFrame(
        [
            {"policy": text, "budget": ratio, "layer": layer, "error": found[p, r, layer]}
            for p, text in enumerate(policies)
            for r, ratio in enumerate(args.budget)
            for layer in range(found.shape[-1])
        ]
    )
    out = file_of(args, "errors.csv")
    atomic.write(out, frame.to_csv(index=False))
    table = Table("policy", *(f"{ratio:g}" for ratio in args.budget), title="Mean over layers", title_justify="left")
    for p, text in enumerate(policies):
        table.add_row(text, *(f"{found[p, r].mean():.4f}" for r in range(len(args.budget))))
    console.print(table)
    pictures = save(errors_figure(frame), out.with_suffix(""))
    console.print(f"{len(cut)} passages, {sum(map(len, cut))} tokens of {source.source}.", soft_wrap=True, markup=False)
    console.print(f"By layer: {', '.join(map(str, [out, *pictures]))}", soft_wrap=True, markup=False)
