"""Activation quantisers: bf16 -> NVFP4 or FP8 in one pass over a row, alone or behind an RMS norm.

NVFP4 activations: see nvfp4_activation.py. FP8 activations carry one power-of-two scale a token: see fp8.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.decode import fp8_scale, gelu_tanh, round_e4m3
from hybrid_policy.kernels.norm_output import NormOutput, norm_operands
from hybrid_policy.kernels.nvfp4 import GROUP
from hybrid_policy.kernels.nvfp4_activation import NVFP4Activation

#: Columns of one program of the epilogue kernel.
FINISH_COLUMNS = 1024


def norm_reference(
    x: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """Float32 ``x * rsqrt(mean(x^2) + eps) * factor + shift``: RMSNorm (factor 1 + w) and adaRMS."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * factor.float()
    return wide if shift is None else wide + shift.float()


@triton.jit
def _e4m3_byte(x):
    """E4M3 bits of non-negative float32 values up to 448, rounded to nearest even; NaN gives 0x7F."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # x + 1.5 * 2**14 has spacing 2**-9: its low mantissa bits are the subnormal's index.
    subnormal = (x + 24576.0).to(tl.int32, bitcast=True) & 15
    byte = tl.where(x < 0.015625, subnormal, tl.minimum(normal, 0x7E))
    return tl.where(x == x, byte, 0x7F)  # noqa: PLR0124 (NaN)


@triton.jit
def _e4m3_value(byte):
    """float32 of non-negative E4M3 bytes (int32); 0x7F is NaN."""
    exponent = byte >> 3
    mantissa = (byte & 7).to(tl.float32)
    power = ((tl.maximum(exponent, 1) + 117) << 23).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa, mantissa + 8.0) * power
    return tl.where(byte == 0x7F, float("nan"), value)


@triton.jit
def _e2m1_code(x):
    """E2M1 codes (int32) of float32 values, ties to even, saturating; NaN gives the code of 6."""
    magnitude = tl.where(x == x, tl.minimum(tl.abs(x), 6.0), 6.0)  # noqa: PLR0124 (NaN)
    bits = magnitude.to(tl.int32, bitcast=True)
    large = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - 252
    # Below 1 the spacing is 0.5: that of floats at 1.5 * 2**22.
    small = (magnitude + 6291456.0).to(tl.int32, bitcast=True) & 3
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(magnitude < 1.0, small, large) | sign


@triton.jit
def _quantize_rows(
    x_ptr, factor_ptr, shift_ptr, out_ptr, scale_ptr, row_scale_ptr, eps,
    M, K: tl.constexpr, BK: tl.constexpr, TO: tl.constexpr, SWIZZLE: tl.constexpr, PDL: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """One row a program: [norm] -> NVFP4, FP8 or bf16. ``BK``: K rounded up to a power of two."""
    row = tl.program_id(0)
    k = tl.arange(0, BK)
    mask = k < K
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * K + k, mask=mask, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps) * factor
        if shift_ptr is not None:
            x += tl.load(shift_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if TO == "bf16":
        tl.store(out_ptr + row * K + k, x.to(out_ptr.dtype.element_ty), mask=mask)
    elif TO == "fp8":
        scale, inverse = fp8_scale(tl.max(tl.abs(x), axis=0))
        scaled = x * inverse
        if EXACT:
            scaled = round_e4m3(scaled)
        tl.store(out_ptr + row * K + k, scaled.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(row_scale_ptr + row, scale)
    else:
        groups = x.reshape(BK // 16, 16)
        magnitude = tl.abs(groups)
        amax = tl.max(magnitude, axis=1)
        # max drops NaN on the hardware; the count of values that are not finite keeps it.
        bad = tl.sum((magnitude < float("inf")).to(tl.int32), axis=1) < 16
        row_scale, inverse = fp8_scale(tl.max(tl.where(bad, 0.0, amax), axis=0) * 0.16666667163372040)
        byte = _e4m3_byte(tl.minimum(tl.where(bad, 0.0, amax) * inverse * 0.16666667163372040, 448.0))
        value = _e4m3_value(byte)
        reciprocal = tl.where(byte > 0, tl.div_rn(1.0, tl.where(byte > 0, value, 1.0)), 0.0)
        code = _e2m1_code(groups * inverse * reciprocal[:, None])
        low, high = tl.split(code.reshape(BK // 2, 2))
        half = tl.arange(0, BK // 2)
        tl.store(out_ptr + row * (K // 2) + half, (low | (high << 4)).to(tl.uint8), mask=half < K // 2)
        group = tl.arange(0, BK // 16)
        if SWIZZLE:
            tiles: tl.constexpr = (K // 16 + 3) // 4
            at = (row // 128 * tiles + group // 4) * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
        else:
            at = row * (K // 16) + group
        tl.store(scale_ptr + at, tl.where(bad, 0x7F, byte).to(tl.uint8), mask=group < K // 16)
        tl.store(row_scale_ptr + row, row_scale)


@triton.jit
def _finish_rows(
    y_ptr, row_scale_ptr, bias_ptr, gate_ptr, residual_ptr, gate_shift_ptr, up_shift_ptr, out_ptr, out_scale_ptr,
    norm_factor_ptr, norm_ptr, squares_ptr, unit, M,
    N: tl.constexpr, BN: tl.constexpr, GEGLU: tl.constexpr, PDL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The epilogue behind a library's product: one row and BN outputs a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = n < N
    if GEGLU:
        both = tl.program_id(1) * BN * 2 + tl.arange(0, BN * 2)
        y = tl.load(y_ptr + row * N * 2 + both, mask=both < N * 2, other=0.0).to(tl.float32)
        if row_scale_ptr is not None:
            y = y * (tl.load(row_scale_ptr + row) * unit)
        g, u = tl.split(tl.permute(y.reshape(BN // 8, 2, 8), (0, 2, 1)))
        g = g.reshape(BN)
        u = u.reshape(BN)
        if gate_shift_ptr is not None:
            g += tl.load(gate_shift_ptr + n, mask=mask, other=0.0)
            u += tl.load(up_shift_ptr + n, mask=mask, other=0.0)
        y = gelu_tanh(g, EXACT) * u
        if out_scale_ptr is not None:
            y = y / tl.load(out_scale_ptr)
            if EXACT:
                y = round_e4m3(y)
    else:
        y = tl.load(y_ptr + row * N + n, mask=mask, other=0.0).to(tl.float32)
        if row_scale_ptr is not None:
            y = y * (tl.load(row_scale_ptr + row) * unit)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=mask, other=0.0)
        if gate_ptr is not None:
            y = y * tl.load(gate_ptr + n, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + row * N + n, mask=mask, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            if not EXACT:
                y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
            scaled = y * tl.load(norm_factor_ptr + n, mask=mask, other=0.0).to(tl.float32)
            tl.store(norm_ptr + row * N + n, scaled.to(norm_ptr.dtype.element_ty), mask=mask)
            tl.store(squares_ptr + tl.program_id(1) * M + row, tl.sum(tl.where(mask, y * y, 0.0), axis=0))
    tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), mask=mask)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 at import): the EXACT form is then taken."""
    return not isinstance(_quantize_rows, triton.runtime.JITFunction)


