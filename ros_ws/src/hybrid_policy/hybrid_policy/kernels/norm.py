"""What lies between two matrix products: residual, norm, modulation and quantisation in one pass.

For each row m of the residual stream x::

    x[m] <- x[m] + gate * (row[m] * y[m] + bias)        # y: the product before
    n     = x[m] * rsqrt(mean(x[m]^2) + eps)             # RMSNorm; LayerNorm subtracts the mean first
    out[m] = n * scale + shift                           # bf16, or FP8 E4M3 with one scale a row

``row`` is the scale of FP8 activations that the product left out. RMSNorm weights come in as ``1 + w``,
LayerNorm's and adaRMS's (1 + scale, shift) the same way, so one kernel serves the three parts of pi0.5.
The residual stream is float32: 36 additions in bf16 would cost more than the bf16 products do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import geglu_rows

E4M3_MAX = 448.0


def add_norm_reference(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    *,
    shift: Tensor | None = None,
    addend: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_squares: Tensor | None = None,
    clean: Tensor | None = None,
    layer_norm: bool = False,
    eps: float = 1e-6,
) -> None:
    """The mathematics of `add_norm`, in plain PyTorch; the same arguments and effects."""
    if clean is not None:
        first = (torch.arange(x.shape[0], device=x.device) < clean)[:, None]
        scale = torch.where(first, scale[1], scale[0])
        shift = None if shift is None else torch.where(first, shift[1], shift[0])
        gate = None if gate is None else torch.where(first, gate[1], gate[0])
    if addend is not None:
        y = addend.float()
        if row_scale is not None:
            y = y * row_scale[:, None]
        if bias is not None:
            y = y + bias.float()
        x += y * gate.float() if gate is not None else y
    wide = x.float()
    if layer_norm:
        wide = wide - wide.mean(-1, keepdim=True)
    result = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale.float()
    if shift is not None:
        result = result + shift.float()
    if out_squares is not None:
        out_squares.copy_(result.square().sum(-1))
    if out_scale is None:
        out.copy_(result)
    else:
        factor = result.abs().amax(-1) / E4M3_MAX
        factor = torch.where(factor == 0, torch.ones_like(factor), factor)
        out.copy_((result / factor[:, None]).clamp(-E4M3_MAX, E4M3_MAX))
        out_scale.copy_(factor)


@triton.jit
def _add_norm_kernel(
    x_ptr, out_ptr, scale_ptr, shift_ptr, y_ptr, row_ptr, bias_ptr, gate_ptr, out_scale_ptr, squares_ptr, clean_ptr,
    width, y_stride, eps,
    BLOCK: tl.constexpr, LAYER_NORM: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, QUANTISE: tl.constexpr,
    HAS_CLEAN: tl.constexpr, HAS_SQUARES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < width
    if HAS_CLEAN:  # the first rows take the second row of the modulation (flow time 0)
        other = tl.where(row < tl.load(clean_ptr), width, 0)
        scale_ptr += other
        shift_ptr += other
        if HAS_GATE:
            gate_ptr += other
    # What no predecessor writes is loaded before the wait.
    scale = tl.load(scale_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * width + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        y = tl.load(y_ptr + row * y_stride + col, mask=inside, other=0.0).to(tl.float32)
        if HAS_ROW:
            y = y * tl.load(row_ptr + row)
        if HAS_BIAS:
            y += bias
        if HAS_GATE:
            y *= gate
        x += y
        tl.store(x_ptr + row * width + col, x, mask=inside)
    if LAYER_NORM:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    squares = tl.sum(x * x, 0)
    result = x * tl.rsqrt(squares / width + eps) * scale
    if HAS_SHIFT:
        result += shift
    if HAS_SQUARES:
        tl.store(squares_ptr + row, tl.sum(result * result, 0))
    if QUANTISE:
        # NaN and Inf must not turn into numbers: in the row they make its scale NaN, in a weight they stay.
        factor = tl.max(tl.abs(result), 0) / 448.0
        factor = tl.where(factor == 0.0, 1.0, tl.maximum(factor, 1e-30))  # the inverse is finite
        factor = tl.where(squares < float("inf"), factor, float("nan"))
        tl.store(out_scale_ptr + row, factor)
        scaled = result * (1.0 / factor)
        result = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -448.0), 448.0), scaled)  # noqa: PLR0124
    tl.store(out_ptr + row * width + col, result.to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    *,
    shift: Tensor | None = None,
    addend: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_squares: Tensor | None = None,
    clean: Tensor | None = None,
    layer_norm: bool = False,
    eps: float = 1e-6,
    pdl: bool = False,
) -> None:
    """Add a product to the residual stream, and norm, modulate and (if asked) quantise the sum.

    Args:
        x: float32 [M, width], contiguous; changed in place where ``addend`` is given.
        out: [M, width], contiguous; bf16 or float32, or float8_e4m3fn with ``out_scale``.
        scale, shift: [width]; the norm's weight and bias, or the modulation.
        addend: [M, width], rows may be strided. row_scale: float32 [M], factor of its rows.
        bias, gate: [width], of the addend.
        out_scale: float32 [M], receives amax / 448 of each row; ``out`` must then be FP8.
        out_squares: float32 [M], receives the sum of each row's squares, before it is rounded.
        clean: int32 [1] on the device; scale, shift and gate are then [2, width], and rows
            below ``clean`` take the second of them.
        pdl: the launch may start before its predecessor ends.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    rows, width = x.shape
    _check("x", x, (rows, width), torch.float32)
    _check("out", out, (rows, width), torch.float8_e4m3fn if out_scale is not None else None)
    for name, vector in (("scale", scale), ("shift", shift), ("bias", bias), ("gate", gate)):
        if vector is not None:
            _check(name, vector, (width,) if clean is None or name == "bias" else (2, width), None)
    if clean is not None and shift is None:
        raise InputError("add_norm: clean: given without shift, expected both rows of the modulation")
    if addend is None and (row_scale is not None or bias is not None or gate is not None):
        raise InputError("add_norm: addend: None given with row_scale, bias or gate, expected an addend")
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        x, out, scale, shift, addend, row_scale, bias, gate, out_scale, out_squares, clean,
        width, 0 if addend is None else addend.stride(0), eps,
        BLOCK=block, LAYER_NORM=layer_norm, HAS_SHIFT=shift is not None, HAS_Y=addend is not None,
        HAS_ROW=row_scale is not None, HAS_BIAS=bias is not None, HAS_GATE=gate is not None,
        QUANTISE=out_scale is not None, HAS_CLEAN=clean is not None, HAS_SQUARES=out_squares is not None, PDL=pdl,
        num_warps=norm_warps(width), **pdl_option(pdl),
    )  # fmt: skip


