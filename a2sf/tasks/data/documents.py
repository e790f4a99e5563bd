"""What identifies a task's documents, and how they are read.

Only the scored split and that of the examples are read. What identifies documents (`content`: a hub dataset's commit,
or a hash of the files) is found once, before a sweep is planned. Later loads must give exactly these documents, or
fail.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from a2sf.compat import datasets as compat
from a2sf.errors import ConfigError, UserError, first_line, nearest
from a2sf.hub.refusals import Unreachable, Wanted, chain, refusal
from a2sf.tasks.data import json_files
from a2sf.tasks.data.document_list import DocumentList
from a2sf.tasks.data.sources import FORMATS, Source

HUB_SECONDS = 30.0


def content_of_files(source: Source) -> str:
    """A hash of the files of the splits that are read."""
    parts = [f"{split} {f.suffix} {_digest(f)}" for split in source.needed for f in source.files[split]]
    for split in source.needed:
        if changed_in_a_table(source.task, tuple((f, _digest(f)) for f in source.files[split])):
            parts.append(f"{split} value for value")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@cache
def changed_in_a_table(task: str, files: tuple[tuple[Path, str], ...]) -> bool:
    """Whether these JSON files hold values that an earlier version, which read them into a table, changed."""
    paths = [file for file, _ in files]
    if paths[0].suffix not in json_files.SUFFIXES:
        return False
    documents = [d for file in paths for d in _json(file, task)]
    return not json_files.one_type_each(documents, listed=any(map(json_files.is_list, paths)))


def local_json(config: dict[str, Any], task: str) -> dict[str, DocumentList] | None:
    """The documents by split of a definition that names local JSON files; None for any other definition.

    Args:
        config: lm-eval's configuration of the task; if it gives the types of fields, the datasets library reads them.

    Raises:
        UserError: if a file cannot be read.
    """
    arguments = {k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k != "trust_remote_code"}
    if config.get("dataset_path") != "json" or set(arguments) - {"data_files", "data_dir", "field"}:
        return None
    import datasets

    found = datasets.load_dataset_builder("json", config.get("dataset_name"), **arguments).config.data_files or {}
    if any("://" in str(file) for files in found.values() for file in files):
        return None
    field = arguments.get("field")
    return {str(split): _rows([Path(str(f)) for f in files], task, field) for split, files in found.items()}


def _rows(files: list[Path], task: str, field: str | None = None) -> DocumentList:
    documents = DocumentList(d for file in files for d in _json(file, task, field))
    if not len(documents):
        raise UserError(f"tasks={task}: {files[0]} holds no document")
    return documents


def _json(file: Path, task: str, field: str | None = None) -> list[dict[str, Any]]:
    """The documents of one file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return json_files.read(file, field)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"tasks={task}: {file} cannot be read as json ({first_line(error)})") from error