def _check_rows(x: torch.Tensor, factor: torch.Tensor | None, shift: torch.Tensor | None, multiple: int) -> None:
    if x.ndim != 2 or not x.is_contiguous() or x.dtype != torch.bfloat16 or x.shape[1] % multiple:
        got = f"{tuple(x.shape)} {x.dtype} strides {x.stride()}"
        raise InputError.at("activations", "x", got, f"contiguous bf16 [M, K] with K % {multiple} == 0")
    if x.shape[1] > 32768:
        raise InputError.at("activations", "x.shape[1]", x.shape[1], "at most 32768 columns (a row a program)")
    for name, vector in (("factor", factor), ("shift", shift)):
        if vector is not None and (tuple(vector.shape) != (x.shape[1],) or not vector.is_contiguous()):
            raise InputError.at("activations", name, tuple(vector.shape), f"contiguous ({x.shape[1]},)")
    if shift is not None and factor is None:
        raise InputError.at("activations", "factor", None, "a factor with the shift")


def _launch_rows(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    outputs: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    to: str,
    swizzled: bool,
    pdl: bool,
) -> None:
    m, k = x.shape
    block = max(32, triton.next_power_of_2(k))
    _quantize_rows[(m,)](
        x, factor, shift, *outputs, eps,
        m, k, block, to, swizzled, pdl, interpreted(),
        num_warps=4 if block <= 4096 else 8, launch_pdl=pdl,
    )  # fmt: skip


