"""Tensor maps: what the bulk tensor copy engine (compute capability 9.0 and above) knows of a matrix."""

from __future__ import annotations

import ctypes
import functools

import torch

from hybrid_policy.kernels.nvrtc import _check, _driver

_TYPES = {torch.uint8: 0, torch.float8_e4m3fn: 0, torch.bfloat16: 9}
_SWIZZLES = {32: 1, 64: 2, 128: 3}
_PROMOTE_256B = 3


def tensor_map(matrix: torch.Tensor, rows: int, *, columns: int = 128) -> bytes:
    """128 bytes: boxes of ``rows`` rows and 128 (or 64) bytes of columns of a contiguous [M, K], swizzled that wide.

    What a box reads beyond the matrix is zero, what it would write there is left. K's bytes must be a multiple of 16.
    """
    (m, k), size = matrix.shape, matrix.dtype.itemsize
    return _encode(matrix.data_ptr(), matrix.dtype, (k, m), (k * size,), (columns // size, rows), columns)


def paired_map(matrix: torch.Tensor, rows: int) -> bytes:
    """As `tensor_map` with M and ``rows`` multiples of 16; a box's rows come with 2i and 2i + 1 of a sixteen at i and
    i + 8. Its coordinates are (column, 0, 0, row / 16)."""
    (m, k), size = matrix.shape, matrix.dtype.itemsize
    shape, strides = (k, 8, 2, m // 16), (2 * k * size, k * size, 16 * k * size)
    return _encode(matrix.data_ptr(), matrix.dtype, shape, strides, (128 // size, 8, 2, rows // 16), 128)


def halves_map(matrix: torch.Tensor, head_dim: int) -> bytes:
    """128 bytes: boxes of 64 rows of one head of a contiguous [heads * head_dim, K], 128 bytes of columns, swizzled.

    Eights of the first half of a head's rows and of the second take turns: dims 8i to 8i + 7, then their partners, for
    four i. The coordinates are (column, 0, 0, i, head); head_dim is a multiple of 64.
    """
    (m, k), size = matrix.shape, matrix.dtype.itemsize
    half, row = head_dim // 2, k * size
    shape, strides = (k, 8, 2, half // 8, m // head_dim), (row, half * row, 8 * row, head_dim * row)
    return _encode(matrix.data_ptr(), matrix.dtype, shape, strides, (128 // size, 8, 2, 4, 1), 128)


def heads_map(matrix: torch.Tensor, head_dim: int, rows: int, columns: int) -> bytes:
    """128 bytes: boxes of ``rows`` rows and ``columns`` of one head of a contiguous [M, heads * head_dim], swizzled as
    wide as they are (32, 64 or 128 bytes). What a box reads beyond its head is zero. The coordinates are (column of the
    head, row, head); a head's bytes are a multiple of 16.
    """
    (m, k), size = matrix.shape, matrix.dtype.itemsize
    shape, strides = (head_dim, m, k // head_dim), (k * size, head_dim * size)
    return _encode(matrix.data_ptr(), matrix.dtype, shape, strides, (columns, rows, 1), columns * size)


@functools.lru_cache(maxsize=1024)
def _encode(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    """Innermost dimension first; ``strides`` in bytes, without its own."""
    rank = len(shape)
    storage = ctypes.create_string_buffer(128 + 64)
    aligned = (ctypes.addressof(storage) + 63) // 64 * 64
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        _TYPES[dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,
        _SWIZZLES[swizzle],
        _PROMOTE_256B,
        0,
    )
    _check(code, f"tensor map of {list(reversed(shape))} {dtype}")
    return ctypes.string_at(aligned, 128)
