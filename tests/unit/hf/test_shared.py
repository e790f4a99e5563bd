"""A cache that several users share, a home that cannot be written, files that cannot be read: the right one is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from a2sf import disk_cache
from a2sf.errors import ConfigError, UserError
from a2sf.hf.files import gguf
from a2sf.hf.loading import ModelSpec, fingerprint, load, prepare
from a2sf.sweep import runner as sweep
from a2sf.sweep.prepare import models
from tests.hub.build import write_model
from tests.strangers import another_user, shared_folder
from tests.unit.hf.test_loading import write_gguf
from tests.unit.sweep.test_config import _hydra, settings  # noqa: F401 (a fixture)
from tests.unit.sweep.test_sweep import cell, run, runner  # noqa: F401 (a fixture)


def spec(path: Path) -> ModelSpec:
    return ModelSpec(str(path), device="cpu", dtype="float32")


def a_model(folder: Path) -> Path:
    """One that everybody may read."""
    write_model(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


@pytest.fixture
def shared():
    with shared_folder() as folder:
        yield folder


@pytest.fixture
def model(shared, monkeypatch):
    file = write_gguf(shared / "model.gguf")
    monkeypatch.setenv("A2SF_CACHE", str(shared / "cache"))  # now: the tokenizer that it is made of is in the usual one
    return file


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_converted_weights_have_the_permissions_of_a_new_file(model, umask):
    before = os.umask(umask)
    try:
        folder = gguf.converted(model, "m")
    finally:
        os.umask(before)
    modes = {f.name: f.stat().st_mode & 0o777 for f in folder.iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~umask}


def test_what_one_user_converted_another_user_loads(model, shared):
    load(spec(model))
    with another_user():
        assert load(spec(model)).format == "gguf"
    assert not list((shared / "cache").rglob("*.tmp"))


def test_another_users_lock_does_not_stop_a_sweep(model, shared):
    folder = gguf.checkpoint_of(model)
    folder.parent.mkdir(parents=True)
    folder.parent.chmod(0o777)
    with FileLock(f"{folder}.lock"):  # held, and not to be written by others
        pass
    with another_user():
        assert gguf.converted(model, "m") == folder
    assert folder.is_dir()


def test_a_cache_that_cannot_be_written_is_named_with_what_to_set(model, shared):
    with another_user(), pytest.raises(UserError, match=f"{shared}/cache.*set A2SF_CACHE") as raised:
        load(spec(model))
    assert not isinstance(raised.value, ConfigError)  # the model is not at fault


def test_the_cache_need_not_be_writable_for_what_is_there(model, shared):
    load(spec(model))
    (Path(f"{gguf.checkpoint_of(model)}.lock")).unlink(missing_ok=True)
    with another_user():
        load(spec(model))


def test_a_digest_that_another_user_does_not_share_is_computed_again(model, shared):
    known = disk_cache.digest(model)
    (remembered,) = (shared / "cache" / "digests").iterdir()
    remembered.chmod(0o600)
    with another_user():
        assert disk_cache.digest(model) == known


def test_a_file_that_cannot_be_read_is_named_also_where_its_digest_is_remembered(shared):
    folder = a_model(shared / "m")
    fingerprint(spec(folder))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        mode = (folder / name).stat().st_mode
        (folder / name).chmod(0o600)
        with another_user(), pytest.raises(ConfigError, match=rf"{folder}/{name} cannot be read \(Permission denied\)"):
            fingerprint(spec(folder))
        (folder / name).chmod(mode)
    (folder / "model.safetensors").chmod(0o600)
    with another_user(), pytest.raises(ConfigError, match=r"model.safetensors cannot be read \(Permission denied\)"):
        prepare(spec(folder))  # it is complete, and need not be fetched again


def test_a_folder_that_cannot_be_looked_into_is_not_empty(shared):
    folder = a_model(shared / "m")
    folder.chmod(0o711)
    with another_user(), pytest.raises(ConfigError, match=rf"{folder} cannot be read \(Permission denied\)"):
        fingerprint(spec(folder))


def test_one_unreadable_model_in_a_grid_leaves_the_others(shared, capsys):
    good, bad = a_model(shared / "good"), shared / "bad"
    shutil.copytree(good, bad)
    (bad / "model.safetensors").chmod(0o600)
    grid = [settings("data=bundle", "tasks=[copa,piqa]", f"model.path={path}") for path in (good, bad)]
    with another_user():
        left, refused = models.readable(grid, Console())
        assert [len(s.cells) for s in left] == [2, 0]
        ((why, names),) = refused.items()
        assert f"{bad}/model.safetensors cannot be read" in why
        assert len(names) == 2
        assert "left out" in capsys.readouterr().out
        with pytest.raises(UserError, match="cannot be read"):
            models.readable(grid[1:], Console())


def test_a_folder_of_locks_that_another_user_owns_is_named(runner):  # noqa: F811
    with shared_folder() as runs:
        runner.directory = runs / "s"
        runner.directory.mkdir()
        runner.directory.chmod(0o777)
        (runs / ".locks").mkdir(mode=0o755)
        with another_user(), pytest.raises(sweep.DiskError, match=rf"{runs}/.locks/.* cannot be written \(Permission"):
            run(runner, cell())
