"""A task of lm-eval with its documents and examples (`TaskSpec`).

Task definitions are lm-eval's. But a document is never one of its own examples, and the source of the documents, the scored
split and the split of the examples can be chosen.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from a2sf.errors import ConfigError, UserError, first_line
from a2sf.hub.refusals import Unreachable, chain
from a2sf.tasks import checks, definitions
from a2sf.tasks.data import documents
from a2sf.tasks.data.documents import Commit
from a2sf.tasks.data.sources import DataSpec, Source, locate
from a2sf.tasks.definitions import SUITES, Definition
from a2sf.tasks.examples import TaskMixin, seeded
from a2sf.tasks.files import user_folder
from a2sf.tasks.templates import fields_used
from a2sf.tasks.turns import check_task
from a2sf.tasks.warned import silent

LENGTHS = ("lengths", "max_seq_lengths")
"""Names of the argument for the lengths of prompts: in the tasks here, and in lm-eval's RULER."""
PACKAGED = ("json", "csv", "parquet", "arrow", "text")
"""What `dataset_path` holds if a task names files, not a data set of the hub."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")


def expand_suite(tasks: Any) -> list[str]:
    """The key `tasks` (a suite, a task, or a list of them) as a list of names.

    Raises:
        ConfigError: if it is empty or holds something that is not a name.
    """
    names = list(tasks) if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
    if not names or any(not isinstance(n, str) or not n for n in names):
        raise ConfigError("tasks", tasks, f"give a list of lm-eval tasks, or a suite: {', '.join(SUITES)}")
    return list(dict.fromkeys(t for n in names for t in SUITES.get(n, (n,))))


def include(path: str | None) -> Path | None:
    """Register the user's folder of definitions; None: there is none.

    Raises:
        ConfigError: if a definition in it cannot be used.
    """
    if path is None:
        return None
    folder = user_folder.include(path)
    for name in SUITES:
        if name in user_folder.entries(folder):
            raise ConfigError(
                user_folder.KEY, path, f"a task in it is called {name}, which is a suite; give it another name"
            )
    return folder


def hidden(names: Sequence[str], folder: Path) -> list[str]:
    """One sentence for each definition of the user that replaces lm-eval's definition of the same name."""
    found = {n: str(user_folder.entries(folder)[n].yaml_path) for n in names if definitions.hides(n, folder)}
    found |= {d.name: d.ref for n in names for d in definitions.resolve(n, folder) if definitions.hides(d.name, folder)}
    return [f"{name}: the definition in {file} is used instead of lm-eval's." for name, file in found.items()]


