"""Adapters (LoRA and other weights that peft adds to a model), from a directory or the hub, where one is named."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from packaging.version import Version
from transformers import PreTrainedModel

from a2sf.compat.transformers import refused
from a2sf.disk_cache import digest
from a2sf.errors import ConfigError, first_line
from a2sf.hub import snapshot as hub
from a2sf.hub.refusals import Wanted

KEY = "model.adapter"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OLDEST = "0.20"
"""The oldest version of peft that transformers supports."""
NOWHERE: Mapping[str, Any] = {"adapter_kwargs": {"subfolder": ".no-adapter"}}
"""Settings of `from_pretrained` that name an empty folder, so that it does not add an adapter found beside a model."""


@dataclass(frozen=True)
class Adapter:
    """Which adapter.

    Attributes:
        path: an absolute directory, or `owner/name` on the hub.
        revision: branch, tag or commit on the hub; "" of a directory.
    """

    path: str
    revision: str = ""

    @property
    def value(self) -> str:
        """What `model.adapter` is set to for it: `path`, or `owner/name@revision`."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def pinned(self) -> bool:
        """Whether it cannot change: all but a branch or tag of the hub."""
        return not self.revision or hub.is_commit(self.revision)

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.path, revision=self.revision, key=KEY, value=self.value, revision_key=KEY)

    def pin(self) -> tuple[Adapter, str | None]:
        """The adapter at the commit that its revision is now, and a note for the user if only the cache was available.

        Raises:
            ConfigError: if there is no such adapter or revision, or no way to find out.
        """
        if self.pinned:
            return self, None
        commit, note = hub.commit_of(self.wanted)
        return replace(self, revision=commit), note

    @cached_property
    def snapshot(self) -> hub.Snapshot | None:
        """Its files on the hub; None for a directory."""
        return hub.Snapshot(self.pin()[0].wanted) if self.revision else None

    def names(self) -> tuple[str, str]:
        """Its configuration's and its weights' file.

        Raises:
            ConfigError: if it lacks one of them, or the hub has no such repository.
        """
        files = self.snapshot.sizes if self.snapshot else os.listdir(self.path)
        weights = next((n for n in WEIGHTS if n in files), None)
        if CONFIG not in files or weights is None:
            lacks = CONFIG if CONFIG not in files else " or ".join(WEIGHTS)
            refused = self.snapshot.refused if self.snapshot else None
            raise refused or ConfigError(KEY, self.value, f"it is no adapter that peft saved: it lacks {lacks}")
        return CONFIG, weights

    def folder(self) -> Path:
        """A local directory with its files, which are fetched if they are on the hub.

        Raises:
            ConfigError: as `names`; or if the hub does not give them.
        """
        return self.snapshot.get(self.names()) if self.snapshot else Path(self.path)

    def fingerprint(self) -> str | None:
        """A hash of the files that are read; of the hub's the commit, None for a branch or tag.

        Raises:
            ConfigError: if a file cannot be read.
        """
        if self.revision:
            return self.revision if self.pinned else None
        try:
            digests = [f"{n} {digest(Path(self.path) / n)}" for n in self.names()]
        except OSError as error:
            why = f"{error.filename or self.path} cannot be read ({error.strerror or first_line(error)})"
            raise ConfigError(KEY, self.value, why) from error
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]

    def add_to(self, model: PreTrainedModel) -> None:
        """Add it to a model, whose weights stay as they are.

        Raises:
            ConfigError: if it cannot be read, or is not for this model.
        """
        with refused(KEY, self.value, f"it cannot be added to {type(model).__name__}"):
            found = model.load_adapter(str(self.folder()), adapter_kwargs={"local_files_only": True})
        wrong = {
            "lacks": sorted(found.missing_keys),
            "has no place for": sorted(found.unexpected_keys),
            "has another shape of": sorted(key for key, *_ in found.mismatched_keys),
        }
        for how, keys in wrong.items():
            if keys:
                who = "it lacks" if how == "lacks" else f"the model {how}"
                why = f"{who} {len(keys)} of its parameters ({keys[0]} the first)"
                raise ConfigError(KEY, self.value, f"{why}; give the adapter's own base model as model.path")
        model.eval()


def understand(value: str) -> Adapter:
    """The adapter that `model.adapter` names, before anything is read.

    Raises:
        ConfigError: if it can name nothing, or peft is not installed.
    """
    text = str(value).strip()
    here = os.path.expanduser(text)
    if os.path.isdir(here):
        found = Adapter(os.path.abspath(here))
    else:
        repo, _, revision = text.partition("@")
        allowed = "give a directory that holds adapter_config.json, or a hub id (owner/name, owner/name@revision)"
        if repo.count("/") != 1:
            raise ConfigError(KEY, value, f"there is no such directory; {allowed}")
        with suppress(HFValidationError):
            validate_repo_id(repo)
            found = Adapter(repo, revision or "main")
            check_peft(value)
            return found
        raise ConfigError(KEY, value, f"there is no such directory, and the hub has no such names; {allowed}")
    check_peft(value)
    return found


def check_peft(value: str) -> None:
    """Refuse an adapter where peft is not installed, or too old.

    Raises:
        ConfigError: saying how to install it.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(KEY, value, 'peft, which adds it, is not installed; pip install "a2sf[adapter]"')
    if Version(version("peft")) < Version(OLDEST):
        why = f'peft {version("peft")} is too old, {OLDEST} is needed; pip install -U "a2sf[adapter]"'
        raise ConfigError(KEY, value, why)


def beside(folder: Path) -> str | None:
    """One sentence about an adapter that lies beside a model and is not used; None if there is none."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = content.get("peft_type") or "unknown kind"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        kind = "unknown kind"
    return f"An adapter ({kind}) lies beside the model in {folder} and is not used; model.adapter={folder} adds it."
