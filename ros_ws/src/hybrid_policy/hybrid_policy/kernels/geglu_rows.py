"""GeGLU straight into FP8, a row a block, in CUDA C++: host side of geglu_rows.cu."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources

SOURCES = kernel_sources("geglu_rows")


class _Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("both", "row", "out", "out_scale")]


def plan_geglu(width: int) -> tuple[int, int] | None:
    """(threads a row, blocks a multiprocessor): at most 32 columns a thread; None where 8 a thread do not divide."""
    for threads in (512, 256, 128, 64, 32):
        if width % (8 * threads) == 0 and width // threads <= 32:
            return threads, min(16, 1536 // threads)
    return None


def fits(gate_up: Tensor, width: int) -> bool:
    """Whether geglu_rows.cu takes this: bf16 on a GPU that converts to FP8 (Ada or later), a width it divides."""
    return (
        gate_up.device.type == "cuda"
        and gate_up.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(gate_up.device) >= (8, 9)
        and plan_geglu(width) is not None
    )


def launch(gate_up: Tensor, out: Tensor, row_scale: Tensor | None, out_scale: Tensor, *, pdl: bool) -> None:
    """See `norm.geglu`, which checks the shapes: bf16 [M, 2 * width] -> float8_e4m3fn [M, width], float32 [M]."""
    rows, width = out.shape
    arguments = _Arguments(
        both=gate_up.data_ptr(),
        row=row_scale.data_ptr() if row_scale is not None else None,
        out=out.data_ptr(),
        out_scale=out_scale.data_ptr(),
    )
    _kernel(width, pdl, torch.cuda.current_device())((rows, 1), arguments)


@functools.cache
def _kernel(width: int, pdl: bool, device: int) -> Kernel:
    plan = plan_geglu(width)
    assert plan is not None
    threads, blocks = plan
    macros = {"WIDTH": width, "THREADS": threads, "BLOCKS": blocks, "PDL": int(pdl)}
    return Kernel(SOURCES, "geglu_rows", macros, threads=threads, shared=0, pdl=pdl)