def content_of_documents(*collections: Any) -> str:
    """A hash of documents after the task's processing."""
    digest = hashlib.sha256()
    for documents in collections:
        digest.update(b"\0")
        for document in documents:
            digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _digest(file: Path) -> str:
    try:
        stat = file.stat()
        # ctime, because a file may be replaced with its old mtime
        return _digest_of(file, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error


@cache
def _digest_of(file: Path, *stamp: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Commit:
    """A hub dataset's commit; if the hub did not answer, that of the cache, with the error."""

    hash: str
    refusal: Unreachable | None = None

    @property
    def message(self) -> str | None:
        """Why the commit is that of the cache; None: it is the hub's."""
        return None if self.refusal is None else _why(self.refusal)


def commit_of(repo: str, revision: str | None, task: str) -> Commit:
    """The present commit of a branch or tag; that of the cache if the hub does not answer.

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
        if now != cached:  # this stores it in the cache, for use without the hub
            now = resolve_revision(repo, repo_type="dataset", revision=revision).resolved
        return Commit(now)
    except Exception as error:  # `refusal` makes one sentence of any error
        refused = refusal(error, wanted)
        if isinstance(refused, Unreachable) and cached is not None:
            refused.__cause__ = error
            return Commit(cached, refused)
        raise refused from error


def _why(error: BaseException) -> str:
    from huggingface_hub import constants

    status = next((r.status_code for e in chain(error) if (r := getattr(e, "response", None)) is not None), None)
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"The hub answers {status}" if status else "The hub cannot be reached"


def cached_folder(source: Source, commit: str) -> Path | None:
    """The cache folder of the datasets library for this configuration and commit; None if it must be downloaded."""
    return None if source.arguments else compat.cached_folder(source.repo, source.name, commit)


def size_to_fetch(source: Source, commit: str) -> int:
    """Bytes of a hub dataset that must be downloaded; 0 if all is in the cache.

    Raises:
        UserError: if the hub does not provide them.
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
    except Exception as error:  # datasets passes on errors of many libraries; `_cannot` distinguishes them
        raise _cannot(error, source, commit) from error


def read(source: Source, content: str | None) -> Any:
    """The documents by split, exactly those that `content` identifies.

    Raises:
        UserError: if they cannot be read, or are not those that `content` identifies.
    """
    import datasets

    compat.disable_download_counts()
    if source.kind == "hub":
        commit = content or commit_of(source.repo, source.revision, source.task).hash
        return _with_splits(source, _read_hub(source, commit))
    same_files(source, content)
    made: dict[str, Any] = {}
    for split in source.needed or list(source.files):
        files = source.files[split]
        if files[0].suffix in json_files.SUFFIXES:
            made[split] = _rows(files, source.task)
            continue
        form = FORMATS[files[0].suffix[1:]]
        try:
            # a name that depends on the contents, because datasets' cache depends on a file's path and date
            name = "a2sf-" + hashlib.sha256(" ".join(map(_digest, files)).encode()).hexdigest()[:16]
            data_files = {"train": [str(f) for f in files]}
            made[split] = datasets.load_dataset(form, name=name, data_files=data_files, split="train")
        except Exception as error:  # of Arrow, pandas or the datasets library
            why = first_line(next(iter(reversed(list(chain(error))))))
            raise UserError(f"tasks={source.task}: {files[0]} cannot be read as {form} ({why})") from error
    same_files(source, content)
    return made


def _with_splits(source: Source, made: Any) -> Any:
    """Check that `made` has the splits that are read, and return it."""
    for split in source.needed:
        if split in made:
            continue
        has = f"{source.repo} has {', '.join(made)}{nearest(split, made)}"
        if split in source.requested:
            raise ConfigError("data.split" if split == source.scored else "data.fewshot_split", split, has)
        reads = "scores" if split == source.scored else "takes its examples from"
        key = "data.split" if split == source.scored else "data.fewshot_split"
        raise UserError(f"tasks={source.task} {reads} {split}, but {has}; give {key}")
    return made


def same_files(source: Source, content: str | None) -> None:
    """Refuse files that changed after `content` was found.

    Raises:
        UserError: if they did.
    """
    if content is not None and source.files and content_of_files(source) != content:
        raise UserError(
            f"tasks={source.task}: its documents in {source.label} changed after the sweep began; start it again"
        )


def _read_hub(source: Source, commit: str) -> Any:
    import datasets

    try:
        if (folder := cached_folder(source, commit)) is not None:
            return compat.read_cached(source.repo, folder)
        made = datasets.load_dataset(source.repo, source.name, revision=commit, **_arguments(source))
    except Exception as error:  # datasets passes on errors of many libraries; `_cannot` distinguishes them
        raise _cannot(error, source, commit) from error
    for split in made.values():
        # if the hub fails, datasets returns the newest dataset in its cache, of any commit
        for file in getattr(split, "cache_files", []):
            if commit not in Path(file["filename"]).parts:
                raise UserError(
                    f"tasks={source.task}: the hub did not give commit {commit[:12]} of {source.repo}, and the cache holds "
                    "only another one; try again when the hub answers"
                )
    return made


def _builder(source: Source, commit: str) -> Any:
    import datasets

    compat.disable_download_counts()
    not_for_builders = ("split", "streaming", "verification_mode", "keep_in_memory", "save_infos", "num_proc")
    arguments = {k: v for k, v in _arguments(source).items() if k not in not_for_builders}
    return datasets.load_dataset_builder(source.repo, source.name, revision=commit, **arguments)


def _arguments(source: Source) -> dict[str, Any]:
    """A task's arguments for the datasets library, with columns that YAML describes as `Features`."""
    import datasets

    columns = source.arguments.get("features")
    if not isinstance(columns, dict) or not all(
        isinstance(column, dict) and "dtype" in column for column in columns.values()
    ):
        return source.arguments
    values = {name: datasets.Value(column["dtype"]) for name, column in columns.items()}
    lists = {name for name, column in columns.items() if column.get("sequence")}
    features = datasets.Features({n: datasets.List(v) if n in lists else v for n, v in values.items()})
    return source.arguments | {"features": features}


def _cannot(error: Exception, source: Source, commit: str) -> UserError:
    """One sentence for a dataset that does not load. As datasets hides the hub's answer, the request is made again."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    text = first_line(error)
    if "scripts are no longer supported" in str(error):
        return UserError(
            f"tasks={source.task} cannot be loaded: {source.repo} is a script, which the datasets library no longer runs; "
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
        except Exception as answer:  # `refusal` makes one sentence of any error
            return refusal(answer, source.wanted)
    return UserError(f"tasks={source.task} cannot be loaded: {source.repo} on the hub does not provide them ({text})")
