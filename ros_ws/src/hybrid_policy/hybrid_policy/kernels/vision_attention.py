"""Attention of a vision transformer's layer on Hopper: host side of vision_attention.cu."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.norm import E4M3_MAX
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources

SOURCES = kernel_sources("wgmma_common", "vision_attention")
#: query rows of a warpgroup
ROWS = 64


def vision_attention_reference(qkv: Tensor, heads: int, tokens: int, out_scale: float | None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v of each view and head, by the library; what `vision_attention` does."""
    views, width = qkv.shape[0] // tokens, qkv.shape[1] // 3
    parts = qkv.view(views, tokens, 3, heads, width // heads).unbind(2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)
    if out_scale is None:
        return seen
    return (seen.float() / out_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def fits(capability: tuple[int, int], tokens: int, head_dim: int) -> bool:
    """Whether vision_attention.cu takes these: Hopper, 64 to 256 tokens a view in whole blocks, short heads."""
    return capability == (9, 0) and tokens % ROWS == 0 and tokens <= 256 and head_dim % 8 == 0 and head_dim <= 96


def step_source(tokens: int, head_dim: int) -> str:
    """C++ of ``scores_step`` (64 x tokens x 16, both operands shared, K along rows) and of ``values_step``
    (64 x head_dim x 16, the first in registers, the second with K across rows)."""

    def text(name: str, n: int, first: str, inputs: list[str], at: str, majors: str) -> str:
        count = n // 2
        d = ", ".join(f"%{i}" for i in range(count))
        outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
        operands = at.format(*(f"%{count + i}" for i in range(len(inputs) - 1)))
        flag = count + len(inputs) - 1
        return (
            f"__device__ __forceinline__ void {name}(float (&d)[{count}], {first}, unsigned long long b, int add) {{\n"
            f'asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{flag}, 0;\\n'
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{d}}}, {operands}, p, 1, 1, {majors};\\n}}"
            f'" : {outputs} : {", ".join(inputs)});\n}}\n'
        )

    registers = [f'"r"(a[{i}])' for i in range(4)]
    return text(
        "scores_step", tokens, "unsigned long long a", ['"l"(a)', '"l"(b)', '"r"(add)'], "{}, {}", "0, 0"
    ) + text(
        "values_step", head_dim, "const unsigned int* a", [*registers, '"l"(b)', '"r"(add)'],
        "{{{}, {}, {}, {}}}, {}", "1",
    )  # fmt: skip


def plan_groups(tokens: int) -> int:
    """Warpgroups of a block, which share its keys and values: two, where a view's rows divide by them."""
    return 2 if tokens % (2 * ROWS) == 0 else 1


def shared_bytes(tokens: int, head_dim: int) -> int:
    """Dynamic shared memory of a block."""
    padded = -(-head_dim // 16) * 2
    return padded * (plan_groups(tokens) * ROWS * 16 + 16) + 2 * padded * (tokens * 16 + 16) + 128


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("qkv", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("scale_log2", ctypes.c_float),
        ("inverse", ctypes.c_float),
    ]


@functools.cache
def _kernel(tokens: int, heads: int, head_dim: int, quantise: bool, pdl: bool, device: int) -> Kernel:
    groups = plan_groups(tokens)
    macros = {"TOKENS": tokens, "HEADS": heads, "HEAD_DIM": head_dim, "GROUPS": groups, "QUANTISE": int(quantise)}
    return Kernel(
        SOURCES, "vision_attention", macros | {"PDL": int(pdl)}, threads=128 * groups,
        shared=shared_bytes(tokens, head_dim), pdl=pdl, specific=True, prelude=step_source(tokens, head_dim),
    )  # fmt: skip


def vision_attention(qkv: Tensor, heads: int, tokens: int, out_scale: float | None, *, pdl: bool = False) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v of each view and head.

    Args:
        qkv: bf16 [views * tokens, 3 * width], contiguous: queries, keys, values; heads side by side in each.
        out_scale: given: the result is divided by it and rounded to FP8.

    Returns:
        [views * tokens, width], bf16 or float8_e4m3fn.

    Raises:
        InputError: a shape or dtype that does not fit.
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    if qkv.dtype != torch.bfloat16 or not qkv.is_contiguous() or rows % tokens or width % heads:
        got = (tuple(qkv.shape), qkv.dtype)
        raise InputError.at("vision_attention", "qkv", got, f"contiguous bf16 [views * {tokens}, 3 * width]")
    dtype = torch.bfloat16 if out_scale is None else torch.float8_e4m3fn
    out = torch.empty(rows, width, dtype=dtype, device=qkv.device)
    head_dim = width // heads
    arguments = _Arguments(
        qkv=qkv.data_ptr(), out=out.data_ptr(), scale_log2=head_dim**-0.5 * math.log2(math.e),
        inverse=1.0 / out_scale if out_scale is not None else 1.0,
    )  # fmt: skip
    kernel = _kernel(tokens, heads, head_dim, out_scale is not None, pdl, torch.cuda.current_device())
    kernel((rows // (ROWS * plan_groups(tokens)) * heads, 1), arguments)
    return out
