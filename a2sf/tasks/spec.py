"""Which lm-eval tasks to run, on which documents, with which examples.

lm-eval's own task definitions are used as they are; but a document is never among its own examples, and where documents come
from, the scored split and that of the examples can be chosen.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2sf.errors import ConfigError, UserError, first_line, nearest
from a2sf.hf.files.refusals import Unreachable, chain
from a2sf.tasks import definitions
from a2sf.tasks import user_folder as own
from a2sf.tasks.data import documents
from a2sf.tasks.data.documents import Commit
from a2sf.tasks.data.sources import DataSpec, Source, locate
from a2sf.tasks.definitions import SUITES, Aggregate, Definition
from a2sf.tasks.examples import OwnDocuments, seeded
from a2sf.tasks.warned import silent

__all__ = [
    "SUITES",
    "DataSpec",
    "Settled",
    "aggregates",
    "arguments_of",
    "build",
    "check",
    "definition_of",
    "expand_suite",
    "generates",
    "hidden",
    "identity",
    "include",
    "known_content",
    "lengths",
    "makes_documents",
    "name_of",
    "provenance",
    "resolve",
    "shared_context",
    "version_of",
]

LENGTHS = ("lengths", "max_seq_lengths")
"""What tasks call the lengths of their prompts: ours, and lm-eval's RULER."""
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")


def expand_suite(tasks: Any) -> list[str]:
    """`tasks` as the user gives it (a suite's name, a task's name, or a list of names) as a list of names.

    Raises:
        ConfigError: if it is empty or holds something that is not a name.
    """
    names = list(tasks) if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
    if not names or any(not isinstance(n, str) or not n for n in names):
        raise ConfigError("tasks", tasks, f"give a list of lm-eval tasks, or a suite: {', '.join(SUITES)}")
    return list(dict.fromkeys(t for n in names for t in SUITES.get(n, (n,))))


def include(path: str | None) -> Path | None:
    """A folder of the user's own definitions, made known; None where there is none.

    Raises:
        ConfigError: if a definition in there cannot be used.
    """
    if path is None:
        return None
    folder = own.include(path)
    for name in SUITES:
        if name in own.entries(folder):
            raise ConfigError(
                own.KEY, path, f"a task in there is called {name}, which is a suite; give it another name"
            )
    return folder


def resolve(name: str, folder: Path | None = None) -> list[Definition]:
    """lm-eval's name of a task, tag or group, or the path of a YAML file -> its tasks, each with its settings.

    Args:
        folder: of the user's own definitions, as `include` gives it.

    Raises:
        ConfigError: if there is no such name, with the nearest ones, or lm-eval cannot load a member.
    """
    return definitions.resolve(name, folder)


def hidden(asked: Sequence[str], folder: Path) -> list[str]:
    """One sentence for each definition of the user's that is used in the place of lm-eval's of the same name."""
    found = {n: str(own.entries(folder)[n].yaml_path) for n in asked if definitions.hides(n, folder)}
    found |= {d.name: d.ref for n in asked for d in resolve(n, folder) if definitions.hides(d.name, folder)}
    return [
        f"{name}: the definition in {file} is used, and lm-eval's of that name is not." for name, file in found.items()
    ]


def aggregates(name: str, folder: Path | None = None) -> list[Aggregate]:
    """The scores that lm-eval makes of a group's tasks; none for anything but a group.

    Raises:
        ConfigError: as `resolve`.
    """
    return definitions.aggregates(name, folder)


@dataclass(frozen=True)
class Argument:
    """One of `task_args`, as it concerns one task.

    Attributes:
        key: as the user gave it, `task_args.<name>` or `task_args.<task>.<name>`.
        refusal: why the task has no use for it; None: it has.
    """

    key: str
    name: str
    value: Any
    refusal: str | None


