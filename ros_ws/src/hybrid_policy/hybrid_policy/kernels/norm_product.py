"""A product in FP8, the residual and the LayerNorm behind it in one launch on Hopper: host side of norm_product.cu."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.hopper_product import product_source
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources
from hybrid_policy.kernels.tensor_map import tensor_map

SOURCES = kernel_sources("wgmma_common", "norm_product")
#: rows of a tile; blocks of a cluster, which have an eighth of the columns each
ROWS, CLUSTER = 64, 8
#: of 128 bytes of K in flight: what there is room for at 1152 columns
STAGES = 7
THREADS = 288
#: > 0: a wait gives up after so many polls, with wrong results instead of none (tests)
SPIN_LIMIT = 0
_FP8 = torch.float8_e4m3fn


def shared_bytes(n: int) -> int:
    """Of a block, for N columns, as norm_product.cu lays them out."""
    nt = n // CLUSTER
    normed, numbers = ROWS * (nt // 16 | 1) * 16, 2 * CLUSTER * (ROWS // 2 * 16 + 32)
    return STAGES * (ROWS + nt) * 128 + normed + numbers + 3 * nt * 4 + 8 * (2 * STAGES + ROWS // 16)


def macros(n: int, *, pdl: bool) -> dict[str, int]:
    """Of the source."""
    return {"NT": n // CLUSTER, "STAGES": STAGES, "PDL": int(pdl), "SHARED": shared_bytes(n)}


def prelude(n: int) -> str:
    """What comes before the sources: the product of a warpgroup's columns."""
    return product_source(1, n // CLUSTER // 2)


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_ubyte * 128),
        ("w", ctypes.c_ubyte * 128),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "weight", "shift", "out")),
        *((name, ctypes.c_int) for name in ("rows", "chunks")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
        ("pad", ctypes.c_ubyte * 8),  # to a multiple of 64
    ]


def fits(capability: tuple[int, int], n: int, k: int) -> bool:
    """Whether norm_product.cu takes an [N, K] there: Hopper, whole sixteens of columns in an eighth of a row that a
    block holds, whole 16-byte rows."""
    return capability == (9, 0) and n % 128 == 0 and n <= 1152 and k % 16 == 0


@functools.cache
def _kernel(n: int, pdl: bool, spin_limit: int, device: int) -> Kernel:
    return Kernel(
        SOURCES, "norm_product", macros(n, pdl=pdl) | {"SPIN_LIMIT": spin_limit}, threads=THREADS,
        shared=shared_bytes(n), pdl=pdl, specific=True, prelude=prelude(n),
    )  # fmt: skip


def norm_product(
    a: Tensor,
    weight: Tensor,
    scale: float,
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    bias: Tensor,
    *,
    eps: float = 1e-6,
    pdl: bool = False,
) -> Tensor:
    """x += a W.T * scale + bias, in place; returns LayerNorm(x) * norm[0] + norm[1].

    Args:
        a: [M, K], weight: [N, K], both float8_e4m3fn, contiguous.
        x: float32 [M, N], contiguous, the residual stream. bias: float32 [N].
        norm: float32 [N] each, weight and shift divided by the result's scale (`static_scales.folded`).

    Returns:
        float8_e4m3fn [M, N]. A row of x with NaN gives a row of NaN.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    (m, k), n = a.shape, weight.shape[0]
    whole = a.is_contiguous() and weight.is_contiguous()
    if weight.shape[1] != k or (a.dtype, weight.dtype) != (_FP8, _FP8) or not whole or not fits((9, 0), n, k):
        got = (tuple(a.shape), a.dtype, tuple(weight.shape), weight.dtype)
        expected = "contiguous float8_e4m3fn [M, K] and [N, K], K % 16 == 0, N % 128 == 0, N <= 1152"
        raise InputError.at("norm_product", "a, weight", got, expected)
    named = {"x": (x, (m, n)), "bias": (bias, (n,)), "norm weight": (norm[0], (n,)), "norm shift": (norm[1], (n,))}
    for name, (tensor, shape) in named.items():
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            given = (tuple(tensor.shape), tensor.dtype)
            raise InputError.at("norm_product", name, given, f"contiguous float32 {list(shape)}")
        if tensor.data_ptr() % 16:
            raise InputError.at("norm_product", name, f"address {tensor.data_ptr():#x}", "a multiple of 16")
    out = torch.empty(m, n, dtype=_FP8, device=a.device)
    arguments = _Arguments(
        x=x.data_ptr(), bias=bias.data_ptr(), weight=norm[0].data_ptr(), shift=norm[1].data_ptr(), out=out.data_ptr(),
        rows=m, chunks=math.ceil(k / 128), scale=scale, eps=eps,
    )  # fmt: skip
    ctypes.memmove(arguments.a, tensor_map(a, ROWS), 128)
    ctypes.memmove(arguments.w, tensor_map(weight, n // CLUSTER), 128)
    kernel = _kernel(n, pdl, SPIN_LIMIT, torch.cuda.current_device())
    kernel((math.ceil(m / ROWS) * CLUSTER, 1), arguments)
    return out


def norm_product_reference(
    a: Tensor, weight: Tensor, scale: float, x: Tensor, norm: tuple[Tensor, Tensor], bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The mathematics of `norm_product`, in float64: x as it will be, and its norm; x itself stays."""
    total = x.double() + a.double() @ weight.double().T * scale + bias.double()
    apart = total - total.mean(-1, keepdim=True)
    normed = apart * torch.rsqrt(apart.square().mean(-1, keepdim=True) + eps)
    return total, normed * norm[0].double() + norm[1].double()
