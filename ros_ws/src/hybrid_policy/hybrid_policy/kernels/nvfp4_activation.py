"""NVFP4 activations: their form, the scales' order that Blackwell's products want, and the reference quantiser.

Beside the E4M3 scale a group of 16 they carry one power-of-two scale a token, so that no pass over the whole tensor
is needed: ``x[m, k] = e2m1 * e4m3(scale[m, k // 16]) * row_scale[m]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_policy.kernels import fp8, nvfp4
from hybrid_policy.kernels.nvfp4 import GROUP


@dataclass(frozen=True)
class NVFP4Activation:
    """Quantised activations [M, K].

    Attributes:
        codes: uint8 [M, K / 2], even k in the low nibble.
        scales: E4M3 bytes, uint8: [M, K / 16], or 1-D in the hardware's order (see :func:`swizzled_size`).
        row_scale: float32 [M].
        swizzled: which of the two orders ``scales`` has.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    row_scale: torch.Tensor
    swizzled: bool

    @classmethod
    def empty(cls, m: int, k: int, device: torch.device | str, *, swizzled: bool) -> NVFP4Activation:
        """Buffers for ``activations.quantize_nvfp4``; swizzled scales start at zero (padding is never written)."""
        codes = torch.empty((m, k // 2), dtype=torch.uint8, device=device)
        if swizzled:
            scales = torch.zeros(swizzled_size(m, k), dtype=torch.uint8, device=device)
        else:
            scales = torch.empty((m, k // GROUP), dtype=torch.uint8, device=device)
        return cls(codes, scales, torch.empty(m, dtype=torch.float32, device=device), swizzled)


def swizzled_size(m: int, k: int) -> int:
    """Bytes of the scales of [m, k] in the order of Blackwell's block-scaled products (cuBLAS's 32x4x4 swizzle).

    Scales [m, k / 16] are cut into tiles of 128 x 4, row-major, padded; within a tile the byte of (r, c) lies at
    ``(r % 32) * 16 + (r // 32) * 4 + c``.
    """
    return -(-m // 128) * 128 * (-(-(k // GROUP) // 4) * 4)


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """[M, C] bytes -> 1-D bytes in the order of :func:`swizzled_size`."""
    m, c = scales.shape
    tiles_m, tiles_c = -(-m // 128), -(-c // 4)
    padded = torch.nn.functional.pad(scales, (0, tiles_c * 4 - c, 0, tiles_m * 128 - m))
    return padded.reshape(tiles_m, 4, 32, tiles_c, 4).permute(0, 3, 2, 1, 4).reshape(-1).contiguous()


def unswizzle(flat: torch.Tensor, m: int, c: int) -> torch.Tensor:
    """The inverse of :func:`swizzle`: [m, c]."""
    tiles_m, tiles_c = -(-m // 128), -(-c // 4)
    wide = flat.reshape(tiles_m, tiles_c, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(tiles_m * 128, tiles_c * 4)
    return wide[:m, :c].contiguous()


def nvfp4_reference(x: torch.Tensor) -> NVFP4Activation:
    """The mathematics of ``activations.quantize_nvfp4``, bit for bit: [M, K] -> codes and scales, max rule.

    A NaN or an Inf in a group makes the group's scale NaN (byte 0x7F).
    """
    m, k = x.shape
    groups = x.float().reshape(m, k // GROUP, GROUP)
    amax = groups.abs().amax(-1)
    # The largest group scale then is at most 448 = E4M3's largest; finite parts only decide it.
    row = fp8.power_of_two_scale(amax.nan_to_num(0.0, posinf=0.0).amax(-1) * (1.0 / nvfp4.E2M1_MAX))
    unscaled = groups * row.reciprocal()[:, None, None]
    scale = (unscaled.abs().amax(-1) * (1.0 / nvfp4.E2M1_MAX)).clamp(max=nvfp4.E4M3_MAX).to(torch.float8_e4m3fn)
    wide = scale.float()
    inverse = torch.where(wide > 0, wide.reciprocal(), torch.zeros_like(wide))
    codes = nvfp4.encode_e2m1(unscaled * inverse.unsqueeze(-1))
    bytes_ = torch.where(torch.isfinite(amax), scale.view(torch.uint8), 0x7F)
    return NVFP4Activation(nvfp4.pack_codes(codes.reshape(m, k)), bytes_, row, swizzled=False)


def nvfp4_dequantize(activation: NVFP4Activation) -> torch.Tensor:
    """Float32 [M, K]."""
    m, half = activation.codes.shape
    scales = activation.scales
    if activation.swizzled:
        scales = unswizzle(scales, m, half * 2 // GROUP)
    wide = scales.contiguous().view(torch.float8_e4m3fn).float().repeat_interleave(GROUP, dim=-1)
    return nvfp4.decode_e2m1(nvfp4.unpack_codes(activation.codes)) * wide * activation.row_scale[:, None]
