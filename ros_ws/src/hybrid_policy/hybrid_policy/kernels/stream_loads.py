"""What a program of ``stream_gemm`` reads: tiles of x and of weights in each format, and the weights' prefetch."""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_policy.kernels.decode import prefetch_lines


@triton.jit
def load_x(
    x_ptr,
    first,
    k0,
    M,
    K: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    EXACT: tl.constexpr,
):
    """x[first : first + BM, k0 : k0 + BK], zeros beyond [M, K]."""
    if TMA:
        x = x_ptr.load([first, k0])
    else:
        m = first + tl.arange(0, BM)
        k = k0 + tl.arange(0, BK)
        mask = (m < M)[:, None]
        if not EVEN_K:
            mask = mask & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0)
    if EXACT:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_rows(
    w_ptr,
    first,
    k0,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Row-major weights [BN, BK] of rows ``first``... and columns ``k0``..., zeros beyond [N, K]."""
    n = first + tl.arange(0, BN)
    k = k0 + tl.arange(0, BK)
    if TMA:
        w = w_ptr.load([first, k0])
    elif N % BN == 0 and EVEN_K:
        w = tl.load(w_ptr + n[:, None] * K + k[None, :])
    else:
        w = tl.load(w_ptr + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    return w


@triton.jit
def load_nvfp4(
    w_ptr,
    scale_ptr,
    first,
    k0,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
):
    """(words int32 [BN, BK/8], scales uint8 [BN, BK/16]) of rows ``first``... and columns ``k0``..."""
    if TMA:
        tl.static_assert(BK == 256)
        at = k0 // 256 * ROWS + first
        words = w_ptr.load([at, 0])
        scales = scale_ptr.load([at, 0])
    else:
        n = first + tl.arange(0, BN)
        k8 = k0 // 8 + tl.arange(0, BK // 8)
        k16 = k0 // 16 + tl.arange(0, BK // 16)
        words = tl.load(w_ptr + n[:, None] * 32 + ((k8 // 32) * (ROWS * 32) + k8 % 32)[None, :])
        scales = tl.load(scale_ptr + n[:, None] * 16 + ((k16 // 16) * (ROWS * 16) + k16 % 16)[None, :])
    return words, scales


@triton.jit
def prefetch_weights(
    w_ptr,
    scale_ptr,
    pid_n,
    k_begin,
    N: tl.constexpr,
    K: tl.constexpr,
    KS: tl.constexpr,
    BN: tl.constexpr,
    NVFP4: tl.constexpr,
    BYTES: tl.constexpr,
    LINES: tl.constexpr,
):
    """The first LINES cache lines of this program's weights (all of them if they are fewer)."""
    line = tl.arange(0, LINES)
    if NVFP4:
        slab = k_begin // 256 + line // BN
        row = pid_n * BN + line % BN
        prefetch_lines(w_ptr, (slab * N + row) * 128)
        # Sixteen bytes a row: one line in eight rows.
        few = tl.arange(0, LINES // 8)
        slab = k_begin // 256 + few // (BN // 8)
        prefetch_lines(scale_ptr, (slab * N + pid_n * BN + few % (BN // 8) * 8) * 16)
    else:
        per_row: tl.constexpr = KS * BYTES // 128
        row = pid_n * BN + line // per_row
        prefetch_lines(w_ptr, (row * K + k_begin) * BYTES + line % per_row * 128)
