"""Vectors of sixteen lanes for numba: the few operations that the CPU kernel is written in.

LLVM's loop vectoriser does poorly on loops of two or three vectors, which are the common case here, so vectors are
spelled out; on a CPU with narrower registers LLVM splits each operation. Nothing has fast-math flags: NaN and infinity
propagate. Arrays are one-dimensional and contiguous, float32 or int32; offsets are in elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from a2sf.compat.numba import binding, cgutils, intrinsic, ir, models, register_model, types

LANES = 16

_INT, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS, _MASK = (ir.VectorType(lane, LANES) for lane in (_FLOAT, _INT, ir.IntType(1)))


class Vector(types.Type):
    """Sixteen lanes: `floats`, `ints` or `mask`."""


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, {"floats": _FLOATS, "ints": _INTS, "mask": _MASK}[fe_type.name])


floats, ints, mask = (Vector(name) for name in ("floats", "ints", "mask"))


def _operation(result: Any, emit: Callable[..., Any]) -> Any:
    """A numba function that gives a `result`; `emit(builder, *values)` writes its code."""

    def typed(*args: Any) -> Any:
        return result(*args), lambda context, builder, signature, values: emit(builder, *values)

    # numba reads the number of arguments off the signature
    def unary(typingctx: Any, x: Any) -> Any:
        return typed(x)

    def binary(typingctx: Any, x: Any, y: Any) -> Any:
        return typed(x, y)

    def ternary(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
        return typed(x, y, z)

    return intrinsic((unary, binary, ternary)[emit.__code__.co_argcount - 2])


def _call(builder: Any, name: str, result: Any, *values: Any, **options: Any) -> Any:
    kind = ir.FunctionType(result, [v.type for v in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values, **options)


def _spread(builder: Any, x: Any) -> Any:
    vector = ir.VectorType(x.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTS, [0] * LANES))


def _constant(x: float) -> Any:
    return ir.Constant(_FLOATS, [x] * LANES) if isinstance(x, float) else ir.Constant(_INTS, [x] * LANES)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, a, b, c)


# 2^f on [-1/2, 1/2], relative error 5e-9 before rounding; 2^(1.5 * 2^23): adding it rounds to an integer
_EXP2 = (1.54614474e-4, 1.33908674e-3, 9.61805667e-3, 5.55035710e-2, 2.40226510e-1, 6.93147188e-1, 1.0)
_ROUND = 12582912.0


def _exp2(builder: Any, x: Any) -> Any:
    """2^x for x <= 0; 0 below the normal numbers; NaN stays."""
    shifted = builder.fadd(x, _constant(_ROUND))
    fraction = builder.fsub(x, builder.fsub(shifted, _constant(_ROUND)))
    power = _constant(_EXP2[0])
    for c in _EXP2[1:]:
        power = _fma(builder, power, fraction, _constant(c))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _constant(23))
    scaled = builder.bitcast(builder.add(builder.bitcast(power, _INTS), exponent), _FLOATS)
    tiny = builder.fcmp_ordered("<", x, _constant(-126.0))
    invalid = builder.fcmp_unordered("uno", x, x)
    return builder.select(invalid, x, builder.select(tiny, _constant(0.0), scaled))


def _largest(builder: Any, x: Any) -> Any:
    half = LANES // 2
    while half:
        other = builder.shuffle_vector(x, x, ir.Constant(_INTS, [(i + half) % LANES for i in range(LANES)]))
        x = builder.select(builder.fcmp_ordered(">", x, other), x, other)
        half //= 2
    return builder.extract_element(x, ir.Constant(_INT, 0))


def _in_order(builder: Any, x: Any) -> Any:
    integers = builder.bitcast(builder.fadd(x, _constant(0.0)), _INTS)
    sign = builder.ashr(integers, _constant(31))
    return builder.xor(integers, builder.and_(sign, _constant(0x7FFFFFFF)))


def _bits_mask(builder: Any, m: Any) -> Any:
    return builder.zext(builder.bitcast(m, ir.IntType(LANES)), _LONG)


spread = _operation(floats, _spread)
"""(float32) -> all lanes."""
spread_int = _operation(ints, _spread)
add = _operation(floats, lambda b, x, y: b.fadd(x, y))
subtract = _operation(floats, lambda b, x, y: b.fsub(x, y))
multiply = _operation(floats, lambda b, x, y: b.fmul(x, y))
divide = _operation(floats, lambda b, x, y: b.fdiv(x, y))
fma = _operation(floats, _fma)
"""(x, y, z) -> x * y + z."""
larger = _operation(floats, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
smaller_int = _operation(ints, lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))
exp2 = _operation(floats, _exp2)
at_most_unsigned = _operation(mask, lambda b, x, y: b.icmp_unsigned("<=", x, y))
"""x <= y with negative numbers taken as the largest."""
at_least = _operation(mask, lambda b, x, y: b.icmp_signed(">=", x, y))
equal = _operation(mask, lambda b, x, y: b.icmp_signed("==", x, y))
both = _operation(mask, lambda b, x, y: b.and_(x, y))
where = _operation(floats, lambda b, m, x, y: b.select(m, x, y))
where_int = _operation(ints, lambda b, m, x, y: b.select(m, x, y))
as_ints = _operation(ints, lambda b, x: b.bitcast(x, _INTS))
"""The bits of each lane as an integer."""
in_order = _operation(ints, _in_order)
"""Integers in the order of any floats; 0 and -0 are one, NaN without a sign is the largest."""
not_less = _operation(mask, lambda b, x, y: b.fcmp_ordered(">=", x, y))
bits = _operation(types.int64, _bits_mask)
"""Lane i of a mask as bit i."""
ones = _operation(types.int64, lambda b, x: _call(b, "llvm.ctpop.i64", _LONG, x))
"""How many bits are 1."""
lowest_bit = _operation(types.int64, lambda b, x: _call(b, "llvm.cttz.i64", _LONG, x, ir.Constant(ir.IntType(1), 0)))
total = _operation(
    types.float32,
    # reassociable, so that it is a tree of additions and not a chain
    lambda b, x: _call(
        b, f"llvm.vector.reduce.fadd.v{LANES}f32", _FLOAT, ir.Constant(_FLOAT, -0.0), x, fastmath=("reassoc",)
    ),
)
largest = _operation(types.float32, _largest)
"""The largest lane; none may be NaN, which would take twice the instructions."""
smallest_int = _operation(types.int32, lambda b, x: _call(b, f"llvm.vector.reduce.smin.v{LANES}i32", _INT, x))


def _hidden(builder: Any, x: Any) -> Any:
    """The integer x, and LLVM does not know that it is."""
    return builder.asm(ir.FunctionType(_LONG, [_LONG]), "", "=r,0", [x], False)


after = _operation(types.int64, lambda b, at: _hidden(b, b.add(at, ir.Constant(_LONG, LANES))))
"""at + 16, hidden: LLVM would unroll loops eight times that are over two to four vectors in the common case."""


def _address(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _load_from(builder: Any, pointer: Any, vector: Any) -> Any:
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), typ=vector)
    loaded.align = 4
    return loaded


def _store_to(builder: Any, pointer: Any, x: Any) -> None:
    builder.store(x, builder.bitcast(pointer, x.type.as_pointer()), align=4)


@intrinsic
def load(typingctx: Any, array: Any, at: Any) -> Any:
    """array[at : at + 16]."""
    lanes, vector = (ints, _INTS) if array.dtype == types.int32 else (floats, _FLOATS)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load_from(builder, _address(context, builder, signature.args[0], args[0], args[1]), vector)

    return lanes(array, types.intp), codegen


def _store(hidden: bool) -> Any:
    @intrinsic
    def store(typingctx: Any, array: Any, at: Any, x: Any) -> Any:
        """array[at : at + 16] = x."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            at = _hidden(builder, args[1]) if hidden else args[1]
            _store_to(builder, _address(context, builder, signature.args[0], args[0], at), args[2])
            return context.get_dummy_value()

        return types.void(array, types.intp, x), codegen

    return store


