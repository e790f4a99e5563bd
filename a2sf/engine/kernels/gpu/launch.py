"""How the compiled functions of a GPU are launched: sizes of tiles, warps and registers, and the tensors that they fill."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from a2sf.engine.kernels.gpu import products
from a2sf.engine.kernels.gpu.jit import triton
from a2sf.engine.kernels.gpu.scan import scan
from a2sf.policies.rule import Rule


class Batch(NamedTuple):
    """What all launches of a call read, and where its output goes; everything on one device, contiguous.

    Attributes:
        query: [rows, T, K, G, D].
        key: [rows, T, K, D] and
        value: [rows, T, K, V], of the same dtype.
        output: [rows, T, K, G, V], filled.
        limits: int32 [rows, 4]: tokens seen before the first, budget, recent, sinks.
        factor: float32 [rows], the forgetting factor.
        fixed: float32 [rows, K, 2, T], `m` and `b` of the new tokens; anything where the rule has neither.
        scale: of the logits, times log2(e).
        rule, spare: of the call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    limits: Tensor
    factor: Tensor
    fixed: Tensor
    scale: float
    rule: Rule
    spare: int

    @property
    def sizes(self) -> dict[str, int]:
        """K, G, D and V."""
        return {"K": self.key.shape[2], "G": self.query.shape[3], "D": self.key.shape[-1], "V": self.value.shape[-1]}


class ChunkSlots(NamedTuple):
    """What rows hold between two chunks; empty slots come last in each head.

    Attributes:
        positions: int32 [B, K, N], ascending, -1 where a slot is empty.
        numbers: float32 [B, K, 4, N]: `A`, `N`, `m` and `b`; those that the rule uses.
        keys: [B, K, S, D] and
        values: [B, K, S, V], the first S <= N slots.
    """

    positions: Tensor
    numbers: Tensor
    keys: Tensor
    values: Tensor


class Scanned(NamedTuple):
    """What a scan gives, [B, K, N] and int32 but for `numbers`; see the function's own arguments."""

    positions: Tensor
    numbers: Tensor
    kept: Tensor
    left: Tensor
    died: Tensor


def interpreted() -> bool:
    """Whether Triton's interpreter runs everything."""
    return not isinstance(scan, triton.JITFunction)


def scan_constants(rule: Rule, K: int, G: int, D: int, N: int, several: bool) -> dict[str, Any]:
    """What the scan is compiled for; `several`: more than one token may go in a step."""
    heads = K if rule.shared else 1
    return {
        "G": G,
        "D": D,
        "N": N,
        "HEADS": heads,
        "SEVERAL": several,
        "SCORED": rule.scored,
        "COUNT_ABOVE_UNIFORM": rule.count_above_uniform,
        "MEAN_OVER_AGE": rule.mean_over_age,
        "WEIGHTED": rule.weight is not None,
        "BIASED": rule.bias is not None,
        "PADDED_K": triton.next_power_of_2(heads),
        "PADDED_G": triton.next_power_of_2(G),
    }


