"""Names that are safe and distinct, whatever is put into them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2sf.store.names import LONGEST_PART, Named, distinct, safe
from a2sf.tasks import spec as tasks
from a2sf.tracking.wandb_runs import LONGEST_NAME, run_id
from tests.unit.sweep.test_sweep import cell

AWKWARD = [
    "my-org/step-100",
    "a:b",
    "a b",
    "a[b]*",
    "é",
    "x" * 300,
    "a__b",
    ".hidden",
    "..",
    "",
    "(a)",
    "a\nb",
    "CON\\x",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_safe_name_is_one_part_of_a_path(text):
    assert re.fullmatch(r"[A-Za-z0-9_+=,-][A-Za-z0-9._+=,-]*", safe(text))
    assert len(safe(text)) <= LONGEST_PART
    assert "__" not in safe(text)


@given(st.text(), st.text())
def test_different_texts_have_different_safe_names(a, b):
    assert (safe(a) == safe(b)) == (a == b)


def test_a_name_that_is_safe_stays():
    assert safe("SmolLM2-135M_Instruct.v1") == "SmolLM2-135M_Instruct.v1"


@pytest.mark.parametrize("text", AWKWARD)
def test_a_cells_folder_and_run_are_safe_and_its_own(text, monkeypatch):
    monkeypatch.setattr(tasks.TaskSpec, "identity", property(lambda spec: {"task": spec.ref}))
    monkeypatch.setattr(tasks.TaskSpec, "name", property(lambda spec: spec.ref))
    monkeypatch.setattr(tasks.TaskSpec, "generates", False)
    made = cell(model_name=text, task=text)
    assert "/" not in made.name
    assert not made.name.startswith(".")
    assert len(made.name.encode()) < 220
    assert made.name.endswith(f"__n4__{made.id}")
    other = cell(model_name=text, task=f"{text}!")
    assert made.name != other.name
    ids = run_id(text, made.name), run_id(f"{text}!", made.name), run_id(text, other.name)
    assert len(set(ids)) == 3
    assert all(len(i) <= LONGEST_NAME and re.fullmatch(r"[A-Za-z0-9._+=-]+", i.replace(",", "")) for i in ids)


def test_models_with_the_same_last_part_are_distinguished_by_their_paths():
    a, b = Named("final", "/out/run-a/final", "1"), Named("final", "/out/run-b/final", "2")
    assert distinct([a, b]) == {a: "run-a/final", b: "run-b/final"}
    deep = Named("final", "/other/run-a/final", "3")
    assert distinct([a, b, deep]) == {a: "out/run-a/final", b: "run-b/final", deep: "other/run-a/final"}
    assert distinct([a]) == {a: "final"}
    given = Named("base", "/out/run-a/final", "1"), Named("base", "/out/run-b/final", "2")
    assert set(distinct(given).values()) == {"base (run-a/final)", "base (run-b/final)"}


def test_one_place_with_two_weights_is_two_models_and_one_model_under_two_names_is_one():
    before, after = Named("m", "org/m", "1" * 16), Named("m", "org/m", "2" * 16)
    assert set(distinct([before, after]).values()) == {"m #11111111", "m #22222222"}
    assert set(distinct([before, Named("other-name", "org/m", "1" * 16)]).values()) == {"m"}


@given(st.lists(st.tuples(*[st.sampled_from(["a", "b/a", "c/b/a", "a/a"])] * 2, st.sampled_from("12")), min_size=1))
def test_names_are_the_same_exactly_where_the_weights_are(rows):
    models = [Named(name.rpartition("/")[2], path, weights) for name, path, weights in rows]
    names = distinct(models)
    for x in models:
        for y in models:
            assert (names[x] == names[y]) == ((x.path, x.weights) == (y.path, y.weights))
