"""The attention of a transformers model, computed by the engine."""

from a2sf.hf.attention.errors import NonFiniteError as NonFiniteError
from a2sf.hf.attention.errors import UnsupportedModel as UnsupportedModel
from a2sf.hf.attention.errors import check_finite as check_finite
from a2sf.hf.attention.function import attached as attached
from a2sf.hf.attention.function import pruned_attention as pruned_attention
from a2sf.hf.attention.function import running as running
from a2sf.hf.attention.plan import Plan as Plan
from a2sf.hf.attention.windows import global_layers as global_layers
from a2sf.hf.attention.windows import mixes_windows as mixes_windows
from a2sf.hf.attention.windows import rope_switch as rope_switch
