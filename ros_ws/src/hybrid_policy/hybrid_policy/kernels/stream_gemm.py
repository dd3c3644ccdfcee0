"""The small-M product: activations stay, weights stream through once. One kernel, three weight formats.

``y = x W^T`` for x [M, K] bf16 (or FP8 with one scale) and W in bf16, FP8 (a scale a row) or NVFP4 (slabs, see
packing.py), with the epilogues that the model needs. A program computes ``BM (+ BM2)`` tokens x ``BN`` weight rows.

- NVFP4 is decoded between load and tensor core, so W never exists in bf16 outside the chip.
- FP8 weights get activations quantised as they are loaded: one scale a token and ``BK`` = 128 columns, partial
  products scaled in float32. No quantisation kernel runs, and the scale is finer than one a token.
- SWAP makes W the register operand (A) of the tensor core and x^T the shared one: the product runs asynchronously
  under the next tile's decode. Without SWAP, W is decoded into shared memory, which all warps then share.
- SPLIT > 1 cuts K; each part writes a float32 tile, waits for the others, and adds its share of the rows of all parts
  in their order (the result does not depend on timing) before the epilogue.
- PDL: weights are prefetched into L2 before the wait for the preceding kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybrid_policy.kernels.decode import fp8_group, gelu_tanh, load_acquire, nvfp4_tile, round_e4m3
from hybrid_policy.kernels.stream_loads import load_nvfp4, load_rows, load_x, prefetch_weights


@triton.jit
def _product(x, w, acc, SWAP: tl.constexpr, EXACT: tl.constexpr):
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision=precision)
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision=precision)


@triton.jit
def _product_fp8(x, w, acc, SWAP: tl.constexpr, X_FP8: tl.constexpr, EXACT: tl.constexpr):
    """acc + (E4M3 of x) W^T; x bf16 is quantised here by token."""
    if X_FP8:
        quantized = x
    else:
        quantized, scale = fp8_group(x.to(tl.float32), EXACT)
    if EXACT:
        w = w.to(tl.float32)
    # A fresh accumulator each group: the hardware's own FP8 accumulation keeps only some 14 bits.
    if SWAP:
        part = tl.dot(w, tl.trans(quantized), input_precision="ieee")
        if X_FP8:
            return acc + part
        else:
            return acc + part * scale[None, :]
    else:
        part = tl.dot(quantized, tl.trans(w), input_precision="ieee")
        if X_FP8:
            return acc + part
        else:
            return acc + part * scale[:, None]


@triton.jit
def _finish(
    acc,
    m,
    pid_n,
    row_scale_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    out_scale_ptr,
    gate_shift_ptr,
    up_shift_ptr,
    norm_factor_ptr,
    norm_ptr,
    squares_ptr,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GEGLU: tl.constexpr,
    TILES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The epilogue on a float32 [BM, BN]."""
    n = pid_n * BN + tl.arange(0, BN)
    if row_scale_ptr is not None:
        acc = acc * tl.load(row_scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if TILES > 0:
        tile = tl.arange(0, TILES)
        sums = tl.load(squares_ptr + tile[None, :] * M + m[:, None], mask=(m < M)[:, None], other=1.0)
        acc = acc * tl.rsqrt(tl.sum(sums, axis=1) / K + eps)[:, None]
    if GEGLU:
        F: tl.constexpr = N // 2
        f = pid_n * (BN // 2) + tl.arange(0, BN // 2)
        gate, up = tl.split(tl.permute(acc.reshape(BM, BN // 16, 2, 8), (0, 1, 3, 2)))
        gate = gate.reshape(BM, BN // 2)
        up = up.reshape(BM, BN // 2)
        if gate_shift_ptr is not None:
            gate += tl.load(gate_shift_ptr + f, mask=f < F, other=0.0)[None, :]
            up += tl.load(up_shift_ptr + f, mask=f < F, other=0.0)[None, :]
        y = gelu_tanh(gate, EXACT) * up
        mask = (m < M)[:, None] & (f < F)[None, :]
        at = m[:, None] * F + f[None, :]
        if out_scale_ptr is not None:
            y = y / tl.load(out_scale_ptr)
            if EXACT:
                y = round_e4m3(y)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mask = (m < M)[:, None] & (n < N)[None, :]
        at = m[:, None] * N + n[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
        if gate_ptr is not None:
            acc = acc * tl.load(gate_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
        if norm_ptr is not None:
            # The next norm sees what was stored.
            if not EXACT:
                acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32)
            factor = tl.load(norm_factor_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(norm_ptr + at, (acc * factor[None, :]).to(norm_ptr.dtype.element_ty), mask=mask)
            total = tl.sum(tl.where((n < N)[None, :], acc * acc, 0.0), axis=1)
            tl.store(squares_ptr + pid_n * M + m, total, mask=m < M)


@triton.jit
def _sum_parts(partial_ptr, plane, m, n, width: tl.constexpr, SPLIT: tl.constexpr):
    """The parts' tiles added in the order of the parts, whoever adds them."""
    at = m[:, None] * width + n[None, :]
    acc = tl.load(partial_ptr + at, cache_modifier=".cg")
    for other in tl.static_range(1, SPLIT):
        acc += tl.load(partial_ptr + other * plane + at, cache_modifier=".cg")
    return acc


@triton.jit
def stream_gemm(
    x_ptr,
    x2_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    x_scale_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    out_scale_ptr,
    gate_shift_ptr,
    up_shift_ptr,
    norm_factor_ptr,
    norm_ptr,
    squares_ptr,
    partial_ptr,
    counter_ptr,
    prefetch_ptr,
    prefetch_scale_ptr,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GEGLU: tl.constexpr,
    BM: tl.constexpr,
    BM2: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    X_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TRIGGER: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """See the module. Grid: (token tiles * row tiles * SPLIT,), token tiles fastest so that weights are read once.

    N counts weight rows (gate and up by eights, see packing.py, when GEGLU); NVFP4 slabs have a multiple of 128 rows.
    """
    X_FP8: tl.constexpr = x_scale_ptr is not None
    NVFP4: tl.constexpr = FORMAT == "nvfp4"
    KS: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK) * BK
    # One step in all: the whole tile of weights is loaded before the wait.
    EARLY: tl.constexpr = PDL and KS == BK and not NVFP4
    EVEN_K: tl.constexpr = K % (SPLIT * BK) == 0
    ROWS: tl.constexpr = (N + 127) // 128 * 128
    m_tiles = (M + BM + BM2 - 1) // (BM + BM2)
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    part = pid % SPLIT
    pid_m = (pid // SPLIT) % m_tiles
    pid_n = pid // (SPLIT * m_tiles)
    k_begin = part * KS
    if PDL:
        if PREFETCH > 0:
            if NVFP4:
                prefetch_weights(prefetch_ptr, prefetch_scale_ptr, pid_n, k_begin, ROWS, K, KS, BN, True, 0, PREFETCH)
            else:
                size: tl.constexpr = prefetch_ptr.dtype.element_ty.primitive_bitwidth // 8
                prefetch_weights(prefetch_ptr, prefetch_ptr, pid_n, k_begin, N, K, KS, BN, False, size, PREFETCH)
        if TRIGGER == 0:
            gdc_launch_dependents()
        if EARLY:
            w_early = load_rows(w_ptr, pid_n * BN, k_begin, N, K, BN, BK, EVEN_K, TMA_W)
        gdc_wait()
    n = pid_n * BN + tl.arange(0, BN)
    first = pid_m * (BM + BM2)
    m = first + tl.arange(0, BM)
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    if BM2 > 0:
        tl.static_assert(SWAP)
        m2 = first + BM + tl.arange(0, BM2)
        acc2 = tl.zeros((BN, BM2), tl.float32)
    for step in tl.range(0, KS // BK, num_stages=STAGES):
        k0 = k_begin + step * BK
        x = load_x(x_ptr, first, k0, M, K, BM, BK, EVEN_K, TMA_X, EXACT)
        if BM2 > 0:
            x2 = load_x(x2_ptr, first + BM, k0, M, K, BM2, BK, EVEN_K, TMA_X, EXACT)
        if NVFP4:
            words, scales = load_nvfp4(w_ptr, scale_ptr, pid_n * BN, k0, ROWS, BN, BK, TMA_W)
            w = nvfp4_tile(words, scales, BN, BK, EXACT)
        else:
            if EARLY:  # noqa: SIM108 (w_early exists only then)
                w = w_early
            else:
                w = load_rows(w_ptr, pid_n * BN, k0, N, K, BN, BK, EVEN_K, TMA_W)
            if EXACT:
                w = w.to(tl.float32)
        if FORMAT == "fp8":
            acc = _product_fp8(x, w, acc, SWAP, X_FP8, EXACT)
        else:
            # The wider product last: it is the one still running under the next tile's decode.
            if BM2 > 0:
                acc2 = _product(x2, w, acc2, SWAP, EXACT)
            acc = _product(x, w, acc, SWAP, EXACT)
    if PDL and TRIGGER == 1:
        gdc_launch_dependents()
    if SWAP:
        acc = tl.trans(acc)
    if X_FP8:
        if X_ROWS:  # noqa: SIM108 (a vector or a scalar)
            acc = acc * tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[:, None]
        else:
            acc = acc * tl.load(x_scale_ptr)
    if SPLIT > 1:
        # The part's tile, row-major [SPLIT, m_tiles * BM, n_tiles * BN].
        width: tl.constexpr = n_tiles * BN
        plane = m_tiles * BM * width
        tl.store(partial_ptr + part * plane + m[:, None] * width + n[None, :], acc)
        tl.debug_barrier()
        counter = counter_ptr + pid_n * m_tiles + pid_m
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if EXACT:
            # Programs run one after another: the last to arrive finishes the whole tile.
            if arrived % SPLIT == SPLIT - 1:
                acc = _sum_parts(partial_ptr, plane, m, n, width, SPLIT)
                _finish(
                    acc, m, pid_n, row_scale_ptr, out_ptr, bias_ptr, residual_ptr, gate_ptr, out_scale_ptr,
                    gate_shift_ptr, up_shift_ptr, norm_factor_ptr, norm_ptr, squares_ptr, M, eps, N, K, BM, BN, GEGLU,
                    TILES, EXACT,
                )  # fmt: skip
        else:
            # Each part waits for the others and finishes its share of the rows. The counter only ever grows (and may
            # wrap); SPLIT is a power of two. The parts of a tile have consecutive program ids, which the hardware
            # dispatches in order: at most one tile of a launch can be waiting for a part that has no place yet.
            wanted = (arrived & -SPLIT) + SPLIT
            seen = arrived + 1
            while seen - wanted < 0:
                seen = load_acquire(counter)
            tl.debug_barrier()
            SHARE: tl.constexpr = BM // SPLIT
            mine = first + part * SHARE + tl.arange(0, SHARE)
            acc = _sum_parts(partial_ptr, plane, mine, n, width, SPLIT)
            _finish(
                acc, mine, pid_n, row_scale_ptr, out_ptr, bias_ptr, residual_ptr, gate_ptr, out_scale_ptr,
                gate_shift_ptr, up_shift_ptr, norm_factor_ptr, norm_ptr, squares_ptr, M, eps, N, K, SHARE, BN, GEGLU,
                TILES, EXACT,
            )  # fmt: skip
    else:
        _finish(
            acc, m, pid_n, row_scale_ptr, out_ptr, bias_ptr, residual_ptr, gate_ptr, out_scale_ptr,
            gate_shift_ptr, up_shift_ptr, norm_factor_ptr, norm_ptr, squares_ptr, M, eps, N, K, BM, BN, GEGLU,
            TILES, EXACT,
        )  # fmt: skip
        if BM2 > 0:
            _finish(
                tl.trans(acc2), m2, pid_n, row_scale_ptr, out_ptr, bias_ptr, residual_ptr, gate_ptr,
                out_scale_ptr, gate_shift_ptr, up_shift_ptr, norm_factor_ptr, norm_ptr, squares_ptr, M, eps, N, K, BM2,
                BN, GEGLU, TILES, EXACT,
            )  # fmt: skip