@dataclass(frozen=True)
class TaskSpec:
    """A task of a cell: its definition, its documents, and the number of examples.

    Attributes:
        ref: reference to the definition: lm-eval's name, `group::member`, or the path of a YAML file.
        data: source of the documents.
        shots: number of few-shot examples.
    """

    ref: str
    data: DataSpec = field(default_factory=DataSpec)
    shots: int = 0

    @cached_property
    def definition(self) -> Definition:
        """The definition in lm-eval or in the user's YAML file.

        Raises:
            ConfigError: if there is no such task.
        """
        return definitions.definition(self.ref)

    @property
    def name(self) -> str:
        """The task's name in tables: lm-eval's, or that in the user's YAML file."""
        return self.definition.name

    @property
    def generates(self) -> bool:
        """Whether the task's answers are generated texts."""
        return bool(self.definition.config.get("output_type") == "generate_until")

    @property
    def makes_documents(self) -> bool:
        """Whether a function of the task makes its documents; it may need the model's tokenizer."""
        return "custom_dataset" in self.definition.config

    @property
    def _metadata(self) -> dict[str, Any]:
        metadata = self.definition.config.get("metadata")
        return metadata if isinstance(metadata, dict) else {}

    @property
    def lengths(self) -> tuple[str, list[int]] | None:
        """The key for the lengths of documents, and the lengths in tokens; None: the task has no such key."""
        given = self._metadata | self.data.arguments if self.makes_documents else {}
        for key in LENGTHS:
            if key in given:
                values = given[key] if isinstance(given[key], list) else [given[key]]
                return f"task_args.{key}", [n for n in values if isinstance(n, int)]
        return None

    @property
    def shared_context(self) -> str | None:
        """The field with which a prompt begins and which several documents share; None: the task names no such field."""
        return (self._metadata | self.data.arguments).get("shared_context")

    @property
    def source(self) -> Source:
        """Where the documents are. Nothing is read or downloaded.

        Raises:
            ConfigError: if they are not there.
        """
        return locate(self.definition, self.data, self.shots)

    def check(self) -> None:
        """Refuse a task that cannot be run with these settings. Nothing is downloaded or loaded.

        Raises:
            ConfigError: if its documents are not there, it needs another kind of output, or has a metric that is none.
        """
        kind = self.definition.config.get("output_type", "")
        if kind and kind not in OUTPUT_TYPES:
            raise ConfigError(
                "tasks",
                self.name,
                f"it needs {kind}, which is not available under pruning; give a log-likelihood or generation task",
            )
        check_task(self.name, self.definition.config, self.shots)
        checks.check_metrics(self.name, self.definition.config)
        if self.shots and (given := self.lengths) and given[1]:
            raise ConfigError(
                "shots", self.shots, f"prompts of {self.name} have the lengths in {given[0]}, without room for examples"
            )
        self.source  # noqa: B018 (it checks the data)

    @property
    def known_content(self) -> str | None:
        """The hash or commit that identifies the documents; None if it takes the network or loading to find out."""
        if self.data.content is not None:
            return self.data.content
        source = self.source
        return documents.content_of_files(source) if source.kind == "files" else None

    @property
    def identity(self) -> dict[str, Any]:
        """Everything in the task and its documents that can change a number, as plain data."""
        digest = self.definition.digest()
        read: dict[str, Any] = {"content": self.known_content}
        if self.data.root is None:  # a commit covers all splits, a hash of files only those that are read
            source = self.source
            read |= {"split": source.scored, "fewshot_split": source.examples}
        return {
            "task": self.name,
            "task_version": self._metadata.get("version"),
            **({"definition": digest} if digest else {}),
            **({"task_args": self.data.arguments} if self.data.task_args else {}),
            "data": read,
        }

    def build(self, seed: int) -> Any:
        """The lm-eval task, with its documents loaded.

        Args:
            seed: of the examples.

        Raises:
            UserError: if the documents cannot be loaded, differ from those in `data.content`, or are too few.
        """
        self.check()
        found, source, data = self.definition, self.source, self.data
        try:
            with silent(), seeded():
                task = _task(found, source, data, self.shots, seed)
                definitions.unchanged(found)
                checks.check_made(task)
        except UserError:
            raise
        except Exception as error:  # a task's code may raise anything
            raise UserError(f"tasks={found.name}: {_why(error, found, source, data)}") from error
        if task.get_config("output_type") not in OUTPUT_TYPES:
            raise ConfigError(
                "tasks", found.name, f"it needs {task.get_config('output_type')}, which is not available under pruning"
            )
        task.set_config(key="task", value=found.name)
        task.set_config(key="num_fewshot", value=self.shots)
        task.set_fewshot_seed(seed=seed)
        if self.shots:
            task.examples().check(task.eval_docs)
        if source.kind == "task" and data.content is not None and _content(task) != data.content:
            raise UserError(f"tasks={found.name}: its documents changed after the sweep began; start it again")
        task.content = data.content
        return task

    @property
    def here(self) -> bool:
        """Whether the documents can be read without the hub, once `data.content` is known."""
        source = self.source
        return source.kind != "hub" or documents.cached_folder(source, self.data.content or "") is not None

    def bytes_to_fetch(self) -> int:
        """Bytes of the documents that must be downloaded from the hub.

        Raises:
            UserError: if the hub does not provide them.
        """
        source = self.source
        return documents.size_to_fetch(source, self.data.content or "") if source.kind == "hub" else 0


@dataclass
class ContentFinder:
    """Finds what identifies the documents of a sweep's tasks, with one request to the hub per dataset.

    Attributes:
        notes: what the user should know, one sentence each.
    """

    notes: list[str] = field(default_factory=list)
    _commits: dict[tuple[str, str | None], Commit] = field(default_factory=dict)

    def resolve(self, spec: TaskSpec) -> DataSpec:
        """The task's `data` with `content` set: the commit of a hub dataset, or a hash of the documents.

        Raises:
            UserError: if there are no such documents, or they are not available.
        """
        if spec.data.content is not None:
            return spec.data
        source = spec.source
        if source.kind == "files":
            content = documents.content_of_files(source)
        elif source.kind == "hub":
            key = (source.repo, source.revision)
            if key not in self._commits:
                self._commits[key] = documents.commit_of(source.repo, source.revision, source.task)
            commit = self._commits[key]
            available = bool(source.arguments) or documents.cached_folder(source, commit.hash) is not None
            if commit.refusal is not None and not available:
                raise Unreachable("tasks", source.task, commit.refusal.allowed) from commit.refusal
            if commit.message and (note := f"{commit.message}: cached documents are used.") not in self.notes:
                self.notes.append(note)
            content = commit.hash
        else:
            content = _content(spec.build(seed=0))
        return dataclasses.replace(spec.data, content=content)


