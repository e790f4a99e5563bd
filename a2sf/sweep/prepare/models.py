"""The models of a sweep: each is pinned to one commit, checked and downloaded once, before the first cell."""

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
from a2sf.hf.loading import Download, ModelSpec, adapter_of, fingerprint, left_alone, load_tokenizer, pin, prepare
from a2sf.hub.refusals import NotOnHub, Unreachable
from a2sf.scoring.generation.thinking import Thinking
from a2sf.store.names import Named, distinct
from a2sf.sweep.cell import Cell
from a2sf.sweep.config.settings import Settings
from a2sf.sweep.config.system import check_layers
from a2sf.sweep.prepare.bar import download_bar


def pin_all(settings: Sequence[Settings], known: Mapping[str, str], screen: Console) -> list[Settings]:
    """The settings with each model pinned to one commit, which all cells and workers use.

    Args:
        known: path -> name of the models under conf/model/.
        screen: where notes are printed.

    Raises:
        UserError: if the hub has no such model, or it does not answer and more than a plan is requested.
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
    for cell in (s.cells[0] for s in made if s.cells):  # the cells of a point share model, policy and budget
        if cell.model.source.kind == "hub" and cell.model.pinned:
            check_layers(cell.model, cell.policy, cell.budget)
    return made


def readable(settings: Sequence[Settings], screen: Console) -> tuple[list[Settings], dict[str, list[str]]]:
    """Leave out the cells of local models whose files cannot be read, and print why.

    Returns:
        The settings with the remaining cells; and why cells were left out -> those cells.

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
            if model.source.kind == "hub":  # `fetch` checks it
                continue
            broken[model] = str(error)
    refused: dict[str, list[str]] = {}
    for cell in (c for s in settings for c in s.cells if c.model in broken):
        refused.setdefault(broken[cell.model], []).append(f"{cell.model_name}__{cell.task_name}")
    left = [replace(s, cells=tuple(c for c in s.cells if c.model not in broken)) for s in settings]
    if broken and not any(s.cells for s in left):
        raise UserError(next(iter(broken.values())))
    for why in refused:
        screen.print(f"[bold red]left out:[/bold red] {escape(why)}", highlight=False, soft_wrap=True)
    return left, refused


def distinguish(settings: Sequence[Settings]) -> list[Settings]:
    """The settings with a different name for each model, also where the paths of two models end with the same name."""
    weights = {c.model: fingerprint(c.model) for s in settings for c in s.cells}
    adapters = {m: adapter_of(m).get("adapter") for m in weights}

    def known(cell: Cell) -> Named:
        return Named.of(cell.model_name, cell.model.path, weights[cell.model], adapters[cell.model])

    names = distinct(known(c) for s in settings for c in s.cells)
    return [replace(s, cells=tuple(replace(c, model_name=names[known(c)]) for c in s.cells)) for s in settings]


def _nearest_models(path: str, known: Mapping[str, str]) -> str:
    """The models of conf/model/ that the user may have meant by a path, as the end of a sentence."""
    names = {**known, **{name: name for name in known.values()}}
    close = difflib.get_close_matches(path, names, n=2, cutoff=0.5)
    meant = dict.fromkeys(f"model={names[c]}" for c in close)
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def fetch(models: Iterable[ModelSpec], screen: Console) -> dict[ModelSpec, UserError]:
    """Check and download each model once; print which are not available. The cells of the other models run.

    Returns:
        Model -> error, for the models that are not available.

    Raises:
        UserError: if no model is available.
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
    for why in map(str, broken.values()):
        screen.print(f"[bold red]left out:[/bold red] {escape(why)}", highlight=False, soft_wrap=True)
    return broken


def check_prompting(cells: Iterable[Cell], *, hub: bool) -> None:
    """Refuse a chat template, or a token that begins texts or ends thinking, that a tokenizer lacks, before the first cell.

    Args:
        hub: True: check the models of the hub, which must be downloaded; False: check all others.

    Raises:
        ConfigError: naming the templates that the tokenizer has.
    """
    prompted = dict.fromkeys(
        (c.model, c.prompting)
        for c in cells
        if c.prompting.chat_template or c.prompting.think_end_token or c.model.add_bos_token
    )
    tokenizers: dict[ModelSpec, object] = {}
    for model, prompting in prompted:
        if (model.source.kind == "hub") is hub:
            if model not in tokenizers:
                tokenizers[model] = load_tokenizer(model)
            prompting.check(tokenizers[model], model.path)
            Thinking.of(prompting.think_end_token, tokenizers[model], prompting.enable_thinking)


def _download(download: Download, screen: Console) -> None:
    """Download a model's missing files; print their size, and show a bar."""
    wanted = download.snapshot.wanted
    screen.print(
        f"downloading {wanted.repo} at commit {wanted.revision[:12]}: "
        f"{decimal(download.size)} in {len(download.names)} files",
        highlight=False,
        soft_wrap=True,
    )
    with download_bar(screen, wanted, download.size):
        _interruptible(download.run)


def _interruptible(run: Callable[[threading.Event], None]) -> None:
    """Run a download in a thread, so that Ctrl-C stops it within a file."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, stop)
        try:
            running.result()
        except KeyboardInterrupt:
            stop.set()
            raise