store = _store(hidden=False)
store_all = _store(hidden=True)
"""As `store`, where x chooses between what is there and something else. LLVM would store the chosen lanes alone, and a
processor cannot hand such a store on to the next load: each step would wait for the memory twice."""


@intrinsic
def scatter(typingctx: Any, source: Any, source_at: Any, target: Any, target_at: Any) -> Any:
    """target[target_at + 16 * i] = source[source_at + i] for i in range(16)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = _address(context, builder, signature.args[0], args[0], args[1])
        end = _address(context, builder, signature.args[2], args[2], args[3])
        for i in range(LANES):
            x = builder.load(builder.gep(start, [ir.Constant(_LONG, i)]))
            builder.store(x, builder.gep(end, [ir.Constant(_LONG, i * LANES)]))
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), codegen


def _shuffles(pattern: Callable[[int], tuple[int, ...]], apart: int) -> tuple[list[int], list[int]]:
    """Lanes of two vectors, taken in turns by `pattern` of each group of four, and those that are `apart` after them."""
    first = [i for group in range(0, LANES, 4) for i in pattern(group)]
    return first, [i + apart for i in first]


_TRANSPOSITION = (
    _shuffles(lambda g: (g, g + LANES, g + 1, g + LANES + 1), 2),
    _shuffles(lambda g: (g, g + 1, g + LANES, g + LANES + 1), 2),
    *2 * (_shuffles(lambda g: tuple(range(2 * g, 2 * g + 4)), 4),),
)
"""Step n pairs vectors that are 2^n apart. At the end vector i holds column i with its two lowest bits exchanged."""


@intrinsic
def transpose(
    typingctx: Any, source: Any, offsets: Any, offsets_at: Any, column: Any, target: Any, target_at: Any, lanes: Any
) -> Any:
    """target[target_at + 16 * c + r] = source[offsets[offsets_at + r] + column + c] for 16 c, and the r in `lanes`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, offsets, offsets_at, column, target, target_at, lanes = args
        kinds = signature.args
        first = _address(context, builder, kinds[1], offsets, offsets_at)
        rows = []
        for r in range(LANES):
            offset = builder.add(builder.load(builder.gep(first, [ir.Constant(_LONG, r)])), column)
            rows.append(_load_from(builder, _address(context, builder, kinds[0], source, offset), _FLOATS))
        for n, shuffles in enumerate(_TRANSPOSITION):
            for i in (i for i in range(LANES) if not i >> n & 1):
                j = i + (1 << n)
                rows[i], rows[j] = (builder.shuffle_vector(rows[i], rows[j], ir.Constant(_INTS, s)) for s in shuffles)
        for i, row in enumerate(rows):
            c = (i & ~3) | (i & 1) << 1 | i >> 1 & 1
            to = _address(context, builder, kinds[4], target, builder.add(target_at, ir.Constant(_LONG, LANES * c)))
            _store_to(builder, to, builder.select(lanes, row, _load_from(builder, to, _FLOATS)))
        return context.get_dummy_value()

    return types.void(source, offsets, types.intp, types.intp, target, types.intp, lanes), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Fetch the cache line of array[at], which may lie outside of the array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        how = (ir.Constant(_INT, x) for x in (0, 3, 1))  # to read, in the first-level cache, as data
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), builder.bitcast(pointer, ir.IntType(8).as_pointer()), *how)
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


