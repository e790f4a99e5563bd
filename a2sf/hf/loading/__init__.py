"""Loading a model and its tokenizer: a hub id, a local directory, or a GGUF file (local, on the hub or in a package).

A model of the hub is pinned to a commit, fetched into the hub's cache and read from there; no request is made while it
loads. A GGUF file is dequantized once into a plain checkpoint under the cache directory (`A2SF_CACHE`, default
~/.cache/a2sf).
"""

from a2sf.hf.loading.checkpoint import fingerprint as fingerprint
from a2sf.hf.loading.checkpoint import local_checkpoint as local_checkpoint
from a2sf.hf.loading.checkpoint import tokenizer_folder as tokenizer_folder
from a2sf.hf.loading.config import acts_of as acts_of
from a2sf.hf.loading.config import config_here as config_here
from a2sf.hf.loading.config import head_size_of as head_size_of
from a2sf.hf.loading.config import kv_heads_of as kv_heads_of
from a2sf.hf.loading.config import positions_of as positions_of
from a2sf.hf.loading.config import sizes_of as sizes_of
from a2sf.hf.loading.model import Download as Download
from a2sf.hf.loading.model import LoadedModel as LoadedModel
from a2sf.hf.loading.model import adapter_of as adapter_of
from a2sf.hf.loading.model import left_alone as left_alone
from a2sf.hf.loading.model import load as load
from a2sf.hf.loading.model import load_tokenizer as load_tokenizer
from a2sf.hf.loading.model import prepare as prepare
from a2sf.hf.loading.model import tokenizer_here as tokenizer_here
from a2sf.hf.loading.spec import DTYPES as DTYPES
from a2sf.hf.loading.spec import ModelSpec as ModelSpec
from a2sf.hf.loading.spec import pin as pin