def _task(found: Definition, source: Source, data: DataSpec, shots: int, seed: int) -> Any:
    from lm_eval.api.task import ConfigurableTask

    from a2sf.compat.lm_eval import accepts_config

    config = found.resolved()
    checks.check_registered(found.name, config)
    for key in ("tag", "group", "task_list", "group_alias", "task_alias"):
        config.pop(key, None)
    config |= {"task": found.name, "num_fewshot": shots}
    metadata = config.get("metadata")
    config["metadata"] = {**(metadata if isinstance(metadata, dict) else {"_metadata": metadata})}
    if "custom_dataset" in config:
        config["metadata"] |= {"tokenizer": data.tokenizer} if _takes_tokenizer(config["custom_dataset"]) else {}
    base = config.get("class", ConfigurableTask)
    if data.task_args:
        if not accepts_config(base):
            raise ConfigError("task_args", data.task_args, f"{found.name} is a class that takes no arguments")
        config["metadata"] |= data.arguments
    if base is ConfigurableTask:
        examples = dict(config.get("fewshot_config") or {})
        if source.examples is not None:
            examples |= {"split": source.examples, "samples": None}
        config |= {"fewshot_split": source.examples, "fewshot_config": examples or None}
        if source.scored is not None:  # lm-eval scores the test split if there is one, else the validation split
            if source.scored == config.get("validation_split") and source.scored != data.split:
                config["test_split"] = None
            elif source.scored != config.get("test_split"):
                config |= {"test_split": source.scored, "validation_split": None}
            if source.kind == "files":
                config["training_split"] = None if source.examples is None else config.get("training_split")
    reads: Any = None
    if source.kind != "task":
        reads = staticmethod(lambda: documents.read(source, data.content))
    elif base is ConfigurableTask and (local := documents.local_json(config, found.name)) is not None:
        reads = staticmethod(lambda: local)
    kind: Any = type(
        base.__name__,
        (TaskMixin, base),
        {"read_documents": reads, "shots": shots, "fewshot_seed": seed, "__module__": base.__module__},
    )
    return kind(config=config) if accepts_config(base) else kind()


def _takes_tokenizer(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "tokenizer" or p.kind is p.VAR_KEYWORD for p in parameters)


def provenance(task: Any) -> dict[str, Any]:
    """The documents that a task scores: split, few-shot split, dataset and fingerprint."""
    config = task.config
    split = config.test_split if task.has_test_docs() else config.validation_split
    return {
        "split": split,
        "fewshot_split": config.fewshot_config.split if config.num_fewshot else None,
        "dataset_path": config.dataset_path,
        "dataset_name": config.dataset_name,
        "content": task.content,
        "fingerprint": documents.content_of_documents(task.eval_docs),
        "task_version": (config.metadata or {}).get("version"),
    }


def _content(task: Any) -> str:
    return documents.content_of_documents(task.eval_docs, task.examples().pool if task.shots else ())


def _why(error: Exception, found: Definition, source: Source, data: DataSpec) -> str:
    """The reason why lm-eval could not make the task, as the end of a sentence.

    Raises:
        ConfigError: if `doc_to_choice` names no field of the documents.
    """
    inner = list(chain(error))[-1]
    if isinstance(error, ImportError):
        return f"its code needs a library that is not installed ({first_line(inner)})"
    config, splits = found.config, _splits(found, source, data)
    place = "its files" if config.get("dataset_path") in PACKAGED and source.kind == "task" else data.label
    missing = str(inner.args[0]) if isinstance(inner, KeyError) and inner.args else None
    if missing is not None and missing in (data.split, data.fewshot_split, *(config.get(k) for k in SPLITS)):
        has = f"; there are {', '.join(splits)}" if splits else ""
        return f"its documents cannot be used from {place}: they have no split {missing}{has}"
    detail = f"{type(inner).__name__}: {first_line(inner)}"
    first = next((document for split in splits.values() for document in split), None)
    if first is not None:
        if config.get("process_docs") is None and (mistake := checks.choices_without_field(config, first)) is not None:
            raise mistake from error
        detail = str(inner) if isinstance(inner, UndefinedError) else detail
        lacks = sorted(fields_used(config) - set(first))
        if lacks or isinstance(inner, UndefinedError):
            detail = f"its templates use {', '.join(lacks)}" if lacks else detail
            detail += f"; the fields of the first document: {', '.join(first) or 'none'}"
    return f"its documents cannot be used from {place} ({detail})"


def _splits(found: Definition, source: Source, data: DataSpec) -> dict[str, Any]:
    """The documents by split, where they lie on the disk as files that are quickly read; else empty."""
    if source.kind != "task":
        return dict(documents.read(source, data.content))
    try:
        return documents.local_json(found.config, found.name) or {}
    except Exception:  # they could not be read, which is the error that is being explained
        return {}