def scan_options(constants: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """Sixteen shares a thread, in one warp up to 32, and registers for them: left alone ptxas stops at 64."""
    shares = constants["N"] * constants["PADDED_G"] * constants["PADDED_K"]
    warps = 1 if shares <= 1024 else min(32, shares // 512)
    if not compiled:
        return {"num_warps": warps}
    registers = 255 if shares == 1024 and warps == 1 else min(168, 2**16 // (32 * warps))
    return {"num_warps": warps, "num_stages": 1, "maxnreg": registers, "enable_fp_fusion": True}


def tiles(dtype: torch.dtype, G: int, D: int, V: int, compiled: bool) -> tuple[dict[str, int], dict[str, Any]]:
    """Sizes of the products' tiles, and how they are launched."""
    wide = dtype == torch.float32  # whose products in full precision are no tensor cores'
    padded = triton.next_power_of_2(G)
    sizes = {
        "PADDED_G": padded,
        "PADDED_D": max(16, triton.next_power_of_2(D)),
        "PADDED_V": max(16, triton.next_power_of_2(V)),
        "TOKENS": max(1, (32 if wide else 64) // padded),
        "COLUMNS": 32 if wide or max(D, V) > 64 else 64,
    }
    warps = 8 if wide or max(D, V) > 128 else 4
    options = {"num_warps": warps, "num_stages": 1 if wide else 2, "enable_fp_fusion": True}
    return sizes, options if compiled else {"num_warps": warps}


class Launches:
    """The launches for one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.compiled = batch, not interpreted()
        _, G, D, V = batch.sizes.values()
        self.sizes, self.options = tiles(batch.query.dtype, G, D, V, self.compiled)

    def _product(self, *but: str) -> dict[str, Any]:
        """Constants and options of a product, without the constants `but`."""
        sizes = self.batch.sizes | self.sizes | {"COMPILED": self.compiled}
        return {n: x for n, x in sizes.items() if n not in but} | self.options

    def shares(self, table: Tensor, slots: ChunkSlots, n: int, N: int) -> Tensor:
        """Shares of attention of the next `n` tokens to the `N` columns of each row of `table`, [B, K, G, n, N]."""
        b, K, G = self.batch, self.batch.sizes["K"], self.batch.sizes["G"]
        out = torch.empty(len(table), K, G, n, N, device=table.device)
        grid = (len(table) * K, triton.cdiv(n, self.sizes["TOKENS"]))
        S, T = slots.keys.shape[2], b.key.shape[1]
        products.shares[grid](
            b.query, b.key, slots.keys, table, out, b.scale, n, T, S=S, N=N, **self._product("V", "PADDED_V")
        )
        return out

    def scan(self, table: Tensor, slots: ChunkSlots, shares: Tensor, n: int, several: bool) -> Scanned:
        """Which columns go, and what is left."""
        b, (K, G, D, _), N = self.batch, self.batch.sizes.values(), slots.positions.shape[-1]
        constants = scan_constants(b.rule, K, G, D, N, several)
        died, kept, positions = (torch.empty_like(slots.positions) for _ in range(3))
        numbers, left = torch.empty_like(slots.numbers), died.new_empty(len(table), K)
        S, T = slots.keys.shape[2], b.key.shape[1]
        scan[(len(table) * K // constants["HEADS"],)](
            shares, table, b.limits, b.factor, b.fixed, slots.positions, slots.numbers, positions, numbers, kept, left, died,
            b.query, b.key, slots.keys, b.scale, n, T, K, S, b.spare, **constants, COMPILED=self.compiled,
            **scan_options(constants, self.compiled),
        )  # fmt: skip
        return Scanned(positions, numbers, kept, left, died)

    def attend(self, table: Tensor, slots: ChunkSlots, died: Tensor, n: int, sums: Tensor | None = None) -> None:
        """Fill the output, and `sums` [B, K, G, n], of the next `n` tokens."""
        b, K = self.batch, self.batch.sizes["K"]
        grid = (len(table) * K, triton.cdiv(n, self.sizes["TOKENS"]))
        S, T = slots.keys.shape[2], b.key.shape[1]
        products.attend[grid](
            b.query, b.key, b.value, slots.keys, slots.values, table, died, b.output, died if sums is None else sums,
            b.scale, T, S=S, W=died.shape[-1], n=n, SUMS=sums is not None, **self._product(),
        )  # fmt: skip

    def keep(self, table: Tensor, slots: ChunkSlots, scanned: Scanned, S: int) -> ChunkSlots:
        """The columns that are left as slots, of which there are `S`."""
        b, K = self.batch, self.batch.sizes["K"]
        keys, values = (x.new_empty(len(table), K, S, x.shape[-1]) for x in (slots.keys, slots.values))
        of = self._product("G", "PADDED_G", "TOKENS", "COMPILED")
        products.keep[(len(table) * K, triton.cdiv(S, of["COLUMNS"]))](
            b.key, b.value, slots.keys, slots.values, table, scanned.kept, scanned.left, keys, values, b.key.shape[1],
            S=slots.keys.shape[2], S_AFTER=S, N=scanned.kept.shape[-1], **of,
        )  # fmt: skip
        return ChunkSlots(scanned.positions, scanned.numbers, keys, values)

    def received(
        self, table: Tensor, slots: ChunkSlots, died: Tensor, sums: Tensor, powers: Tensor, scores: Tensor
    ) -> None:
        """Update `scores` [B, K, S + T] by all tokens of rows that evict nothing; `powers` [rows, T + 1] of the factor."""
        b, K, n = self.batch, self.batch.sizes["K"], self.batch.key.shape[1]
        of = self._product("V", "PADDED_V")
        products.received[(len(table) * K, triton.cdiv(scores.shape[-1], of["COLUMNS"]))](
            b.query, b.key, slots.keys, table, died, sums, powers, scores, b.scale, n, n, S=slots.keys.shape[2],
            W=died.shape[-1], POWERS=powers.shape[-1], COUNT_ABOVE_UNIFORM=b.rule.count_above_uniform, **of,
        )  # fmt: skip