def arguments_of(found: Definition, asked: str, given: Mapping[str, Any], names: set[str]) -> list[Argument]:
    """What of `task_args` is for one task.

    Args:
        asked: the name or group that the user asked for.
        given: arguments for all tasks, and under the name of a task or group those for it alone, which win.
        names: what counts as such a name.
    """
    of_tasks = {k for k, v in given.items() if k in names and isinstance(v, Mapping)}
    keyed = {str(k): (f"task_args.{k}", v) for k, v in given.items() if k not in of_tasks}
    for name in (n for n in dict.fromkeys((asked, found.entry.name, found.name)) if n in of_tasks):
        keyed |= {str(k): (f"task_args.{name}.{k}", v) for k, v in given[name].items()}
    known = found.arguments
    looks = f"the code of {found.name} looks for no such argument"
    return [
        Argument(
            full,
            name,
            value,
            None
            if name in known
            else looks + nearest(name, known)
            if known
            else f"{found.name} has no code that takes arguments",
        )
        for name, (full, value) in keyed.items()
    ]


def check(name: str, data: DataSpec, shots: int) -> None:
    """Refuse a task that cannot be run as asked, before anything is downloaded or loaded.

    Raises:
        ConfigError: if its data is not where it should be, or it asks a model for something else than these do.
    """
    found = definitions.definition(name)
    kind = found.config.get("output_type", "")
    if kind and kind not in OUTPUT_TYPES:
        raise ConfigError(
            "tasks",
            found.name,
            f"it needs {kind}, which is not available under pruning; give a log-likelihood or generation task",
        )
    if shots and (asked := lengths(name, data)) and asked[1]:
        raise ConfigError(
            "shots", shots, f"a prompt of {found.name} has the length that {asked[0]} says, with no room for examples"
        )
    locate(found, data, shots)


def name_of(ref: str) -> str:
    """What tables call a task: lm-eval's name, or that in the user's YAML file."""
    return definitions.definition(ref).name


def definition_of(ref: str) -> str | None:
    """What identifies a definition that is not lm-eval's own as it stands; None for one that is."""
    return definitions.definition(ref).digest()


def version_of(name: str) -> Any:
    """The version that lm-eval gives the task's definition; None if it gives none."""
    metadata = definitions.definition(name).config.get("metadata")
    return metadata.get("version") if isinstance(metadata, dict) else None


def generates(name: str) -> bool:
    """Whether the task's answers are generated text."""
    return bool(definitions.definition(name).config.get("output_type") == "generate_until")


def makes_documents(name: str) -> bool:
    """Whether the task makes its documents by a function, which may ask for the model's tokenizer."""
    return "custom_dataset" in definitions.definition(name).config


def lengths(name: str, data: DataSpec) -> tuple[str, list[int]] | None:
    """The lengths in tokens that documents are made to, and the key that says so; None where no lengths are asked for."""
    if not makes_documents(name):
        return None
    metadata = definitions.definition(name).config.get("metadata")
    told = (metadata if isinstance(metadata, dict) else {}) | data.arguments
    for key in LENGTHS:
        if key in told:
            given = told[key] if isinstance(told[key], list) else [told[key]]
            return f"task_args.{key}", [n for n in given if isinstance(n, int)]
    return None


def shared_context(name: str, data: DataSpec) -> str | None:
    """The field of a document that its prompt begins with and that other documents have, too; None: the task names none."""
    metadata = definitions.definition(name).config.get("metadata")
    told = (metadata if isinstance(metadata, dict) else {}) | data.arguments
    return told.get("shared_context")


@dataclass
class Settled:
    """Settles once what identifies the documents of a sweep's tasks: one answer of the hub per dataset.

    Attributes:
        notes: what the user should know, one sentence each.
    """

    notes: list[str] = field(default_factory=list)
    _commits: dict[tuple[str, str | None], Commit] = field(default_factory=dict)

    def data(self, name: str, data: DataSpec, shots: int) -> DataSpec:
        """`data` with its `content`: a hub dataset's commit, or a hash of the documents.

        Raises:
            UserError: if there are no such documents, or they cannot be reached.
        """
        if data.content is not None:
            return data
        source = locate(definitions.definition(name), data, shots)
        if source.kind == "files":
            content = documents.content_of_files(source)
        elif source.kind == "hub":
            key = (source.repo, source.revision)
            if key not in self._commits:
                self._commits[key] = documents.commit_of(source.repo, source.revision, source.task)
            commit = self._commits[key]
            there = bool(source.arguments) or documents.cached_folder(source, commit.hash) is not None
            if commit.refusal is not None and not there:
                raise Unreachable("tasks", source.task, commit.refusal.allowed) from commit.refusal
            if commit.told and (note := f"{commit.told}: cached documents are used.") not in self.notes:
                self.notes.append(note)
            content = commit.hash
        else:
            content = _content(build(name, data, shots=shots, seed=0))
        return dataclasses.replace(data, content=content)

    def fetch_size(self, name: str, data: DataSpec, shots: int) -> tuple[str, int]:
        """The dataset's name, and how many bytes have yet to come from the hub.

        Raises:
            UserError: if the hub does not give them.
        """
        source = locate(definitions.definition(name), data, shots)
        return source.repo, documents.size_to_fetch(source, data.content or "") if source.kind == "hub" else 0


