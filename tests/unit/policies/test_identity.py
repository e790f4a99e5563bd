"""Policies as values: equal settings have equal hashes, and the identity of results is written as in earlier versions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import FrozenInstanceError, dataclass, field, fields
from pathlib import Path

import pytest

from a2sf import Budget, Policy, Retention, make_policy
from a2sf.hf.loading import ModelSpec
from a2sf.policies.find import find_policies
from a2sf.shipped import shipped
from a2sf.store.archive import read_archive
from a2sf.sweep.cell import Cell, policy_versions
from a2sf.tasks.spec import DataSpec
from tests.conftest import SMOLLM2
from tests.policies import instances

LAYERS = [
    {"forgetting_factor": 0.3, "sinks": 2, "share": 0.5},
    {
        "share": 1.5,
        "heads": [
            {"forgetting_factor": 0.5, "recent_share": 0.5, "sinks": 1, "mean_over_age": False, "share": 1.4},
            {"forgetting_factor": 0.9, "recent_share": 0.0, "sinks": 0, "mean_over_age": True, "share": 0.6},
        ],
    },
]
LITERAL = [
    ("a2sf", {}, "53db388533093333"),
    ("a2sf", {"forgetting_factor": [0.1, 0.2], "recent": 3}, "f4a2005e13d7f8b7"),
    ("adakv", {}, "07a0e5e094bb2243"),
    ("calibrated", {}, "dfecf0f4c614414f"),
    ("calibrated", {"file": {"name": "small", "layers": LAYERS}}, "d29ba393f586392f"),
    ("full", {}, "132154b90c13dd5f"),
    ("h2o", {}, "7f39e61a149964da"),
    ("heads", {"heads": [[0, 1], [1, 0]]}, "babb7a46ff968641"),
    ("mean_attention", {}, "b4740fa4cece4d24"),
    ("pyramidkv", {}, "937c01772d3dae1c"),
    ("random", {}, "20d4f794a2890916"),
    ("snapkv", {}, "620ec6a084f4b833"),
    ("vatp", {}, "caedce246a37a8aa"),
]
"""Noted before fields were renamed."""


def stored(policy: Policy) -> dict:
    """The entries of a cell's identity that are about its policy."""
    settings = json.loads(json.dumps(policy.stored_settings()))
    return {"policy": policy.name, "policy_settings": settings, **policy_versions(policy)}


@pytest.mark.parametrize(("name", "settings", "digest"), LITERAL)
def test_what_identifies_a_result_is_as_before(name, settings, digest):
    made = make_policy(name, **settings)
    text = json.dumps(stored(made), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
    spec, data = ModelSpec(SMOLLM2, device="cpu"), DataSpec(source="bundle", content="x")
    cell = Cell("small", spec, made, Budget(ratio=0.2), "piqa", 0, 5, 0, data)
    assert stored(made).items() <= cell.identity.items()


def test_stored_results_are_of_the_policies_there_are():
    """`runs/reference/` was written by earlier versions: a policy with the stored settings is identified as it was."""
    found: Counter[str] = Counter()
    for archive in sorted((shipped("runs") / "reference").rglob("*.a2sf.zip")):
        for cell in (c.cell for c in read_archive(archive)):
            if cell["policy"] == "calibrated":
                file = cell["policy_settings"]["file"]
                settings = {"file": json.loads(json.dumps(file).replace('"by_age"', '"mean_over_age"'))}
            else:
                settings = cell["policy_settings"]
            if isinstance(by := settings.get("by"), dict):  # what identifies the other policy beside its settings
                settings = settings | {"by": {name: x for name, x in by.items() if name not in ("version", "source")}}
            made = make_policy(cell["policy"], **settings)
            assert stored(made)["policy_settings"] == cell["identity"]["policy_settings"]
            found[cell["policy"]] += 1
    assert {"a2sf", "calibrated", "h2o", "heads", "snapkv"} <= set(found)


def test_a_stored_cache_of_the_previous_version_has_the_same_policy():
    made = make_policy("calibrated", file={"name": "x", "layers": [{"mean_over_age": True}]})
    layer = "{'share': 1.0, 'forgetting_factor': 1.0, 'recent_share': 0.0, 'sinks': 0, 'by_age': True}"
    assert repr(made) == f"Calibrated(file={{'name': 'x', 'layers': [{layer}]}})"
    assert repr(make_policy("calibrated")) == "Calibrated(file='')"


@pytest.mark.parametrize("policy", instances(), ids=repr)
def test_policies_are_frozen_and_hashable(policy):
    twin = type(policy)(**{f.name: getattr(policy, f.name) for f in fields(policy)})
    assert policy == twin
    assert hash(policy) == hash(twin)
    for f in fields(policy):
        with pytest.raises(FrozenInstanceError):
            setattr(policy, f.name, None)


def test_policies_of_other_settings_differ():
    assert len(dict.fromkeys(instances(), 0)) == len(instances())
    assert len({cls() for cls in find_policies().values()}) == len(find_policies())


@dataclass(kw_only=True)
class Loose(Policy):
    """As a user may have written it for the previous version: not frozen, with a list and a mapping."""

    name, label = "loose", "Loose"

    numbers: list = field(default_factory=lambda: [1, 2])
    options: dict = field(default_factory=dict)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)


def test_a_policy_that_is_not_frozen_works_and_is_hashable():
    assert hash(Loose()) == hash(Loose(numbers=[1, 2]))
    assert len({Loose(), Loose(options={"a": [1]}), Loose(options={"a": [1]}), Loose(numbers=[3])}) == 3
    assert Loose().stored_settings() == {"numbers": [1, 2], "options": {}}


def test_the_files_that_come_with_the_package_have_the_new_names():
    files = list((shipped("runs") / "reference").rglob("*.yaml"))
    assert files
    assert not [f for f in files if "by_age" in Path(f).read_text(encoding="utf-8")]
