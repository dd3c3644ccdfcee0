"""Queries, keys and values: RoPE and the cache write, alone and as the end of a fused norm + projection.

The cache of a layer is [capacity, kv_heads, head_dim]; a token's row in it is its position. Prefix tokens
start at position 0, action tokens at ``valid``, an int32 on the device, so that one captured launch serves
every prompt: action tokens overwrite the padding of the prefix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.norm import pdl_option

ROPE_BASE = 10000.0


def rope_tables(capacity: int, head_dim: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..capacity-1: two float32 [capacity, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.arange(capacity, device=device).float()[:, None] * (1.0 / ROPE_BASE**exponents)
    return angles.cos().contiguous(), angles.sin().contiguous()


def rope_split_reference(
    qkv: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: tuple[Tensor, Tensor],
    start: Tensor | None,
    *,
    row_scale: Tensor | None = None,
) -> None:
    """The mathematics of `rope_split`; ``start`` is read on the device only."""
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    wide = qkv.float() if row_scale is None else qkv.float() * row_scale[:, None]
    parts = wide.view(rows, heads + 2 * kv_heads, head_dim)
    place = torch.arange(rows, device=qkv.device)
    if start is not None:
        place = place + start
    cos, sin = tables[0][place][:, None], tables[1][place][:, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    q.copy_(rotate(parts[:, :heads]))
    k_cache.index_copy_(0, place, rotate(parts[:, heads : heads + kv_heads]).to(k_cache.dtype))
    v_cache.index_copy_(0, place, parts[:, heads + kv_heads :].to(v_cache.dtype))


@triton.jit
def _rope_split_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, start_ptr, row_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_START: tl.constexpr, HAS_ROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = row
    if HAS_START:
        place += tl.load(start_ptr)
    d = tl.arange(0, BLOCK_D)
    inside = d < HALF
    cos = tl.load(cos_ptr + place * HALF + d, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + place * HALF + d, mask=inside, other=0.0)
    head = tl.arange(0, BLOCK_H)
    source = qkv_ptr + row * (HEADS + 2 * KV_HEADS) * 2 * HALF
    factor = 1.0
    if HAS_ROW:
        factor = tl.load(row_ptr + row)
    # queries and keys of this token, one head a tile row
    mask = (head < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    offset = head[:, None] * 2 * HALF + d[None, :]
    a = tl.load(source + offset, mask=mask, other=0.0).to(tl.float32) * factor
    b = tl.load(source + offset + HALF, mask=mask, other=0.0).to(tl.float32) * factor
    turned = (head < HEADS + KV_HEADS)[:, None]
    first = tl.where(turned, a * cos[None, :] - b * sin[None, :], a)
    second = tl.where(turned, b * cos[None, :] + a * sin[None, :], b)
    is_q = (head < HEADS)[:, None] & inside[None, :]
    target = q_ptr + row * HEADS * 2 * HALF + offset
    tl.store(target, first.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(target + HALF, second.to(q_ptr.dtype.element_ty), mask=is_q)
    is_k = (head >= HEADS)[:, None] & turned & inside[None, :]
    target = k_ptr + place * KV_HEADS * 2 * HALF + offset - HEADS * 2 * HALF
    tl.store(target, first.to(k_ptr.dtype.element_ty), mask=is_k)
    tl.store(target + HALF, second.to(k_ptr.dtype.element_ty), mask=is_k)
    is_v = mask & (head >= HEADS + KV_HEADS)[:, None]
    target = v_ptr + place * KV_HEADS * 2 * HALF + offset - (HEADS + KV_HEADS) * 2 * HALF
    tl.store(target, first.to(v_ptr.dtype.element_ty), mask=is_v)
    tl.store(target + HALF, second.to(v_ptr.dtype.element_ty), mask=is_v)


def rope_split(
    qkv: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: tuple[Tensor, Tensor],
    start: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Split a projection into rotated queries, and keys and values at their rows of the cache.

    Args:
        qkv: [M, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys, values.
        q: [M, heads, head_dim], contiguous. k_cache, v_cache: [capacity, kv_heads, head_dim].
        tables: from `rope_tables`, for the whole capacity.
        start: int32 [1] on the device, position of the first row; None for 0.
        row_scale: float32 [M], factor of the rows of ``qkv``.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    if tuple(qkv.shape) != (rows, (heads + 2 * kv_heads) * head_dim) or not qkv.is_contiguous():
        raise InputError.at("rope_split", "qkv", tuple(qkv.shape), f"[{rows}, {(heads + 2 * kv_heads) * head_dim}]")
    half = head_dim // 2
    _rope_split_kernel[(rows,)](
        qkv, q, k_cache, v_cache, *tables, start, row_scale,
        HEADS=heads, KV_HEADS=kv_heads, HALF=half, BLOCK_H=triton.next_power_of_2(heads + 2 * kv_heads),
        BLOCK_D=triton.next_power_of_2(half), HAS_START=start is not None, HAS_ROW=row_scale is not None,
        PDL=pdl, num_warps=4, **pdl_option(pdl),
    )  # fmt: skip


def interleave_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows i and i + head_dim / 2 of each head side by side: RoPE's pairs fall into one tile."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape).contiguous()


@triton.jit
def prefetch_l2(address):
    """One 128-byte line a lane into L2; the result is a dummy."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _fused_qkv_kernel(
    x_ptr, w_ptr, w_scale_ptr, factor_ptr, shift_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, start_ptr,
    rows, eps,
    K: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    COMPUTE: tl.constexpr, PDL: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    kk = tl.arange(0, BLOCK_K)
    if PDL:
        # This tile's weights do not depend on the predecessor: bring them to L2 while it still runs.
        line = tl.arange(0, BLOCK_N * BLOCK_K // LINE)
        for k0 in tl.static_range(0, K, BLOCK_K):
            where = w_ptr + (tile * BLOCK_N + line // (BLOCK_K // LINE)) * K + k0 + line % (BLOCK_K // LINE) * LINE
            prefetch_l2(where)
        gdc_wait()
        gdc_launch_dependents()
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # exact where tests compute in float32; bf16 operands do not look at it
    PRECISION: tl.constexpr = "ieee" if tl.float32 == COMPUTE else "tf32"
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + kk
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < rows)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + n[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        factor = tl.load(factor_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        acc = tl.dot((wide * factor[None, :]).to(COMPUTE), tl.trans(w.to(COMPUTE)), acc, input_precision=PRECISION)
    root = tl.rsqrt(squares / K + eps)
    y = acc * root[:, None] * tl.load(w_scale_ptr + n)[None, :] + tl.load(shift_ptr + n)[None, :]
    a, b = tl.split(tl.reshape(y, [BLOCK_M, BLOCK_N // 2, 2]))
    # columns a are dims i of the head, columns b dims i + HEAD_DIM / 2
    head = (tile * BLOCK_N) // HEAD_DIM
    i = (tile * BLOCK_N % HEAD_DIM) // 2 + tl.arange(0, BLOCK_N // 2)
    place = m + tl.load(start_ptr)
    half: tl.constexpr = HEAD_DIM // 2
    mask = (m < rows)[:, None] & (i < half)[None, :]
    cos = tl.load(cos_ptr + place[:, None] * half + i[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + place[:, None] * half + i[None, :], mask=mask, other=0.0)
    turned = head < HEADS + KV_HEADS
    first = tl.where(turned, a * cos - b * sin, a)
    second = tl.where(turned, b * cos + a * sin, b)
    # three names: the cache's elements may be others than the queries'
    if head < HEADS:
        to_q = q_ptr + (m[:, None] * HEADS + head) * HEAD_DIM + i[None, :]
        tl.store(to_q, first.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(to_q + half, second.to(q_ptr.dtype.element_ty), mask=mask)
    elif head < HEADS + KV_HEADS:
        to_k = k_ptr + (place[:, None] * KV_HEADS + head - HEADS) * HEAD_DIM + i[None, :]
        tl.store(to_k, first.to(k_ptr.dtype.element_ty), mask=mask)
        tl.store(to_k + half, second.to(k_ptr.dtype.element_ty), mask=mask)
    else:
        to_v = v_ptr + (place[:, None] * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM + i[None, :]
        tl.store(to_v, first.to(v_ptr.dtype.element_ty), mask=mask)
        tl.store(to_v + half, second.to(v_ptr.dtype.element_ty), mask=mask)


def plan_qkv(out_features: int, head_dim: int, processors: int = 132) -> tuple[int, int, int, int]:
    """(rows of weights a program, inner block, warps, stages): the widest tile that leaves half the device busy.

    A tile lies within one head, so ``head_dim`` must be a multiple of 16.
    """
    block_n = 16
    while block_n < 64 and head_dim % (2 * block_n) == 0 and out_features // (2 * block_n) >= processors // 2:
        block_n *= 2
    return block_n, 256, 8, 4


class FusedQKV:
    """adaRMS norm, projection, RoPE and cache write of a few action tokens, as one launch.

    norm(x) W.T is computed as r·((x ⊙ (1 + scale)) W.T) + shift W.T with r the row's reciprocal root mean square:
    r is known when the product ends, and shift W.T is a row that load time computes for each flow step.

    weight: [(heads + 2 * kv_heads) * head_dim, K], floating point, or float8_e4m3fn with ``weight_scale`` float32,
        [] or one a row. Activations stay in bf16 either way: so few rows are bound by the weights' bytes.
    """

    def __init__(
        self,
        weight: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        weight_scale: Tensor | None = None,
        compute: torch.dtype = torch.bfloat16,
    ) -> None:
        out_features, self.width = weight.shape
        if out_features != (heads + 2 * kv_heads) * head_dim:
            raise InputError.at("qkv", "weight.shape", tuple(weight.shape), f"[{(heads + 2 * kv_heads) * head_dim}, K]")
        if head_dim % 16:
            raise InputError.at("qkv", "head_dim", head_dim, "a multiple of 16")
        self.shape = (heads, kv_heads, head_dim)
        scale = torch.ones(out_features, device=weight.device) if weight_scale is None else weight_scale.float()
        scale = scale.expand(out_features).contiguous()
        if weight.dtype == torch.float8_e4m3fn:  # rows are moved as bytes
            self.weight = interleave_halves(weight.view(torch.uint8), head_dim).view(torch.float8_e4m3fn)
        else:
            self.weight = interleave_halves(weight, head_dim)
        self.scale = interleave_halves(scale[:, None], head_dim)[:, 0].contiguous()
        self._compute = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[compute]

    def shift_rows(self, shift: Tensor) -> Tensor:
        """shift W.T in this layout: float32 [..., K] -> float32 [..., out_features]; at load."""
        return (shift.float() @ self.weight.float().T) * self.scale

    def __call__(
        self,
        x: Tensor,
        factor: Tensor,
        shift: Tensor,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        tables: tuple[Tensor, Tensor],
        start: Tensor,
        *,
        eps: float = 1e-6,
        pdl: bool = False,
    ) -> None:
        """Fill ``q`` [M, heads, head_dim] and rows ``start``.. of the caches from the residual stream ``x`` [M, K].

        factor: [K], 1 + scale. shift: float32 [out_features] from `shift_rows`. The rest as in `rope_split`.
        """
        heads, kv_heads, head_dim = self.shape
        rows = x.shape[0]
        if x.shape[1] != self.width or not x.is_contiguous():
            raise InputError.at("qkv", "x", tuple(x.shape), f"contiguous [M, {self.width}]")
        block_n, block_k, warps, stages = plan_qkv(self.weight.shape[0], head_dim)
        block_k = min(block_k, triton.next_power_of_2(self.width))
        if self._compute is tl.float32:  # for checks: twice the bytes a stage
            stages = min(stages, 2)
        _fused_qkv_kernel[(self.weight.shape[0] // block_n, triton.cdiv(rows, 64))](
            x, self.weight, self.scale, factor, shift, q, k_cache, v_cache, *tables, start,
            rows, eps,
            K=self.width, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
            BLOCK_M=64, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, COMPUTE=self._compute, PDL=pdl,
            LINE=128 // self.weight.element_size(), num_warps=warps, **pdl_option(pdl),
        )  # fmt: skip
