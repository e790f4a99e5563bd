"""Folders in which models and modules are looked for, besides what comes with the package."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import yaml
from omegaconf import DictConfig

from a2sf.shipped import shipped

_added: list[Path] = []


def adopt(hydra: DictConfig) -> None:
    """Look for models and modules also in the folders of Hydra's search path and in the current folder.

    Every worker calls this with the configuration that it gets.

    Args:
        hydra: the node `hydra` of a configuration.

    Raises:
        UserError: if a file in such a folder hides one of the package, or has text that YAML reads as a number.
    """
    from a2sf.sweep.config import folder as config_dir

    sources = [s for s in hydra.runtime.config_sources if s.schema in ("file", config_dir.SCHEME)]
    added = [Path(s.path) for s in sources if s.provider != "main"]
    for folder in added:
        config_dir.check(folder)
    if config_dir.used() is None:  # a worker
        config_dir.use(next((Path(s.path) for s in sources if s.schema == config_dir.SCHEME), None))
    _added[:] = added
    for place in map(str, [*added, hydra.runtime.cwd]):
        if place not in sys.path:
            sys.path.append(place)  # at the end, so that no file of the user hides a library's


def model_names() -> dict[str, str]:
    """Path -> name of the models under conf/model/ and in the user's folders, whose names win."""
    return {path: name for folder in [shipped("conf"), *reversed(_added)] for path, name in _names_in(folder / "model")}


@cache
def _names_in(folder: Path) -> list[tuple[str, str]]:
    known = {f.stem: yaml.safe_load(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.yaml"))}
    return [(model["path"], name) for name, model in known.items() if isinstance(model, dict) and model.get("path")]