def quantize_nvfp4(
    x: torch.Tensor,
    out: NVFP4Activation,
    *,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
) -> NVFP4Activation:
    """bf16 [M, K] -> NVFP4 in one kernel, behind an RMS norm if ``factor`` [K] (and ``shift`` [K]) is given.

    ``out`` (see :meth:`NVFP4Activation.empty`) is filled and returned; its ``swizzled`` chooses the scales' order.

    Raises:
        InputError: a shape, dtype or layout that does not fit.
    """
    _check_rows(x, factor, shift, GROUP)
    if tuple(out.codes.shape) != (x.shape[0], x.shape[1] // 2):
        raise InputError.at("activations", "out.codes.shape", tuple(out.codes.shape), "[M, K/2] of x")
    _launch_rows(x, factor, shift, eps, (out.codes, out.scales, out.row_scale), "nvfp4", out.swizzled, pdl)
    return out


def quantize_fp8(
    x: torch.Tensor,
    values: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    factor: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [M, K] -> (E4M3 [M, K], float32 scales [M]) in one kernel, behind an RMS norm if ``factor`` is given.

    Raises:
        InputError: a shape, dtype or layout that does not fit.
    """
    _check_rows(x, factor, shift, 1)
    if values.shape != x.shape or values.dtype != torch.float8_e4m3fn or tuple(row_scale.shape) != (x.shape[0],):
        got = f"{tuple(values.shape)} {values.dtype}, {tuple(row_scale.shape)}"
        raise InputError.at("activations", "values, row_scale", got, "float8_e4m3fn [M, K], float32 [M]")
    _launch_rows(x, factor, shift, eps, (values, None, row_scale), "fp8", False, pdl)
    return values, row_scale


def rms_norm(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    factor: torch.Tensor,
    shift: torch.Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
) -> torch.Tensor:
    """bf16 [M, K] -> bf16 ``out``: the same kernel without the quantiser, for routes that need a normalised x."""
    _check_rows(x, factor, shift, 1)
    _launch_rows(x, factor, shift, eps, (out, None, None), "bf16", False, pdl)
    return out


def finish_rows(
    y: torch.Tensor,
    out: torch.Tensor,
    *,
    row_scale: torch.Tensor | None = None,
    unit: float = 1.0,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_out: NormOutput | None = None,
    pdl: bool = False,
) -> None:
    """``out = residual + gate * (y * row_scale * unit + bias)`` in one kernel, behind a library's product [M, N]."""
    m, n = y.shape
    _finish_rows[(m, triton.cdiv(n, FINISH_COLUMNS))](
        y, row_scale, bias, gate, residual, None, None, out, None, *norm_operands(norm_out), unit,
        m, n, FINISH_COLUMNS, False, pdl, interpreted(), num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


def finish_geglu(
    y: torch.Tensor,
    out: torch.Tensor,
    *,
    row_scale: torch.Tensor | None = None,
    unit: float = 1.0,
    gate_shift: torch.Tensor | None = None,
    up_shift: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """``out = gelu_tanh(gate) * up`` in one kernel; ``y`` [M, 2F], gate and up by eights; ``out`` [M, F]."""
    m, f = out.shape
    _finish_rows[(m, triton.cdiv(f, FINISH_COLUMNS))](
        y, row_scale, None, None, None, gate_shift, up_shift, out, out_scale, None, None, None, unit,
        m, f, FINISH_COLUMNS, True, pdl, interpreted(), num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
