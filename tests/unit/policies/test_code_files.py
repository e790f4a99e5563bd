"""Which files of a user's own code identify what it computes."""

from __future__ import annotations

import sys

import pytest

from a2sf.policies.code_files import imported_files
from a2sf.policies.find import find_policy, source_digest

POLICY = """
from dataclasses import dataclass
from a2sf import Policy, Retention
from shares_of_mine import SHARE

@dataclass(frozen=True, kw_only=True)
class Shared(Policy):
    name, label = "shared_of_mine", "Shared"

    def retention(self, budget, layer):
        return Retention(budget=budget, recent=int(budget * SHARE))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder on Python's path, and one of libraries."""
    files = {
        "mine/first.py": "import json, numpy, second, deep.inner\nfrom a2sf import Policy\nfrom elsewhere import x\n",
        "mine/second.py": "import third_party\ndef f():\n    import first, third\n",
        "mine/third.py": "",
        "mine/unused.py": "",
        "mine/deep/__init__.py": "",
        "mine/deep/inner.py": "from . import other\nfrom .more import *\nimport gone\n",
        "mine/deep/other.py": "",
        "mine/deep/more.py": "not python (",
        "site-packages/third_party.py": "",
        "site-packages/packed/__init__.py": "",
        "site-packages/packed/policies.py": "import third_party\nfrom packed.rules import x\n",
        "site-packages/packed/rules.py": "",
        "checkout/elsewhere.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for entry in ("mine", "site-packages", "checkout"):
        monkeypatch.syspath_prepend(tmp_path / entry)
    return tmp_path


def test_what_the_users_files_import_and_no_library(folder):
    found = [f.relative_to(folder / "mine").as_posix() for f in imported_files(folder / "mine/first.py")]
    assert found == ["deep/__init__.py", "deep/inner.py", "deep/more.py", "deep/other.py", "second.py", "third.py"]
    assert not {"first", "second", "deep"} & sys.modules.keys()  # nothing was imported


def test_files_of_an_installed_package_are_its_own(folder):
    place = folder / "site-packages/packed"
    assert imported_files(place / "policies.py", "packed") == [place / "__init__.py", place / "rules.py"]


def test_a_policy_is_another_one_when_a_file_that_it_imports_changes(tmp_path, monkeypatch):
    (tmp_path / "policy_of_mine.py").write_text(POLICY)
    (tmp_path / "shares_of_mine.py").write_text("SHARE = 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    cls = find_policy("policy_of_mine:Shared")
    before = source_digest(cls)
    (tmp_path / "shares_of_mine.py").write_text("SHARE = 0.25\n")
    assert source_digest(cls) != before
