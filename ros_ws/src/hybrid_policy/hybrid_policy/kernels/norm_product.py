"""A product, the residual and the LayerNorm behind it in one launch on Hopper: host side of norm_product.cu."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.hopper_product import product_source as plain_product_source
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources
from hybrid_policy.kernels.tensor_map import tensor_map

SOURCES = kernel_sources("wgmma_common", "norm_product")
#: blocks of a cluster: each has an eighth of a row; clusters of one block a multiprocessor that an H100 holds at once
CLUSTER = 8
CLUSTERS = 15
#: bytes of shared memory of a block on compute capability 9.0
SHARED = 232448
#: > 0: a wait gives up after so many polls, with wrong results instead of none (tests)
SPIN_LIMIT = 0
_TYPES = (torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class NormPlan:
    """A launch of norm_product.cu.

    Attributes:
        rows: of a tile, 64 or 128.
        spread: whether a cluster's blocks fetch an eighth of the rows' tile each for all of them (TMA multicast).
        stages: of 128 bytes of K in flight, at most; fewer where there is no room.
        halves: warpgroups that share a row, 1, or with 64 rows also 2.
    """

    rows: int
    spread: bool
    stages: int = 8
    halves: int = 1

    @property
    def threads(self) -> int:
        """Of a block: a warpgroup for 64 rows and a half, and a warp that copies."""
        return 2 * self.rows * self.halves + 32

    def columns(self, n: int) -> int:
        """Of a warpgroup."""
        return n // CLUSTER // self.halves

    def shared(self, n: int, stages: int, out_size: int) -> int:
        """Bytes of shared memory of a block with so many stages, as norm_product.cu lays them out."""
        nt = n // CLUSTER
        parts = CLUSTER * self.halves
        out_stride = (nt * out_size // 16 | 1) * 16
        numbers = parts * (self.rows // 2 * 16 + 32)
        barriers = 8 * (2 * stages + self.rows // 16)
        return stages * (self.rows + nt) * 128 + self.rows * out_stride + numbers + 3 * nt * 4 + barriers

    def depth(self, n: int, out_size: int) -> int:
        """Stages that there is room for, ``stages`` at most."""
        return next(s for s in range(self.stages, 0, -1) if self.shared(n, s, out_size) <= SHARED)

    def macros(self, n: int, size: int, out_size: int, *, pdl: bool) -> dict[str, int]:
        """Of the source: for N columns, operands of ``size`` bytes and h of ``out_size``."""
        stages = self.depth(n, out_size)
        return {
            "SIZE": size, "NT": n // CLUSTER, "ROWS": self.rows, "HALVES": self.halves, "STAGES": stages,
            "SPREAD": int(self.spread), "EIGHT": int(out_size == 1), "PDL": int(pdl),
            "SHARED": self.shared(n, stages, out_size),
        }  # fmt: skip


def plan_norm(m: int, k_bytes: int, processors: int = 132) -> NormPlan:
    """The launch for M rows: calculated, not measured.

    Tiles of 64 rows, or of 128 where the device does not hold the clusters of the former at once. Where K is long the
    rate of L2 and of shared memory counts: the rows' tile spread over the cluster, and read by one warpgroup. Where it
    is short, what comes behind the products does: two warpgroups.
    """
    rows, long = 64 if math.ceil(m / 64) <= CLUSTERS * processors // 132 else 128, k_bytes > 2304
    return NormPlan(rows, spread=long, halves=1 if long or rows == 128 else 2)


def product_source(plan: NormPlan, n: int, size: int) -> str:
    """C++ of ``product`` for a warpgroup's columns."""
    return plain_product_source(size, plan.columns(n))


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
    thread's registers hold, whole 16-byte rows of FP8."""
    return capability == (9, 0) and n % 128 == 0 and n <= 1152 and k % 16 == 0


