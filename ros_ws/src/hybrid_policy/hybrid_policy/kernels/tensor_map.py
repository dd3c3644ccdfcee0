"""Tensor maps: what the bulk tensor copy engine (compute capability 9.0 and above) knows of a matrix."""

from __future__ import annotations

import ctypes
import functools

import torch

from hybrid_policy.kernels.nvrtc import _check, _driver

_TYPES = {torch.uint8: 0, torch.float8_e4m3fn: 0, torch.bfloat16: 9}
_SWIZZLE_128B, _PROMOTE_256B = 3, 3


def tensor_map(matrix: torch.Tensor, rows: int) -> bytes:
    """128 bytes: boxes of ``rows`` rows and 128 bytes of columns of a contiguous [M, K], 128-byte swizzle.

    What a box reads beyond the matrix is zero. K's bytes must be a multiple of 16.
    """
    return _encode(matrix.data_ptr(), matrix.shape[0], matrix.shape[1], matrix.dtype, rows)


@functools.lru_cache(maxsize=1024)
def _encode(address: int, m: int, k: int, dtype: torch.dtype, rows: int) -> bytes:
    size = dtype.itemsize
    storage = ctypes.create_string_buffer(128 + 64)
    aligned = (ctypes.addressof(storage) + 63) // 64 * 64
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        _TYPES[dtype],
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(k, m),
        (ctypes.c_uint64 * 1)(k * size),
        (ctypes.c_uint32 * 2)(128 // size, rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        _SWIZZLE_128B,
        _PROMOTE_256B,
        0,
    )
    _check(code, f"tensor map of [{m}, {k}] {dtype}")
    return ctypes.string_at(aligned, 128)
