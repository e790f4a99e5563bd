"""Generated texts: a cell of a group over lm-eval's model, and a small budget over the full cache."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lm_eval

from a2sf.bench import groups, harness
from a2sf.bench.groups import System
from a2sf.bench.measuring import SMOLLM2, Figures, alternately
from a2sf.hf.loading import load, tokenizer_folder
from a2sf.policies.a2sf import A2SF
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.scoring.lm import PrunedLM
from a2sf.sweep.group import Computed
from a2sf.tasks import spec as tasks
from a2sf.tasks.prompting import Prompting

TASKS = {"nq_open": 5, "long_single_generate": 0, "long_multikey_generate": 0}
"""Generating tasks of the group, and their shots."""
LENGTHS = {"long_single_generate": [1024], "long_multikey_generate": [1024]}
BUDGETS = (64, 256)
SLOTS = 128
BATCHES = (8, 16, 32, 64)
"""Batch sizes that are tried for lm-eval's model."""
TARGETS = {
    "lm_eval_full_over_group_cell_texts": "≥ 2.5",
    "full_over_a2sf_128_cell_long_texts": "≥ 1.5",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: numbers of documents and of new tokens."""
    parser.add_argument("--texts", type=int, default=40, help="documents of each task that generates text")
    parser.add_argument("--new-tokens", type=int, default=1024, help="tokens of the long texts")


def systems() -> list[System]:
    """The full cache, and six policies at two budgets."""
    named = ("window", "h2o", "mean_attention", "snapkv", "streaming")
    pruned: list[Policy] = [A2SF(), *(find_policy(n)() for n in named)]
    return [(find_policy("full")(), None), *((p, Budget(tokens=c)) for p in pruned for c in BUDGETS)]


def measure(figures: Figures, options: argparse.Namespace) -> None:
    """Add the ratios. Each takes minutes, so that figures are saved after each."""
    loaded = load(figures.model)
    lm = PrunedLM(loaded.model, tokenizer=loaded.tokenizer)
    of_group = systems()
    run(lm, of_group[:2], documents=2)  # warm
    sizes = {b: b for b in BATCHES if b <= max(BATCHES[0], options.texts)}
    theirs = harness.lm_eval_model(loaded, options.batch_size, sizes, evaluate)
    calls: dict[str, Callable[[], Any]] = {
        "lm_eval": partial(evaluate, theirs, options.texts),
        "full": partial(run, lm, of_group[:1], documents=options.texts),
        "group": partial(run, lm, of_group, documents=options.texts),
    }
    seconds, found = alternately(1, warm=False, **calls)  # takes minutes; warm already
    figures.ratios["lm_eval_full_over_group_cell_texts"] = seconds["lm_eval"] / (seconds["group"] / len(of_group))
    figures.ratios["lm_eval_full_over_ours_full_texts"] = seconds["lm_eval"] / seconds["full"]
    other = sum(a != b for a, b in zip(found["lm_eval"], texts_of(found["full"]), strict=True))
    figures.details["texts"] = {
        "seconds": seconds,
        "systems": len(of_group),
        "documents": options.texts,
        "lm_eval_batch_size": theirs.batch_size,
        "texts_that_differ": other,
    }
    figures.save()

    long = Prompting(gen_kwargs=json.dumps(_exactly(options.new_tokens)))
    some = min(options.texts, 32)
    calls = {
        name: partial(run, lm, [system], {"nq_open": 0}, some, long)
        for name, system in {"full": of_group[0], "a2sf": (A2SF(), Budget(tokens=SLOTS))}.items()
    }
    seconds, _ = alternately(1, warm=False, **calls)
    figures.ratios["full_over_a2sf_128_cell_long_texts"] = seconds["full"] / seconds["a2sf"]
    figures.details["long_texts"] = {"seconds": seconds, "documents": some, "new_tokens": options.new_tokens}
    figures.save()


def run(
    lm: PrunedLM,
    of_group: Sequence[System],
    of_tasks: dict[str, int] | None = None,
    documents: int = 40,
    prompting: Prompting | None = None,
) -> list[Computed]:
    """Compute one group of cells for each task, without storing results."""
    found = []
    for task, shots in (of_tasks or TASKS).items():
        data = tasks.ContentFinder().resolve(_spec(task, shots))
        about = {"shots": shots, "data": data, "prompting": prompting or Prompting()}
        found += groups.run(lm, of_group, [task], documents=documents, **about)
    return found


def texts_of(computed: Sequence[Computed]) -> list[str]:
    """The texts of cells, in the order of their documents."""
    return [t for c in computed if c.documents is not None for t in c.documents["generated"]]


def evaluate(lm: Any, documents: int) -> list[str]:
    """The texts that lm-eval's model generates for the same documents, in their order."""
    texts = []
    for task, shots in TASKS.items():
        built = _spec(task, shots).build(1234)
        with contextlib.redirect_stderr(io.StringIO()):
            found = lm_eval.evaluate(lm, task_dict={"tasks": {task: built}}, limit=documents, bootstrap_iters=0)
        samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
        texts += [s["resps"][0][0] for s in samples]
    return texts


def _spec(task: str, shots: int) -> tasks.TaskSpec:
    made = {}
    if task in LENGTHS:
        made = {"task_args": json.dumps({"lengths": LENGTHS[task]}), "tokenizer": str(tokenizer_folder(SMOLLM2))}
    return tasks.TaskSpec(task, tasks.DataSpec(source="bundle", **made), shots)


def _exactly(tokens: int) -> dict[str, Any]:
    """Settings with which each text has exactly so many tokens."""
    return {"max_gen_toks": tokens, "min_new_tokens": tokens, "until": ["\N{END OF TEXT}"], "do_sample": False}