@functools.cache
def _kernel(plan: NormPlan, n: int, size: int, out_size: int, pdl: bool, spin_limit: int, device: int) -> Kernel:
    macros = plan.macros(n, size, out_size, pdl=pdl)
    return Kernel(
        SOURCES, "norm_product", macros | {"SPIN_LIMIT": spin_limit}, threads=plan.threads, shared=macros["SHARED"],
        pdl=pdl, specific=True, prelude=product_source(plan, n, size),
    )  # fmt: skip


def norm_product(
    a: Tensor,
    weight: Tensor,
    scale: float,
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    bias: Tensor,
    dtype: torch.dtype,
    *,
    eps: float = 1e-6,
    pdl: bool = False,
    plan: NormPlan | None = None,
) -> Tensor:
    """x += a W.T * scale + bias, in place; returns LayerNorm(x) * norm[0] + norm[1].

    Args:
        a: [M, K], weight: [N, K], both bfloat16 or both float8_e4m3fn, contiguous.
        x: float32 [M, N], contiguous, the residual stream. norm, bias: float32 [N].
        dtype: of the result: bfloat16, or float8_e4m3fn, whose scale the norm's weight and shift come divided by
            (`static_scales.folded`).
        plan: instead of `plan_norm`'s.

    Returns:
        [M, N] of ``dtype``. A row of x with NaN gives a row of NaN.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    (m, k), n = a.shape, weight.shape[0]
    whole = a.is_contiguous() and weight.is_contiguous()
    if weight.shape[1] != k or a.dtype != weight.dtype or a.dtype not in _TYPES or not whole or not fits((9, 0), n, k):
        got = (tuple(a.shape), a.dtype, tuple(weight.shape), weight.dtype)
        expected = "contiguous [M, K] and [N, K] of one of bf16 and float8_e4m3fn, K % 16 == 0, N % 128 == 0, N <= 1152"
        raise InputError.at("norm_product", "a, weight", got, expected)
    named = {"x": (x, (m, n)), "bias": (bias, (n,)), "norm weight": (norm[0], (n,)), "norm shift": (norm[1], (n,))}
    for name, (tensor, shape) in named.items():
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            given = (tuple(tensor.shape), tensor.dtype)
            raise InputError.at("norm_product", name, given, f"contiguous float32 {list(shape)}")
        if tensor.data_ptr() % 16:
            raise InputError.at("norm_product", name, f"address {tensor.data_ptr():#x}", "a multiple of 16")
    if dtype not in _TYPES:
        raise InputError.at("norm_product", "dtype", dtype, "bfloat16 or float8_e4m3fn")
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    size = a.dtype.itemsize
    plan = plan or plan_norm(m, k * size, _processors(a.device.index))
    arguments = _Arguments(
        x=x.data_ptr(), bias=bias.data_ptr(), weight=norm[0].data_ptr(), shift=norm[1].data_ptr(), out=out.data_ptr(),
        rows=m, chunks=math.ceil(k * size / 128), scale=scale, eps=eps,
    )  # fmt: skip
    ctypes.memmove(arguments.a, tensor_map(a, plan.rows // CLUSTER if plan.spread else plan.rows), 128)
    ctypes.memmove(arguments.w, tensor_map(weight, n // CLUSTER), 128)
    kernel = _kernel(plan, n, size, dtype.itemsize, pdl, SPIN_LIMIT, torch.cuda.current_device())
    kernel((math.ceil(m / plan.rows) * CLUSTER, 1), arguments)
    return out


def norm_product_reference(
    a: Tensor, weight: Tensor, scale: float, x: Tensor, norm: tuple[Tensor, Tensor], bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The mathematics of `norm_product`, in float64: x as it will be, and its norm; x itself stays."""
    total = x.double() + a.double() @ weight.double().T * scale + bias.double()
    apart = total - total.mean(-1, keepdim=True)
    normed = apart * torch.rsqrt(apart.square().mean(-1, keepdim=True) + eps)
    return total, normed * norm[0].double() + norm[1].double()


@functools.cache
def _processors(device: int | None) -> int:
    return int(torch.cuda.get_device_properties(device or 0).multi_processor_count)
