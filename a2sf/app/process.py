"""The process of a command: what libraries print, and a user's mistake as one sentence instead of a traceback."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from a2sf.errors import Notice, UserError, nearest
from a2sf.shipped import shipped
from a2sf.starting import importing, set_environment

screen = Console()


def guard(main: Callable[[], Any]) -> None:
    """Run a command; a user's mistake is one sentence on standard error and exit code 1, never a traceback."""
    set_environment()
    show_notices()
    # not by SIGINT, which a process that a script started in the background ignores
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # policy=3, for which Hydra raises a ValueError
            raise
        fail(_not_a_name(sys.argv[1:]))
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would report it again at exit
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename} cannot be read or written ({error.strerror}).")
    except KeyboardInterrupt as interrupt:
        _say(f"Interrupted.{_what_is_saved()}")
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


def _terminate(*_: object) -> None:
    raise Terminated


_saves_in: list[Path] = []


def saves_in(directory: Path) -> None:
    """From now on the command stores finished work in `directory`, and the same command resumes from it."""
    _saves_in[:] = [directory]


def _what_is_saved() -> str:
    """The end of a message, for a command that has begun to store its work; "" for others."""
    if not _saves_in:
        return ""
    if not _saves_in[0].is_dir():
        return f" {_saves_in[0]} no longer exists, so its results are not saved."
    return f" All finished work is saved in {_saves_in[0]}; the same command resumes from there."


def _not_a_name(arguments: Sequence[str]) -> str:
    """One sentence for a group that is set to something that is no name, such as a number."""
    from a2sf.policies.find import installed

    for argument in arguments:
        group, equals, value = argument.lstrip("+").partition("=")
        if not (equals and (shipped("conf") / group).is_dir()):
            continue
        for one in value.split(","):
            if isinstance(yaml.safe_load(one), int | float | bool):
                names = {f.stem for f in (shipped("conf") / group).glob("*.yaml")}
                if group == "policy":
                    names |= set(installed())
                return f"{group}={one} is not allowed: give one of {', '.join(sorted(names))}."
    return f"{' '.join(arguments)} is not allowed: a config group is set to one of its names."


def fail(sentence: str) -> None:
    """Print a sentence on standard error and exit with code 1."""
    _say(sentence if sentence.endswith((".", "!", "?", ":")) else f"{sentence}.")
    sys.exit(1)


def _say(sentence: str) -> None:
    Console(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)


def explain(error: Exception) -> str:
    """One sentence for an error that Hydra or OmegaConf raised about a command line or a file."""
    from a2sf.sweep.config.keys import explain as explain_key
    from a2sf.sweep.config.overrides import explain_override

    if isinstance(error, HydraException) and (message := explain_override(error)):
        return message
    if isinstance(error, MissingConfigException):
        if (launcher := re.match(r"In 'hydra/launcher/(\w+)'", str(error))) is not None:
            file = shipped("conf") / "hydra/launcher" / f"{launcher[1]}.yaml"
            # a comment in the file says how to install the launcher
            install = re.search(r"pip install \"a2sf\[\w+\]\"", file.read_text(encoding="utf-8"))
            return f"hydra/launcher={launcher[1]} is not installed: {install[0] if install else error}."
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        # Hydra does not list the options of tracker=[a,b]
        options = sorted(error.options or [f.stem for f in (shipped("conf") / group).glob("*.yaml") if group])
        if options:
            own = f"; a {group} of your own needs a file {group}/NAME.yaml in --config-dir" if ":" in value else ""
            own += " (`a2sf new policy NAME` writes one)" if own and group == "policy" else ""
            return f"{group}={value} is not allowed: give one of {', '.join(options)}{nearest(value, options)}{own}."
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    return explain_key(cause if isinstance(cause, OmegaConfBaseException) else error)


def quiet() -> None:
    """Import the large libraries and silence them; of all warnings only notices are printed from now on."""
    warnings.filterwarnings("ignore")
    show_notices()
    for name in ("lm_eval", "transformers", "datasets", "wandb", "httpx", "accelerate", "huggingface_hub", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _import_libraries()
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@cache
def _import_libraries() -> None:
    """Only once, because `importing` keeps every object that exists by then."""
    with importing():
        import datasets  # noqa: F401
        import transformers.modeling_utils  # noqa: F401

        from a2sf.sweep import runner  # noqa: F401
        from a2sf.sweep.config import settings  # noqa: F401


def show_notices() -> None:
    """Print each notice once, as a sentence."""
    warnings.filterwarnings("default", category=Notice)
    warnings.showwarning = _show


def _show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A warning without the line of code that raised it."""
    sys.stderr.write(f"{message}\n")
