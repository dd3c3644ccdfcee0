"""Attention of a vision transformer's layer on Hopper: host side of vision_attention.cu."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.norm import E4M3_MAX
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources, multiprocessors
from hybrid_policy.kernels.tensor_map import heads_map

SOURCES = kernel_sources("wgmma_common", "vision_attention")
#: query rows of a warpgroup
ROWS = 64
#: > 0: a wait traps after so many polls (tests)
SPIN_LIMIT = 0


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


def step_source(part: int) -> str:
    """C++ of ``scores_step`` (64 x part x 16, both operands shared, K along rows) and of ``values_wide`` and
    ``values_narrow`` (64 x 64 x 16 and 64 x 16 x 16, the first in registers, the second with K across rows)."""

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

    shared = ("unsigned long long a", ['"l"(a)', '"l"(b)', '"r"(add)'], "{}, {}", "0, 0")
    registers = [f'"r"(a[{i}])' for i in range(4)]
    mixed = ("const unsigned int* a", [*registers, '"l"(b)', '"r"(add)'], "{{{}, {}, {}, {}}}, {}", "1")
    return text("scores_step", part, *shared) + text("values_wide", 64, *mixed) + text("values_narrow", 16, *mixed)


@dataclass(frozen=True)
class AttentionPlan:
    """A launch of vision_attention.cu.

    Attributes:
        tokens: of a view. head_dim: of a head.
        tiles: of 64 query rows a block, a warpgroup each.
        cluster: blocks of a head and view that fetch its keys and values for one another.
        part: keys whose scores one softmax takes.
    """

    tokens: int
    head_dim: int
    tiles: int
    cluster: int
    part: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * self.tiles

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: queries (their place takes bf16 results too), keys, values, alignment."""
        row = self.head_dim // 64 * 128 + -(-(self.head_dim % 64) // 16) * 32
        q_row = max(row, (self.head_dim // 8 | 1) * 16)
        return self.tiles * -(-ROWS * q_row // 1024) * 1024 + 2 * self.tokens * row + 1024

    def blocks(self, views: int, heads: int) -> int:
        """Of a launch."""
        return views * heads * self.tokens // (ROWS * self.tiles)

    def macros(self, heads: int, *, quantise: bool, pdl: bool) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            "TOKENS": self.tokens, "HEADS": heads, "HEAD_DIM": self.head_dim, "TILES": self.tiles,
            "CLUSTER": self.cluster, "PART": self.part, "QUANTISE": int(quantise), "PDL": int(pdl),
        }  # fmt: skip


def plan_attention(views: int, heads: int, tokens: int, head_dim: int, processors: int = 132) -> AttentionPlan:
    """Two tiles a block, which share its keys and values; one where half of the multiprocessors hold them all.

    At two views a tile a block is faster alone, but not in the stage: what is left of the GPU, the next launch takes
    while this one runs.
    """
    of_head = tokens // ROWS
    tiles = 2 if of_head % 2 == 0 and 2 * views * heads * of_head > processors else 1
    cluster = 2 if of_head // tiles % 2 == 0 else 1
    return AttentionPlan(tokens, head_dim, tiles, cluster, 128 if tokens % 128 == 0 else ROWS)


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("wide", ctypes.c_ubyte * 128),
        ("narrow", ctypes.c_ubyte * 128),
        ("out", ctypes.c_void_p),
        ("scale_log2", ctypes.c_float),
        ("inverse", ctypes.c_float),
        ("pad", ctypes.c_ubyte * 48),  # to a multiple of 64
    ]


@functools.cache
def _kernel(plan: AttentionPlan, heads: int, quantise: bool, pdl: bool, spin_limit: int, device: int) -> Kernel:
    macros = plan.macros(heads, quantise=quantise, pdl=pdl) | {"SPIN_LIMIT": spin_limit}
    return Kernel(
        SOURCES, "vision_attention", macros, threads=plan.threads, shared=plan.shared, pdl=pdl, specific=True,
        prelude=step_source(plan.part),
    )  # fmt: skip


def vision_attention(
    qkv: Tensor,
    heads: int,
    tokens: int,
    out_scale: float | None,
    *,
    pdl: bool = False,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v of each view and head.

    Args:
        qkv: bf16 [views * tokens, 3 * width], contiguous: queries, keys, values; heads side by side in each.
        out_scale: given: the result is divided by it and rounded to FP8.
        plan: instead of `plan_attention`'s.

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
    plan = plan or plan_attention(rows // tokens, heads, tokens, head_dim, multiprocessors(qkv.device))
    arguments = _Arguments(
        out=out.data_ptr(), scale_log2=head_dim**-0.5 * math.log2(math.e),
        inverse=1.0 / out_scale if out_scale is not None else 1.0,
    )  # fmt: skip
    ctypes.memmove(arguments.wide, heads_map(qkv, head_dim, ROWS, 64), 128)
    ctypes.memmove(arguments.narrow, heads_map(qkv, head_dim, ROWS, 16), 128)
    kernel = _kernel(plan, heads, out_scale is not None, pdl, SPIN_LIMIT, torch.cuda.current_device())
    kernel((plan.blocks(rows // tokens, heads), 1), arguments)
    return out
