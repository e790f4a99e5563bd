"""The compiled kernel of the CPU (numba): `attend_cpu` for whole sequences, `SlotCache` to read on token by token."""

from a2sf.engine.kernels.cpu.attend import attend_cpu as attend_cpu
from a2sf.engine.kernels.cpu.slot_cache import SlotCache as SlotCache