def norm_warps(width: int) -> int:
    """Warps of one row: 16 elements a thread where the row is long enough, 4 to 8 warps."""
    return max(1, min(8, triton.next_power_of_2(width) // 256))


def pdl_option(pdl: bool) -> dict[str, bool]:
    """The launch option, only where it is wanted: the interpreter does not know it."""
    return {"launch_pdl": True} if pdl else {}


def geglu_reference(
    gate_up: Tensor, out: Tensor, *, row_scale: Tensor | None = None, out_scale: Tensor | None = None
) -> None:
    """The mathematics of `geglu`, in plain PyTorch."""
    wide = gate_up.float()
    if row_scale is not None:
        wide = wide * row_scale[:, None]
    gate, up = wide.chunk(2, -1)
    result = torch.nn.functional.gelu(gate, approximate="tanh") * up
    if out_scale is None:
        out.copy_(result)
    else:
        factor = result.abs().amax(-1) / E4M3_MAX
        factor = torch.where(factor == 0, torch.ones_like(factor), factor)
        out.copy_((result / factor[:, None]).clamp(-E4M3_MAX, E4M3_MAX))
        out_scale.copy_(factor)


@triton.jit
def _geglu(gate, up):
    # tanh(u) = 2 * sigmoid(2u) - 1, so gelu(g) = g * sigmoid(2u)
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(2.0 * inner) * up


@triton.jit
def _geglu_kernel(
    y_ptr, out_ptr, row_ptr, out_scale_ptr, width,
    BLOCK: tl.constexpr, HAS_ROW: tl.constexpr, QUANTISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(y_ptr + row * 2 * width + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y_ptr + row * 2 * width + width + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_ROW:
        factor = tl.load(row_ptr + row)
        gate *= factor
        up *= factor
    result = _geglu(gate, up)
    if QUANTISE:
        scale = tl.max(tl.abs(result), 0) / 448.0
        scale = tl.where(scale == 0.0, 1.0, scale)
        bad = tl.sum((result != result).to(tl.int32), 0) > 0  # noqa: PLR0124 (NaN)
        scale = tl.where(bad, float("nan"), scale)
        tl.store(out_scale_ptr + row, scale)
        result = tl.minimum(tl.maximum(result / scale, -448.0), 448.0)
    tl.store(out_ptr + row * width + col, result.to(out_ptr.dtype.element_ty), mask=inside)


def geglu(
    gate_up: Tensor,
    out: Tensor,
    *,
    row_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """gelu_tanh(gate) * up, in bf16 or straight into FP8 with one scale a row.

    Args:
        gate_up: [M, 2 * width], gate first; contiguous. row_scale: float32 [M], factor of its rows.
        out: [M, width], contiguous; float8_e4m3fn with ``out_scale`` float32 [M].

    Into FP8 geglu_rows.cu does it where it can (`geglu_rows.fits`): a Triton program holds too many registers.
    """
    rows, width = out.shape
    _check("gate_up", gate_up, (rows, 2 * width), None)
    _check("out", out, (rows, width), torch.float8_e4m3fn if out_scale is not None else None)
    quantise = out_scale is not None
    if out_scale is not None and geglu_rows.fits(gate_up, width):
        geglu_rows.launch(gate_up, out, row_scale, out_scale, pdl=pdl)
        return
    block = triton.next_power_of_2(width) if quantise else min(2048, triton.next_power_of_2(width))
    _geglu_kernel[(rows, 1 if quantise else triton.cdiv(width, block))](
        gate_up, out, row_scale, out_scale, width,
        BLOCK=block, HAS_ROW=row_scale is not None, QUANTISE=quantise, PDL=pdl,
        num_warps=32 if block > 8192 else max(1, min(8, block // 256)), **pdl_option(pdl),
    )  # fmt: skip


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_contiguous() or (dtype is not None and tensor.dtype != dtype):
        got = (tuple(tensor.shape), tensor.dtype, "contiguous" if tensor.is_contiguous() else "strided")
        raise InputError.at("kernel", name, got, f"contiguous {list(shape)}" + (f" {dtype}" if dtype else ""))


def quantise_rows_reference(x: Tensor, out: Tensor, out_scale: Tensor) -> None:
    """The mathematics of `quantise_rows`, in plain PyTorch."""
    factor = x.float().abs().amax(-1) / E4M3_MAX
    factor = torch.where(factor == 0, torch.ones_like(factor), factor)
    out.copy_((x.float() / factor[:, None]).clamp(-E4M3_MAX, E4M3_MAX))
    out_scale.copy_(factor)


@triton.jit
def _quantise_rows_kernel(x_ptr, out_ptr, scale_ptr, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * width + col, mask=col < width, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 0) / 448.0
    scale = tl.where(scale == 0.0, 1.0, scale)
    bad = tl.sum((x != x).to(tl.int32), 0) > 0  # noqa: PLR0124 (NaN)
    scale = tl.where(bad, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    x = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    tl.store(out_ptr + row * width + col, x.to(out_ptr.dtype.element_ty), mask=col < width)


def quantise_rows(x: Tensor, out: Tensor, out_scale: Tensor, *, pdl: bool = False) -> None:
    """FP8 with one scale a row: x [M, K] -> out float8_e4m3fn [M, K], out_scale float32 [M] = amax / 448."""
    rows, width = x.shape
    _check("x", x, (rows, width), None)
    _check("out", out, (rows, width), torch.float8_e4m3fn)
    block = triton.next_power_of_2(width)
    _quantise_rows_kernel[(rows,)](
        x, out, out_scale, width,
        BLOCK=block, PDL=pdl, num_warps=16 if block > 8192 else max(1, min(8, block // 256)), **pdl_option(pdl),
    )  # fmt: skip


def gelu_quantise_reference(y: Tensor, out: Tensor, scale: float) -> None:
    """The mathematics of `gelu_quantise`, in plain PyTorch."""
    wide = torch.nn.functional.gelu(y.float(), approximate="tanh") / scale
    out.copy_(wide.clamp(-E4M3_MAX, E4M3_MAX))


@triton.jit
def _gelu_quantise_kernel(y_ptr, out_ptr, inverse, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
    result = y * tl.sigmoid(2.0 * inner) * inverse
    result = tl.where(result == result, tl.minimum(tl.maximum(result, -448.0), 448.0), result)  # noqa: PLR0124 (NaN)
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=inside)


def gelu_quantise(y: Tensor, out: Tensor, scale: float, *, pdl: bool = False) -> None:
    """e4m3(gelu_tanh(y) / scale): y [M, N] contiguous -> out float8_e4m3fn [M, N]; NaN stays NaN."""
    _check("y", y, tuple(out.shape), None)
    _check("out", out, tuple(y.shape), torch.float8_e4m3fn)
    _gelu_quantise_kernel[(triton.cdiv(y.numel(), 2048),)](
        y, out, 1.0 / scale, y.numel(), BLOCK=2048, PDL=pdl, num_warps=4, **pdl_option(pdl)
    )
