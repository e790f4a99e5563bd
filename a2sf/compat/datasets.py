"""The cache and the built-in formats of the datasets library. Tried with datasets 5.2.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def disable_download_counts() -> None:
    """Do not call the host that counts downloads."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def is_packaged(path: str) -> bool:
    """Whether `path` is a format of the library, such as json, and not a repository."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return path in _PACKAGED_DATASETS_MODULES


def cached_folder(repo: str, name: str | None, commit: str) -> Path | None:
    """The cache folder of a configuration (None: any) of a hub dataset at a commit; None if there is not exactly one."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, slash, last = repo.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(last)}" if slash else camelcase_to_snakecase(last)
    found = [
        p
        for p in Path(datasets.config.HF_DATASETS_CACHE).expanduser().glob(f"{folder}/{name or '*'}/*/{commit}")
        if (p / "dataset_info.json").is_file()
    ]
    return found[0] if len(found) == 1 else None


def read_cached(repo: str, folder: Path) -> Any:
    """The splits of a hub dataset in a folder that `cached_folder` has found; the hub is not used."""
    from datasets.packaged_modules.cache.cache import Cache

    name, version, commit = folder.parts[-3:]
    last = repo.rpartition("/")[2]
    return Cache(dataset_name=last, repo_id=repo, config_name=name, version=version, hash=commit).as_dataset()