TILE_ROWS = 4
TILE_VECTORS = 4 if binding.get_host_cpu_features().get("avx512f") else 1
"""Accumulators of one tile are 4 rows of this many vectors: what fits the registers."""
HIGH_VECTORS = TILE_VECTORS // 2
"""Up to as many vectors, a tile may have twice the rows."""


def _tile(vectors: int, height: int = TILE_ROWS) -> Any:
    @intrinsic
    def tile(
        typingctx: Any,
        a: Any, a_at: Any, a_row: Any, b: Any, b_at: Any, b_row: Any, b_vector: Any,
        depth: Any, c: Any, c_at: Any, c_row: Any, fresh: Any,
    ) -> Any:  # fmt: skip
        """C = A @ B, or C += A @ B unless fresh, for `height` rows and `vectors` vectors of columns, in registers.

        A[r, k] is at a_at + r * a_row + k, vector j of B[k] at b_at + k * b_row + j * b_vector, vector j of C[r] at
        c_at + r * c_row + 16 * j; k runs over range(depth), depth >= 1.
        """
        n = types.intp

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_at, a_row, b, b_at, b_row, b_vector, depth, c, c_at, c_row, fresh = args
            kinds = signature.args

            def index(at: Any, step: Any, times: int) -> Any:
                return builder.add(at, builder.mul(step, ir.Constant(step.type, times)))

            def address_of_c(r: int, j: int) -> Any:
                return _address(
                    context, builder, kinds[8], c, index(index(c_at, c_row, r), ir.Constant(_LONG, LANES), j)
                )

            rows, columns = range(height), range(vectors)
            c_to = [[address_of_c(r, j) for j in columns] for r in rows]
            a_from = [_address(context, builder, kinds[0], a, index(a_at, a_row, r)) for r in rows]
            b_from = [_address(context, builder, kinds[3], b, index(b_at, b_vector, j)) for j in columns]
            zero = _constant(0.0)
            start = [
                [builder.select(fresh, zero, _load_from(builder, c_to[r][j], _FLOATS)) for j in columns] for r in rows
            ]

            before = builder.block
            body = builder.append_basic_block("tile")
            after = builder.append_basic_block("tile_end")
            builder.branch(body)
            builder.position_at_end(body)
            k = builder.phi(_LONG)
            k.add_incoming(ir.Constant(_LONG, 0), before)
            sums = [[builder.phi(_FLOATS) for _ in columns] for _ in rows]
            row = builder.mul(k, b_row)
            b_k = [_load_from(builder, builder.gep(p, [row]), _FLOATS) for p in b_from]
            following = []
            for r in rows:
                a_rk = _spread(builder, builder.load(builder.gep(a_from[r], [k])))
                following.append([_fma(builder, a_rk, b_k[j], sums[r][j]) for j in columns])
            k_next = builder.add(k, ir.Constant(_LONG, 1))
            k.add_incoming(k_next, body)
            for r in rows:
                for j in columns:
                    sums[r][j].add_incoming(start[r][j], before)
                    sums[r][j].add_incoming(following[r][j], body)
            builder.cbranch(builder.icmp_signed("<", k_next, depth), body, after)
            builder.position_at_end(after)
            for r in rows:
                for j in columns:
                    _store_to(builder, c_to[r][j], following[r][j])
            return context.get_dummy_value()

        return types.void(a, n, n, b, n, n, n, n, c, n, n, types.boolean), codegen

    return tile


tile1, tile2, tile3, tile4 = (_tile(vectors) for vectors in (1, 2, 3, 4))
# an addition is done some steps after it was begun, so narrow tiles are twice as high to have as many under way
high1, high2 = (_tile(vectors, 2 * TILE_ROWS) for vectors in (1, 2))


@intrinsic
def take(typingctx: Any, array: Any, at: Any) -> Any:
    """Set array[at], an int64, from 0 to 1; false if it was not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        zero, one = ir.Constant(_LONG, 0), ir.Constant(_LONG, 1)
        return builder.extract_value(builder.cmpxchg(pointer, zero, one, "acq_rel", "monotonic"), 1)

    return types.boolean(array, types.intp), codegen


@intrinsic
def give(typingctx: Any, array: Any, at: Any) -> Any:
    """Set array[at], an int64, to 0, after all writes so far."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(ir.Constant(_LONG, 0), pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen
