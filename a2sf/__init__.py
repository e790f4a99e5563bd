"""A2SF: token pruning with a forgetting factor, and a harness that measures what pruning costs in accuracy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2sf.engine.functional import attend as attend
    from a2sf.engine.functional import evicting_attention as evicting_attention
    from a2sf.engine.state import EvictionState as EvictionState
    from a2sf.hf.cache.pruned import PrunedCache as PrunedCache
    from a2sf.hf.scope import pruning as pruning
    from a2sf.policies.a2sf import A2SF as A2SF
    from a2sf.policies.base import Policy as Policy
    from a2sf.policies.base import Retention as Retention
    from a2sf.policies.budget import Budget as Budget
    from a2sf.policies.find import make_policy as make_policy
    from a2sf.policies.rule import AttentionRows as AttentionRows
    from a2sf.policies.rule import Cut as Cut
    from a2sf.policies.rule import Head as Head
    from a2sf.policies.rule import Rule as Rule
    from a2sf.policies.rule import Step as Step
    from a2sf.policies.schedule import Schedule as Schedule
    from baselines.adakv import AdaKV as AdaKV
    from baselines.cake import CAKE as CAKE
    from baselines.calibrated import Calibrated as Calibrated
    from baselines.cam import CaM as CaM
    from baselines.chunkkv import ChunkKV as ChunkKV
    from baselines.criticalkv import CriticalKV as CriticalKV
    from baselines.curdkv import CurDKV as CurDKV
    from baselines.dms import DMS as DMS
    from baselines.expected_attention import ExpectedAttention as ExpectedAttention
    from baselines.full import Full as Full
    from baselines.future import Future as Future
    from baselines.h2o import H2O as H2O
    from baselines.heads import Heads as Heads
    from baselines.key_norm import KeyNorm as KeyNorm
    from baselines.keydiff import KeyDiff as KeyDiff
    from baselines.keyformer import Keyformer as Keyformer
    from baselines.kvzap import KVzap as KVzap
    from baselines.kvzip import KVzip as KVzip
    from baselines.lagkv import LagKV as LagKV
    from baselines.mean_attention import MeanAttention as MeanAttention
    from baselines.pyramidkv import PyramidKV as PyramidKV
    from baselines.qfilter import QFilter as QFilter
    from baselines.random import Random as Random
    from baselines.rkv import RKV as RKV
    from baselines.roco import RoCo as RoCo
    from baselines.scissorhands import Scissorhands as Scissorhands
    from baselines.simlayerkv import SimLayerKV as SimLayerKV
    from baselines.snapkv import SnapKV as SnapKV
    from baselines.streaming import Streaming as Streaming
    from baselines.tova import TOVA as TOVA
    from baselines.vatp import VATP as VATP
    from baselines.window import Window as Window

__version__ = "0.2.0"

_WHERE = {
    "A2SF": "a2sf.policies.a2sf",
    "AdaKV": "baselines.adakv",
    "AttentionRows": "a2sf.policies.rule",
    "Budget": "a2sf.policies.budget",
    "CAKE": "baselines.cake",
    "CaM": "baselines.cam",
    "Calibrated": "baselines.calibrated",
    "ChunkKV": "baselines.chunkkv",
    "CriticalKV": "baselines.criticalkv",
    "CurDKV": "baselines.curdkv",
    "Cut": "a2sf.policies.rule",
    "DMS": "baselines.dms",
    "EvictionState": "a2sf.engine.state",
    "ExpectedAttention": "baselines.expected_attention",
    "Full": "baselines.full",
    "Future": "baselines.future",
    "H2O": "baselines.h2o",
    "Head": "a2sf.policies.rule",
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
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    """A public name on first use: torch takes a second to load and transformers several, `a2sf --help` needs neither."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
