"""A2SF: token pruning with a forgetting factor, and a harness that measures what pruning costs in accuracy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2sf.engine.functional import attend, evicting_attention
    from a2sf.engine.state import EvictionState
    from a2sf.hf.cache.pruned import PrunedCache
    from a2sf.hf.scope import pruning
    from a2sf.policies.a2sf import A2SF
    from a2sf.policies.base import Policy, Retention
    from a2sf.policies.budget import Budget
    from a2sf.policies.find import make_policy
    from a2sf.policies.rule import Rule, Step
    from a2sf.policies.schedule import Schedule
    from baselines.adakv import AdaKV
    from baselines.cake import CAKE
    from baselines.calibrated import Calibrated
    from baselines.cam import CaM
    from baselines.chunkkv import ChunkKV
    from baselines.criticalkv import CriticalKV
    from baselines.curdkv import CurDKV
    from baselines.dms import DMS
    from baselines.expected_attention import ExpectedAttention
    from baselines.full import Full
    from baselines.future import Future
    from baselines.h2o import H2O
    from baselines.heads import Heads
    from baselines.key_norm import KeyNorm
    from baselines.keydiff import KeyDiff
    from baselines.keyformer import Keyformer
    from baselines.kvzap import KVzap
    from baselines.kvzip import KVzip
    from baselines.lagkv import LagKV
    from baselines.mean_attention import MeanAttention
    from baselines.pyramidkv import PyramidKV
    from baselines.qfilter import QFilter
    from baselines.random import Random
    from baselines.rkv import RKV
    from baselines.roco import RoCo
    from baselines.scissorhands import Scissorhands
    from baselines.simlayerkv import SimLayerKV
    from baselines.snapkv import SnapKV
    from baselines.streaming import Streaming
    from baselines.tova import TOVA
    from baselines.vatp import VATP
    from baselines.window import Window

__all__ = [
    "A2SF",
    "CAKE",
    "DMS",
    "H2O",
    "RKV",
    "TOVA",
    "VATP",
    "AdaKV",
    "Budget",
    "CaM",
    "Calibrated",
    "ChunkKV",
    "CriticalKV",
    "CurDKV",
    "EvictionState",
    "ExpectedAttention",
    "Full",
    "Future",
    "Heads",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "KeyNorm",
    "Keyformer",
    "LagKV",
    "MeanAttention",
    "Policy",
    "PrunedCache",
    "PyramidKV",
    "QFilter",
    "Random",
    "Retention",
    "RoCo",
    "Rule",
    "Schedule",
    "Scissorhands",
    "SimLayerKV",
    "SnapKV",
    "Step",
    "Streaming",
    "Window",
    "attend",
    "evicting_attention",
    "make_policy",
    "pruning",
]
__version__ = "0.2.0"

_WHERE = {
    "A2SF": "a2sf.policies.a2sf",
    "AdaKV": "baselines.adakv",
    "Budget": "a2sf.policies.budget",
    "CAKE": "baselines.cake",
    "CaM": "baselines.cam",
    "Calibrated": "baselines.calibrated",
    "ChunkKV": "baselines.chunkkv",
    "CriticalKV": "baselines.criticalkv",
    "CurDKV": "baselines.curdkv",
    "DMS": "baselines.dms",
    "EvictionState": "a2sf.engine.state",
    "ExpectedAttention": "baselines.expected_attention",
    "Full": "baselines.full",
    "Future": "baselines.future",
    "H2O": "baselines.h2o",
    "Heads": "baselines.heads",
    "KVzap": "baselines.kvzap",
    "KVzip": "baselines.kvzip",
    "KeyDiff": "baselines.keydiff",
    "KeyNorm": "baselines.key_norm",
    "Keyformer": "baselines.keyformer",
    "LagKV": "baselines.lagkv",
    "MeanAttention": "baselines.mean_attention",
    "Policy": "a2sf.policies.base",
    "PrunedCache": "a2sf.hf.cache.pruned",
    "PyramidKV": "baselines.pyramidkv",
    "QFilter": "baselines.qfilter",
    "RKV": "baselines.rkv",
    "Random": "baselines.random",
    "Retention": "a2sf.policies.base",
    "RoCo": "baselines.roco",
    "Rule": "a2sf.policies.rule",
    "Schedule": "a2sf.policies.schedule",
    "Scissorhands": "baselines.scissorhands",
    "SimLayerKV": "baselines.simlayerkv",
    "SnapKV": "baselines.snapkv",
    "Step": "a2sf.policies.rule",
    "Streaming": "baselines.streaming",
    "TOVA": "baselines.tova",
    "VATP": "baselines.vatp",
    "Window": "baselines.window",
    "attend": "a2sf.engine.functional",
    "evicting_attention": "a2sf.engine.functional",
    "make_policy": "a2sf.policies.find",
    "pruning": "a2sf.hf.scope",
}


def __getattr__(name: str) -> Any:
    """A public name on first use: torch takes a second to load and transformers several, `a2sf --help` needs neither."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
