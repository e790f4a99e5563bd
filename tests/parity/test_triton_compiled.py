"""The Triton kernels compiled ahead of time for three kinds of GPUs: what a GPU would run, read on a machine without one."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from packaging.version import Version

from a2sf.engine.kernels.gpu import launch, products
from a2sf.engine.kernels.gpu.scan import scan
from a2sf.policies.rule import Rule
from tests.own_policies import AboveUniform

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
triton = pytest.importorskip("triton", reason="Triton is not installed (extra gpu)")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTEGERS = {"n", "T", "K", "S", "spare", "W", "S_AFTER", "POWERS"}
OF_INTEGERS = {"table", "limits", "positions", "positions_after", "kept", "left", "died"}
OF_FLOATS = {"shares", "factor", "fixed", "numbers", "numbers_after", "sums", "powers", "scores", "out"}


class Compiled(NamedTuple):
    """Machine code: intermediate forms by name, registers and bytes of stack of a thread, instructions of each loop."""

    asm: dict[str, str]
    registers: int
    stack: int
    loops: list[list[str]]


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return lambda *args: _compiled(tmp_path / "code.cubin", *args)


def _compiled(file: Path, kernel, constants, options, arch: int, dtype: str) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(OF_INTEGERS, "*i32") | dict.fromkeys(OF_FLOATS, "*fp32") | dict.fromkeys(INTEGERS, "i32")
    types |= {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    if kernel is products.keep:
        types["N"] = "i32"
    signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"]  # as torch's tensors are
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    file.write_bytes(found.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    used = subprocess.run([tools / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True).stdout
    code = subprocess.run([tools / "nvdisasm", "-c", file], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", used).groups()
    return Compiled(found.asm, int(registers), int(stack), list(_loops(code)))


def _loops(code: str) -> Iterator[list[str]]:
    """The instructions from each jump's target to the jump backwards, in the order of the jumps."""
    labels, instructions = {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            jump = re.search(r"BRA.*?`\((\.L_x_\d+)\)", line)
            if jump and jump[1] in labels and labels[jump[1]] < len(instructions) - 1:
                yield instructions[labels[jump[1]] :]


def times(name: str, loop: list[str]) -> int:
    return sum(bool(re.search(rf"\b(?:{name})\b", x)) for x in loop)


# columns, KV heads, query heads of each, head size: the most instructions of a token, and barriers
SCANS = {
    (128, 3, 3, 64): (220, 0),
    (128, 8, 4, 128): (250, 0),
    (256, 8, 4, 128): (400, 0),
    (512, 3, 3, 64): (270, 4),
    (1024, 8, 4, 128): (310, 4),
}
EVERYWHERE = [(arch, sizes) for arch in (80, 90, 100) for sizes in SCANS]
FIRST = [(80, (128, 8, 4, 128)), (90, (128, 3, 3, 64)), (90, (1024, 8, 4, 128)), (100, (128, 8, 4, 128))]


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.9"), reason="the numbers are those of Triton 3.9, as in docs/gpu.md"
)
@pytest.mark.parametrize(
    ("arch", "sizes"), [c if c in FIRST else pytest.param(*c, marks=pytest.mark.full) for c in EVERYWHERE]
)
def test_the_scan_of_a2sf_and_h2o(compiled, arch, sizes):
    N, K, G, D = sizes
    most, barriers = SCANS[sizes]
    constants = launch.scan_constants(Rule(), K, G, D, N, several=False) | {"COMPILED": True}
    code = compiled(scan, constants, launch.scan_options(constants, compiled=True), arch, "bf16")
    assert "tt.dot" not in code.asm["ttir"]  # which would be rounded to TF32
    token = min((loop for loop in code.loops if times("C?REDUX", loop)), key=len)  # the walk without care
    found = {name: times(name, token) for name in ("SHFL", "C?REDUX", "BAR", "LDG", "LDL", "STL")}
    print(
        f"sm_{arch}, {sizes}: {code.registers} registers, stack {code.stack}, {len(token)} instructions a token, {found}"
    )
    assert len(token) <= most
    assert found["BAR"] == barriers  # a warp alone waits for nobody
    assert found["LDL"] == found["STL"] == 0  # nothing is spilled
    assert found["LDG"] <= max(1, N // 128) * G  # shares in fours, each once


NAMES = ("shares", "attend", "received", "keep")
RULES = {"every part of a rule": AboveUniform().keeps(9).rule, "keys alone": Rule(scored=False, bias=lambda k, v, p: p)}


@pytest.mark.parametrize(("rule", "G"), [*((name, 4) for name in RULES), ("h2o", 16)])
@pytest.mark.parametrize("several", [False, True])
def test_what_the_loop_hands_on(compiled, rule, G, several):
    rule = RULES.get(rule, Rule())
    constants = launch.scan_constants(rule, 2, G, 64, 128, several) | {"COMPILED": True}
    code = compiled(scan, constants, launch.scan_options(constants, compiled=True), 80, "fp32")
    assert "tt.dot" not in code.asm["ttir"]
    # what the loop over tokens hands on, as written and as compiled: Triton 3.5 to 3.7 dropped the count of cached tokens
    carried = [code.asm[ir].partition("iter_args(")[2].partition(")")[0].count("=") for ir in ("ttir", "ttgir")]
    assert carried[0] == carried[1] > 0
    assert (
        code.asm["ttir"].partition("iter_args(")[2].partition(")")[0].count("=")
        == CARRIED[rule.scored, rule.mean_over_age]
    )


CARRIED = {(True, False): 10, (True, True): 11, (False, False): 5}


def test_wide_and_many_heads_compile(compiled):
    for N, G in ((4096, 4), (128, 71)):
        constants = launch.scan_constants(Rule(), 1, G, 64, N, several=False) | {"COMPILED": True}
        options = launch.scan_options(constants, compiled=True)
        assert options["num_warps"] * 32 * options["maxnreg"] <= 2**16  # registers of a multiprocessor
        assert compiled(scan, constants, options, 90, "bf16").registers <= options["maxnreg"]


PRODUCTS = [(arch, G, D, name, "bf16") for arch, G, D in ((80, 4, 128), (90, 3, 64), (100, 4, 128)) for name in NAMES]
PRODUCTS += [(90, 4, 128, name, "fp32") for name in NAMES]


@pytest.mark.parametrize(
    ("arch", "G", "D", "name", "dtype"),
    [c if c[0] == 90 and c[3] == "attend" else pytest.param(*c, marks=pytest.mark.full) for c in PRODUCTS],
)
def test_products(compiled, arch, G, D, name, dtype):
    sizes, options = launch.tiles(DTYPES[dtype], G, D, D, compiled=True)
    constants = sizes | {"G": G, "D": D, "V": D, "COMPILED": True, "SUMS": True, "COUNTED": True}
    constants |= {"N": 512} if name == "shares" else {}
    code = compiled(getattr(products, name), constants, options, arch, dtype)
    assert "tf32" not in code.asm["ttgir"].lower()
    loops = [loop for loop in code.loops if times("HMMA|HGMMA|UTC[A-Z]*MMA|FFMA", loop) > 2]
    print(
        f"sm_{arch}, {name}, {dtype}: {code.registers} registers, stack {code.stack}, loops {[len(x) for x in loops]}"
    )
    assert bool(loops) == (name != "keep")
    if loops:
        assert times("STL", loops[0]) == 0  # nothing is spilled, where no care is taken
        assert (times("HMMA|HGMMA|UTC[A-Z]*MMA", loops[0]) > 0) == (dtype == "bf16")  # tensor cores
