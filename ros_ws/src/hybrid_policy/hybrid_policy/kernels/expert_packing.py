"""Weights of the action expert in the order in which expert_gemm.cu's blocks and lanes read them.

A tile is ``BN`` rows; its K is cut into ``CLUSTER`` parts of ``KC``. Block ``tile * CLUSTER + rank`` reads one
contiguous piece: for each 16 rows (m tile), for each group of k steps of 16, 32 lanes × 16 bytes. Lane ``4g + t``
holds mma.m16n8k16's A fragment: element ``(k8, r8, e)`` is row ``g + 8 r8``, k ``2t + 8 k8 + e``::

    bf16   16 bytes = one k step:   (k8, r8, e), two bytes each
    E4M3   16 bytes = two k steps:  (step, k8, r8, e), one byte each
    NVFP4  16 bytes = four k steps, one 32-bit word each: nibble 4·e' .. of (k8, r8) at bit 4(2·k8 + r8) + 16·e

NVFP4's scales come apart: for each m tile and k step (a group of 16), g-major pairs (row g, row g + 8) of
bf16(scale · 2^119), so that the bits of a code, read as a bf16 (v · 2^-126), times that are exactly v · s · 2^-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: what is left of the exponents after decoding; goes into the row scale
NVFP4_FACTOR = 2.0**7


def _fragments(x: Tensor, bn: int, cluster: int) -> Tensor:
    """[N, K] -> [tile, rank, m tile, k step, g, t, k8, r8, e]."""
    n, k = x.shape
    parts = x.reshape(n // bn, bn // 16, 2, 8, cluster, k // cluster // 16, 2, 4, 2)
    return parts.permute(0, 4, 1, 5, 3, 7, 6, 2, 8)  # T mt r8 g CL ks k8 t e


def pack_bf16(weight: Tensor, bn: int, cluster: int) -> Tensor:
    """bf16 [N, K] -> uint8, flat."""
    return _fragments(weight, bn, cluster).contiguous().view(torch.uint8).flatten()


def pack_e4m3(values: Tensor, bn: int, cluster: int) -> Tensor:
    """float8_e4m3fn [N, K] -> uint8, flat: two k steps a lane's 16 bytes."""
    f = _fragments(values.view(torch.uint8), bn, cluster)
    f = f.unflatten(3, (-1, 2)).permute(0, 1, 2, 3, 5, 6, 4, 7, 8, 9)
    return f.contiguous().flatten()


def pack_nvfp4(codes: Tensor, bn: int, cluster: int) -> Tensor:
    """uint8 [N, K], one E2M1 code each -> uint8, flat: four k steps a lane's 16 bytes."""
    f = _fragments(codes, bn, cluster)
    f = f.unflatten(3, (-1, 4)).permute(0, 1, 2, 3, 5, 6, 4, 7, 8, 9)  # ..., g, t, step, k8, r8, e
    return nibbles_to_words(f).contiguous().view(torch.uint8).flatten()


def nibbles_to_words(codes: Tensor) -> Tensor:
    """[..., k8, r8, e], one E2M1 code each -> int32 [...]: the nibble of (k8, r8, e) at bit 4(2·k8 + r8) + 16·e."""
    shift = torch.tensor([[[0, 16], [4, 20]], [[8, 24], [12, 28]]], device=codes.device)
    words = (codes.to(torch.int64) << shift).sum((-3, -2, -1))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def wide_scales(scales: Tensor) -> Tensor:
    """float8_e4m3fn -> bf16(scale · 2^119), exact."""
    return (scales.float() * 2.0**119).to(torch.bfloat16)


def pack_scales(scales: Tensor, bn: int, cluster: int) -> Tensor:
    """float8_e4m3fn [N, K / 16] -> uint8, flat, of bf16(scale · 2^119)."""
    n, groups = scales.shape
    parts = wide_scales(scales).reshape(n // bn, bn // 16, 2, 8, cluster, groups // cluster)  # T mt r8 g CL ks
    return parts.permute(0, 4, 1, 5, 3, 2).contiguous().view(torch.uint8).flatten()
