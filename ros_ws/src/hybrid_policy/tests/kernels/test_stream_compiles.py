"""The streaming kernels and quantisers as machine code for each target, without a GPU: tensor cores, no stack, cost."""

import os
import re
import subprocess
import tempfile

import pytest
import triton
from hybrid_policy.kernels import activations, tiles
from hybrid_policy.kernels.stream import constants
from hybrid_policy.kernels.stream_gemm import stream_gemm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .machine_code import TOOLS, disassembled, loop_instructions

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
TARGETS = [89, 90, 100, 110, 120]
TENSOR_CORE = {89: r"\b[HQ]MMA", 90: r"\b[HQ]GMMA", 100: r"\bUTC[HQ]MMA", 110: r"\bUTC[HQ]MMA", 120: r"\b[HQ]MMA"}
WEIGHTS = {"bf16": "bf16", "fp8": "fp8e4nv", "nvfp4": "i32"}


def compile_kernel(kernel, types, fixed, target, warps, stages, pdl):
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    constexprs = {(i,): fixed.get(n) for i, n in enumerate(names) if n not in types}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "")[:1] == "*"}
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    if target >= 90:
        options["launch_pdl"] = pdl
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compile_stream(fmt, tile, target, n, k, geglu, *, residual=False):
    pdl = target >= 90
    x = f"tensordesc<bf16[{tile.bm}, {tile.bk}]>" if tile.tma_x else "*bf16"
    types = {"x_ptr": x, "out_ptr": "*bf16", "prefetch_ptr": f"*{WEIGHTS[fmt]}", "M": "i32", "eps": "fp32"}
    if tile.bm2:
        types["x2_ptr"] = f"tensordesc<bf16[{tile.bm2}, {tile.bk}]>" if tile.tma_x else "*bf16"
    types["w_ptr"] = f"*{WEIGHTS[fmt]}"
    if fmt == "nvfp4":
        types |= {"scale_ptr": "*u8", "prefetch_scale_ptr": "*u8"}
    if tile.tma_w:
        inner = 32 if fmt == "nvfp4" else tile.bk
        types["w_ptr"] = f"tensordesc<{WEIGHTS[fmt]}[{tile.bn}, {inner}]>"
        if fmt == "nvfp4":
            types["scale_ptr"] = f"tensordesc<u8[{tile.bn}, 16]>"
    if fmt != "bf16":
        types["row_scale_ptr"] = "*fp32"
    if residual:
        types |= {"residual_ptr": "*bf16", "gate_ptr": "*fp32", "bias_ptr": "*fp32"}
    if tile.split > 1:
        types |= {"partial_ptr": "*fp32", "counter_ptr": "*i32"}
    fixed = constants(fmt, n, k, tile, geglu=geglu, pdl=pdl, exact=False) | {"TILES": 0, "X_ROWS": False}
    return compile_kernel(stream_gemm, types, fixed, target, tile.warps, tile.stages, pdl)


def disassemble(program):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        code = disassembled(file.name)
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return code, int(re.search(r"STACK:(\d+)", usage.stdout).group(1))


@pytest.mark.parametrize("target", TARGETS)
def test_gate_up_w4a16(target):
    tile = tiles.gate_up_tile("nvfp4", 50, 8192, 1024, target)
    program = compile_stream("nvfp4", tile, target, 8192, 1024, True)
    code, stack = disassemble(program)
    assert re.search(TENSOR_CORE[target], code)
    assert stack == 0
    assert program.metadata.shared <= tiles.SHARED_MEMORY[target]
    if target == 90:
        # 4.5 at four warps, decode, bulk copies and wgmma together; a naive decode alone takes 8 to 9.
        assert loop_instructions(code) * tile.warps * 32 / (tile.bn * tile.bk) < 5.5


@pytest.mark.parametrize("target", TARGETS)
def test_fp8_down_with_gated_residual(target):
    tile = tiles.linear_tile("fp8", 50, 1024, 4096, target)
    program = compile_stream("fp8", tile, target, 1024, 4096, False, residual=True)
    code, stack = disassemble(program)
    assert re.search(TENSOR_CORE[target], code)
    assert stack == 0
    assert program.metadata.shared <= tiles.SHARED_MEMORY[target]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_many_tokens_and_linears(fmt, target):
    for m, n, k, geglu in ((560, 32768, 2048, True), (50, 32768, 2048, True), (50, 2560, 1024, False)):
        if tiles.route(fmt, m, n, k, target) == "library":
            continue
        pick = tiles.gate_up_tile if geglu else tiles.linear_tile
        tile = pick(fmt, m, n, k, target)
        program = compile_stream(fmt, tile, target, n, k, geglu)
        code, stack = disassemble(program)
        assert re.search(TENSOR_CORE[target], code)
        assert stack == 0
        assert program.metadata.shared <= tiles.SHARED_MEMORY[target]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("to", ["nvfp4", "fp8"])
def test_quantisers(to, target):
    types = {
        "x_ptr": "*bf16",
        "factor_ptr": "*bf16",
        "shift_ptr": "*fp32",
        "row_scale_ptr": "*fp32",
        "eps": "fp32",
        "M": "i32",
    }
    types["out_ptr"] = "*u8" if to == "nvfp4" else "*fp8e4nv"
    if to == "nvfp4":
        types["scale_ptr"] = "*u8"
    fixed = {"K": 2048, "BK": 2048, "TO": to, "SWIZZLE": True, "PDL": target >= 90, "EXACT": False}
    program = compile_kernel(activations._quantize_rows, types, fixed, target, 4, 3, target >= 90)
    assert disassemble(program)[1] == 0
