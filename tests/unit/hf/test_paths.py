"""What model.path may be: one spelling for each thing, and one sentence for what can name nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from a2sf.errors import ConfigError
from a2sf.hf.files.paths import understand
from a2sf.hf.loading import ModelSpec


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home that is also where we are, with a directory, a directory with a space and two files."""
    for folder in ("my-model", "my model", "owner/local"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("q4.gguf", "notes.txt"):
        (tmp_path / file).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "kind", "inside"),
    [
        ("my-model", "directory", "my-model"),
        ("my-model/", "directory", "my-model"),
        ("./my-model", "directory", "my-model"),
        ("~/my-model//", "directory", "my-model"),
        ("{home}/my-model", "directory", "my-model"),
        ("my model", "directory", "my model"),
        (" my-model ", "directory", "my-model"),
        ("owner/local", "directory", "owner/local"),
        ("owner/../my-model", "directory", "my-model"),
        ("q4.gguf", "file", "q4.gguf"),
        ("~/q4.gguf", "file", "q4.gguf"),
    ],
)
def test_a_local_path_has_one_spelling(home, path, kind, inside):
    found = understand(path.format(home=home))
    assert (found.kind, found.path) == (kind, str(home / inside))
    assert understand(found.path) == found


@pytest.mark.parametrize(
    ("path", "revision", "repo", "file", "at"),
    [
        ("org/repo", "main", "org/repo", "", "main"),
        ("org/repo/", "v1", "org/repo", "", "v1"),
        ("gpt2", "main", "gpt2", "", "main"),
        ("org/repo/q4.gguf", "main", "org/repo", "q4.gguf", "main"),
        ("org/repo/sub/Q4.GGUF", "main", "org/repo", "sub/Q4.GGUF", "main"),
        ("https://huggingface.co/org/repo", "main", "org/repo", "", "main"),
        ("https://huggingface.co/org/repo/", "v1", "org/repo", "", "v1"),
        ("https://huggingface.co/org/repo?library=transformers#use", "main", "org/repo", "", "main"),
        ("http://hf.co/org/repo/tree/v1", "main", "org/repo", "", "v1"),
        ("https://huggingface.co/org/repo/tree/refs%2Fpr%2F3", "main", "org/repo", "", "refs/pr/3"),
        ("https://huggingface.co/org/repo/blob/v1/q4.gguf?download=true", "main", "org/repo", "q4.gguf", "v1"),
        ("huggingface.co/org/repo", "main", "org/repo", "", "main"),
        ("hf://org/repo@v1/q4.gguf", "main", "org/repo", "q4.gguf", "v1"),
    ],
)
def test_what_the_hub_has_is_understood(home, path, revision, repo, file, at):
    found = understand(path, revision)
    assert (found.kind, found.repo, found.file, found.revision) == ("hub", repo, file, at)
    assert understand(found.path, found.revision) == found
    assert ModelSpec(path, revision=revision) == ModelSpec(found.path, revision=at)


def test_a_link_of_another_hub_is_understood_where_that_is_set(home, monkeypatch):
    with pytest.raises(ConfigError, match="no page of a model"):
        understand("https://hub.example:8080/mirror/org/repo")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example:8080/mirror")
    assert understand("https://hub.example:8080/mirror/org/repo/tree/v1").repo == "org/repo"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "give a hub id"),
        ("   ", "give a hub id"),
        ("a/b/c", "no such directory, and a hub id has one slash"),
        ("./mymodel", r"no such directory \(did you mean my-model"),
        ("/data/models/llama", "no such directory"),
        ("~/nothing", "no such directory"),
        ("../nothing/", "no such directory"),
        ("./q5.gguf", r"no such file \(did you mean q4.gguf"),
        ("q5.gguf", "no such file"),
        ("owner/q5.gguf", "owner/name/file.gguf"),
        ("no model", "no such directory .*hub has no such names"),
        ("a--b", "hub has no such names"),
        ("x" * 300, "hub has no such names"),
        ("modèle", "hub has no such names"),
        ("notes.txt", "it is a file"),
        ("https://example.com/org/repo", "no page of a model"),
        ("https://huggingface.co/org", "no page of a model"),
        ("https://huggingface.co/org/repo/discussions/1", "no page of a model"),
        ("https://huggingface.co/datasets/org/repo", "that is a dataset"),
        ("https://huggingface.co/org/repo/blob/main/model.safetensors", "give org/repo"),
        ("https://huggingface.co/org/repo/tree/main/folder", "give org/repo"),
        ("file:///data/models", "no page of a model"),
    ],
)
def test_what_can_name_nothing_is_one_sentence(home, path, why):
    with pytest.raises(ConfigError, match=why) as raised:
        ModelSpec(path)
    assert str(raised.value).startswith("model.path=")
    assert len(str(raised.value).splitlines()) == 1


def test_a_link_and_another_revision_contradict_each_other(home):
    with pytest.raises(ConfigError, match=r"model\.revision=v2 .* names v1"):
        ModelSpec("https://huggingface.co/org/repo/tree/v1", revision="v2")


def test_a_directory_comes_before_the_hub(home):
    assert understand("owner/local").kind == "directory"
    os.rmdir(Path("owner/local"))
    assert understand("owner/local").kind == "hub"
