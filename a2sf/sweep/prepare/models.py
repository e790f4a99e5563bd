"""Before the first cell: each model at one commit for the whole sweep, checked and fetched once."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from a2sf.errors import UserError
from a2sf.hf.files.refusals import NotOnHub, Unreachable
from a2sf.hf.loading import Download, ModelSpec, adapter_of, fingerprint, left_alone, load_tokenizer, pin, prepare
from a2sf.store.names import Named, distinct
from a2sf.sweep.cell import Cell
from a2sf.sweep.config.settings import Settings, check_layers
from a2sf.sweep.prepare.bar import download_bar


def pin_all(settings: Sequence[Settings], known: Mapping[str, str], screen: Console) -> list[Settings]:
    """The same with each model at one commit, for every cell, load and worker.

    Args:
        known: path -> name of the models under conf/model/.
        screen: for what the user should know.

    Raises:
        UserError: if the hub has no such model, or (unless only a plan is asked for) there is no way to find out.
    """
    at = {c.model: c.model for s in settings for c in s.cells}
    for model in at:
        try:
            at[model], note = pin(model)
        except NotOnHub as error:
            raise NotOnHub(error.key, error.value, error.allowed + _nearest_models(model.path, known)) from error
        except Unreachable as error:
            if not settings[0].plan_only:
                raise
            note = f"{error} The names of its cells are provisional: they will hold the commit of {model.path}."
        if note:
            screen.print(note, highlight=False, soft_wrap=True)
    made = [replace(s, cells=tuple(replace(c, model=at[c.model]) for c in s.cells)) for s in settings]
    for cell in (s.cells[0] for s in made if s.cells):  # which share model, policy and budget
        if cell.model.source.kind == "hub" and cell.model.pinned:
            check_layers(cell.model, cell.policy, cell.budget)
    return made


def readable(settings: Sequence[Settings], screen: Console) -> tuple[list[Settings], dict[str, list[str]]]:
    """The same without the cells of local models whose files cannot be read, and why -> those cells, told at once.

    Raises:
        UserError: if no cell is left.
    """
    broken: dict[ModelSpec, str] = {}
    for model in dict.fromkeys(c.model for s in settings for c in s.cells):
        try:
            fingerprint(model)
            if model.added is not None:
                model.added.fingerprint()
        except UserError as error:
            if model.source.kind == "hub":  # which is asked later
                continue
            broken[model] = str(error)
    refused: dict[str, list[str]] = {}
    for cell in (c for s in settings for c in s.cells if c.model in broken):
        refused.setdefault(broken[cell.model], []).append(f"{cell.model_name}__{cell.task_name}")
    left = [replace(s, cells=tuple(c for c in s.cells if c.model not in broken)) for s in settings]
    if broken and not any(s.cells for s in left):
        raise UserError(next(iter(broken.values())))
    for told in refused:
        screen.print(f"[bold red]left out:[/bold red] {escape(told)}", highlight=False, soft_wrap=True)
    return left, refused


def tell_apart(settings: Sequence[Settings]) -> list[Settings]:
    """The same, with names for models that end alike."""
    weights = {c.model: fingerprint(c.model) for s in settings for c in s.cells}
    adapters = {m: adapter_of(m).get("adapter") for m in weights}

    def known(cell: Cell) -> Named:
        return Named.of(cell.model_name, cell.model.path, weights[cell.model], adapters[cell.model])

    names = distinct(known(c) for s in settings for c in s.cells)
    return [replace(s, cells=tuple(replace(c, model_name=names[known(c)]) for c in s.cells)) for s in settings]


def _nearest_models(path: str, known: Mapping[str, str]) -> str:
    """Which models of conf/model/ a path may have meant, as the end of a sentence."""
    names = {**known, **{name: name for name in known.values()}}
    close = difflib.get_close_matches(path, names, n=2, cutoff=0.5)
    meant = dict.fromkeys(f"model={names[c]}" for c in close)
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def fetch(models: Iterable[ModelSpec], screen: Console) -> dict[ModelSpec, UserError]:
    """Check and fetch each model once; those that cannot be had, told at once, so that the others' cells go on.

    Raises:
        UserError: if none of them can be had.
    """
    models = list(dict.fromkeys(models))
    broken: dict[ModelSpec, UserError] = {}
    downloads: list[Download] = []
    for model in models:
        try:
            downloads += prepare(model)
        except UserError as error:
            broken[model] = error
    for download in downloads:
        if download.spec in broken:
            continue
        try:
            _download(download, screen)
        except UserError as error:
            broken[download.spec] = error
    if broken and len(broken) == len(models):
        raise next(iter(broken.values()))
    for note in dict.fromkeys(filter(None, (left_alone(m) for m in models if m not in broken))):
        screen.print(note, highlight=False, markup=False, soft_wrap=True)
    for told in broken.values():
        screen.print(f"[bold red]left out:[/bold red] {escape(str(told))}", highlight=False, soft_wrap=True)
    return broken


def check_prompting(cells: Iterable[Cell], *, hub: bool) -> None:
    """Refuse a chat template, or a beginning-of-sequence token, that a tokenizer does not have, before the first cell.

    Args:
        hub: look at the models of the hub, once they are fetched, or at all others, before anything is.

    Raises:
        ConfigError: naming the templates there are.
    """
    asked = dict.fromkeys((c.model, c.prompting) for c in cells if c.prompting.chat_template or c.model.add_bos_token)
    tokenizers: dict[ModelSpec, object] = {}
    for model, prompting in asked:
        if (model.source.kind == "hub") is hub:
            if model not in tokenizers:
                tokenizers[model] = load_tokenizer(model)
            prompting.check(tokenizers[model], model.path)


def _download(download: Download, screen: Console) -> None:
    """Download what a model lacks, with a line that says what and how large, and a bar."""
    repository = download.snapshot
    screen.print(
        f"downloading {repository.wanted.repo} at commit {repository.wanted.revision[:12]}: "
        f"{decimal(download.size)} in {len(download.names)} files",
        highlight=False,
        soft_wrap=True,
    )
    before = repository.arrived()
    with download_bar(screen, repository.wanted.repo, download.size, lambda: repository.arrived() - before):
        _interruptible(download.run)


def _interruptible(run: Callable[[threading.Event], None]) -> None:
    """Run a download in a thread; Ctrl-C ends it with the piece that is arriving, not with the file."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, stop)
        try:
            running.result()
        except KeyboardInterrupt:
            stop.set()
            raise