def known_content(name: str, data: DataSpec, shots: int) -> str | None:
    """What identifies the documents as far as it is known without asking anybody or loading anything."""
    if data.content is not None:
        return data.content
    source = locate(definitions.definition(name), data, shots)
    return documents.content_of_files(source) if source.kind == "files" else None


def identity(name: str, data: DataSpec, shots: int) -> dict[str, Any]:
    """What a number owes to the task and its documents, as plain data: definition, contents, splits."""
    found = definitions.definition(name)
    digest = found.digest()
    read: dict[str, Any] = {"content": known_content(name, data, shots)}
    if data.root is None:  # a hash of files is of the splits that are read, a commit is of all
        source = locate(found, data, shots)
        read |= {"split": source.scored, "fewshot_split": source.examples}
    return {
        "task": found.name,
        "task_version": version_of(name),
        **({"definition": digest} if digest else {}),
        **({"task_args": data.arguments} if data.task_args else {}),
        "data": read,
    }


def build(name: str, data: DataSpec, *, shots: int, seed: int) -> Any:
    """The lm-eval task, its documents loaded, with `shots` examples for each.

    Raises:
        UserError: if the documents cannot be loaded, are not those that `data.content` identifies, or are too few.
    """
    check(name, data, shots)
    found = definitions.definition(name)
    source = locate(found, data, shots)
    try:
        with silent(), seeded():
            task = _task(found, source, data, shots, seed)
        definitions.unchanged(found)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"tasks={found.name}: {_why(error, source, data)}") from error
    if task.get_config("output_type") not in OUTPUT_TYPES:
        raise ConfigError(
            "tasks", found.name, f"it needs {task.get_config('output_type')}, which pruning does not offer"
        )
    task.set_config(key="task", value=found.name)
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    if shots:
        task.examples().check(task.eval_docs)
    if source.kind == "task" and data.content is not None and _content(task) != data.content:
        raise UserError(f"tasks={found.name}: its documents changed after the sweep began; start it again")
    task.content = data.content
    return task


def _task(found: Definition, source: Source, data: DataSpec, shots: int, seed: int) -> Any:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._factory import _ctor_accepts_config

    config = found.resolved()
    for key in ("tag", "group", "task_list", "group_alias", "task_alias"):
        config.pop(key, None)
    config |= {"task": found.name, "num_fewshot": shots}
    metadata = config.get("metadata")
    config["metadata"] = {**(metadata if isinstance(metadata, dict) else {"_metadata": metadata})}
    if "custom_dataset" in config:
        config["metadata"] |= {"tokenizer": data.tokenizer} if _takes_tokenizer(config["custom_dataset"]) else {}
    base = config.get("class", ConfigurableTask)
    if data.task_args:
        if not _ctor_accepts_config(base):
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
        (OwnDocuments, base),
        {"read_documents": reads, "shots": shots, "fewshot_seed": seed, "__module__": base.__module__},
    )
    return kind(config=config) if _ctor_accepts_config(base) else kind()


def _takes_tokenizer(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "tokenizer" or p.kind is p.VAR_KEYWORD for p in parameters)


def provenance(task: Any) -> dict[str, Any]:
    """Which documents a task scores: split, few-shot split, dataset and fingerprint."""
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


def _why(error: Exception, source: Source, data: DataSpec) -> str:
    """What went wrong between a dataset that was read and a task that is ready."""
    inner = list(chain(error))[-1]
    if isinstance(error, ImportError):
        return f"its code needs a library that is not installed ({first_line(inner)})"
    return f"its documents cannot be used from {data.label} ({type(inner).__name__}: {first_line(inner)})"
