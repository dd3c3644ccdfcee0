"""The vendor library's products (cuBLAS through PyTorch), and the scratch that they need."""

from __future__ import annotations

import torch


class Scratch:
    """Buffers by name, shape and dtype, allocated at the first request and kept: none is made in a later call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The buffer of this name and shape."""
        key = (name, shape, dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return self.buffers[key]


def bf16_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` [M, N] = x [M, K] weight [N, K]^T, all bf16."""
    torch.mm(x, weight.t(), out=out)


def fp8_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``out`` bf16 [M, N] = (x x_scale[m]) (weight weight_scale[n])^T, E4M3 operands, scales float32 [M], [N]."""
    torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale.reshape(-1, 1),
        scale_b=weight_scale.reshape(1, -1),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        out=out,
    )


def nvfp4_product(
    x_codes: torch.Tensor,
    weight_codes: torch.Tensor,
    x_scales: torch.Tensor,
    weight_scales: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``out`` bf16 [M, N] of two NVFP4 operands on Blackwell's own block-scaled product.

    Codes uint8 [M, K/2] and [N, K/2]; scales 1-D E4M3 bytes in the swizzled order (nvfp4_activation.py). Row and
    global scales are the caller's to apply.
    """
    torch._scaled_mm(
        x_codes.view(torch.float4_e2m1fn_x2),
        weight_codes.view(torch.float4_e2m1fn_x2).t(),
        scale_a=x_scales.view(torch.float8_e4m3fn),
        scale_b=weight_scales.view(torch.float8_e4m3fn),
        out_dtype=torch.bfloat16,
        out=out,
    )
