"""FP8 W8A8 linear for few tokens on Hopper's warpgroup products: the host side of wgmma_linear.cu."""

from __future__ import annotations

import ctypes
import functools

import torch

from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources
from hybrid_policy.kernels.tensor_map import tensor_map
from hybrid_policy.kernels.wgmma_tiles import SHARED, LinearTile

SOURCES = kernel_sources("wgmma_common", "wgmma_linear")
#: Polls of a barrier after which a kernel traps instead of hanging; 0: never. Set by tests.
SPIN_LIMIT = 0
_KINDS = {None: 0, torch.bfloat16: 1, torch.float32: 2}


def product_source(nt: int) -> str:
    """C++ of ``product_fp8``: the asynchronous 64 x ``nt`` x 32 product of two shared operands."""
    count = nt // 2
    d = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{nt}k32.f32.e4m3.e4m3 {{{d}}}, %{count}, %{count + 1}, p, 1, 1;"
    return (
        f"__device__ __forceinline__ void product_fp8(float (&d)[{count}], unsigned long long a, "
        "unsigned long long b, unsigned int accumulate) {\n"
        f'asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n{instruction}\\n}}" '
        f': {outputs} : "l"(a), "l"(b), "r"(accumulate));\n}}\n'
    )


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("w", ctypes.c_ubyte * 128),
        ("x8", ctypes.c_ubyte * 128),
        *((name, ctypes.c_void_p) for name in ("x", "x_scale", "row_scale", "bias", "gate", "residual", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "columns", "x_scale_step")),
        ("pad", ctypes.c_ubyte * 56),  # to a multiple of 64
    ]


def macros(
    tile: LinearTile,
    *,
    given: bool,
    bias: bool,
    gate: torch.dtype | None,
    residual: torch.dtype | None,
    out: torch.dtype,
    pdl: bool,
) -> dict[str, int]:
    """What one configuration is compiled with."""
    return {
        "NT": tile.nt, "CLUSTER": tile.cluster, "GROUPS": tile.groups, "BLOCKS": tile.blocks, "GIVEN": int(given),
        "BIAS": int(bias), "GATE": _KINDS[gate], "RESIDUAL": _KINDS[residual], "OUT": _KINDS[out], "PDL": int(pdl),
        "WARPGROUPS": tile.warpgroups, "TRIGGER": tile.trigger, "SHARED": SHARED,
    }  # fmt: skip


@functools.cache
def _kernel(tile: LinearTile, options: tuple[tuple[str, int], ...], pdl: bool, device: int) -> Kernel:
    return Kernel(
        SOURCES, "wgmma_linear", dict(options), threads=128 * tile.warpgroups, shared=tile.shared_bytes(), pdl=pdl,
        specific=True, prelude=product_source(tile.nt),
    )  # fmt: skip


def launch(
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    tile: LinearTile,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """``out`` [M, N] = residual + gate * (x W^T + bias); the caller has checked the arguments.

    Args:
        weight: E4M3 [N, K]; row_scale: float32 [N].
        x: bf16 [M, K], or E4M3 with ``x_scale`` float32, one or [M].
        tile: of :func:`hybrid_policy.kernels.wgmma_tiles.linear_tile`.
    """
    m, k = x.shape
    n = weight.shape[0]

    def kind(tensor: torch.Tensor | None) -> torch.dtype | None:
        return None if tensor is None else tensor.dtype

    def at(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    options = macros(
        tile, given=x_scale is not None, bias=bias is not None, gate=kind(gate), residual=kind(residual),
        out=out.dtype, pdl=pdl,
    )  # fmt: skip
    arguments = _Arguments(
        x=at(x), x_scale=at(x_scale), row_scale=at(row_scale), bias=at(bias), gate=at(gate), residual=at(residual),
        out=at(out), tokens=m, rows=n, columns=k, x_scale_step=int(x_scale is not None and x_scale.numel() > 1),
    )  # fmt: skip
    ctypes.memmove(arguments.w, tensor_map(weight, 64), 128)
    if x_scale is not None:
        ctypes.memmove(arguments.x8, tensor_map(x, tile.nt), 128)
    macros_ = tuple((options | {"SPIN_LIMIT": SPIN_LIMIT}).items())
    kernel = _kernel(tile, macros_, pdl, torch.cuda.current_device())
    kernel((-(-n // 64) * tile.cluster, 1), arguments)
