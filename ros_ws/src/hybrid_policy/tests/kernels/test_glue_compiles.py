"""Attention, QKV and glue kernels as machine code for each target, without a GPU."""

import pytest
import triton
import triton.language as tl
from hybrid_policy.kernels import attention, flow_step, norm, qkv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = [90, 110, *(pytest.param(target, marks=pytest.mark.slow) for target in (89, 100, 120))]


def compiled(kernel, types, constants, target, warps, stages=3):
    """Compile ``kernel``; parameters not in ``constants`` take their type from ``types`` in order, 16-aligned."""
    names = [p.name for p in kernel.params]
    free = [n for n in names if n not in constants]
    assert len(free) == len(types), (free, types)
    signature = dict(zip(free, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    signature = {n: signature[n] for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in zip(free, types) if t[0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    if target >= 90:
        options["launch_pdl"] = bool(constants.get("PDL"))
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def no_stack(program):
    assert ".local" not in program.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cache", ["bf16", "fp8e4nv"])
def test_attention_compiles(target, cache):
    for plan in (attention.plan_attention(400, 1018, 256), attention.plan_attention(4480, 1018, 256)):
        constants = {
            "GROUP": 8, "KV_HEADS": 1, "HEAD_DIM": 256, "PADDED": 256, "BLOCK_M": plan.block_m,
            "BLOCK_N": plan.block_n, "SPLITS": plan.splits, "STAGES": plan.stages, "COMPUTE": tl.bfloat16,
            "PDL": target >= 90,
        }  # fmt: skip
        types = ["*bf16", "*" + cache, "*" + cache, "*bf16", "*fp32", "*fp32", "*i32", "*i32", "i32", "i32", "fp32"]
        program = compiled(attention._attention_kernel, types, constants, target, plan.warps, plan.stages)
        no_stack(program)
        assert "mma" in program.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize("cache", ["bf16", "fp8e4nv"])
def test_fused_qkv_compiles(target, weight, cache):
    block_n, block_k, warps, stages = qkv.plan_qkv(2560, 256)
    constants = {
        "K": 1024, "HEADS": 8, "KV_HEADS": 1, "HEAD_DIM": 256, "BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "STAGES": stages, "COMPUTE": tl.bfloat16, "PDL": target >= 90, "LINE": 64 if weight == "bf16" else 128,
    }  # fmt: skip
    types = [
        "*bf16",
        "*" + weight,
        "*fp32",
        "*bf16",
        "*fp32",
        "*bf16",
        "*" + cache,
        "*" + cache,
        "*fp32",
        "*fp32",
        "*i32",
        "i32",
        "fp32",
    ]
    program = compiled(qkv._fused_qkv_kernel, types, constants, target, warps, stages)
    no_stack(program)
    assert "mma" in program.asm["ptx"]
    if target >= 90:
        assert "griddepcontrol.wait" in program.asm["ptx"]


@pytest.mark.parametrize("target", [90, 110])
def test_glue_compiles(target):
    flags = dict.fromkeys(
        ("LAYER_NORM", "HAS_SHIFT", "HAS_Y", "HAS_ROW", "HAS_BIAS", "HAS_GATE", "QUANTISE", "HAS_SQUARES", "PDL"), True
    )
    types = [
        "*fp32",
        "*fp8e4nv",
        "*fp32",
        "*fp32",
        "*bf16",
        "*fp32",
        "*fp32",
        "*fp32",
        "*fp32",
        "*fp32",
        "i32",
        "i32",
        "fp32",
    ]
    constants = {**flags, "HAS_CLEAN": False, "BLOCK": 2048, "clean_ptr": None}
    no_stack(compiled(norm._add_norm_kernel, types, constants, target, norm.norm_warps(2048)))
    constants = {"BLOCK": 16384, "HAS_ROW": True, "QUANTISE": True, "PDL": True}
    no_stack(compiled(norm._geglu_kernel, ["*bf16", "*fp8e4nv", "*fp32", "*fp32", "i32"], constants, target, 16))
    constants = {
        "HEADS": 8,
        "KV_HEADS": 1,
        "HALF": 128,
        "BLOCK_H": 16,
        "BLOCK_D": 128,
        "HAS_START": True,
        "HAS_ROW": True,
        "PDL": True,
    }
    types = ["*bf16", "*bf16", "*fp8e4nv", "*fp8e4nv", "*fp32", "*fp32", "*i32", "*fp32"]
    no_stack(compiled(qkv._rope_split_kernel, types, constants, target, 4))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("width", "actions"), [(1024, 32), (2048, 32), (80, 7)])
def test_no_two_threads_of_a_flow_step_write_one_value(target, width, actions):
    """What several warps or lanes hold alike, Triton stores from each where it changes layouts, without a predicate."""
    block, warps = flow_step.plan_flow(width)
    types = ["*bf16", "*fp32", "*bf16"] + ["*fp32"] * 6 + ["*i32", "*fp32", "*fp32"] + ["fp32"] * 4
    for first in (False, True):
        constants = {"K": width, "A": actions, "BLOCK_A": triton.next_power_of_2(actions), "BLOCK_K": block}
        constants |= {"FIRST": first, "NORM": True, "PROGRAMS": 50, "PDL": target >= 90}
        program = compiled(flow_step._flow_step_kernel, types, constants, target, warps)
        no_stack(program)
        stores = [line.strip() for line in program.asm["ptx"].splitlines() if "st.shared" in line]
        assert all(line.startswith("@") for line in stores), stores
