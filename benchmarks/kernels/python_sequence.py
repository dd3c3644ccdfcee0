"""bf16 -> NVFP4 by a plain sequence of PyTorch operations, as a forward pass written in Python does it.

The baseline that the fused quantiser is compared with; nothing in the package calls it.
"""

from __future__ import annotations

import torch


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[M, K] bf16 -> (packed codes uint8 [M, K/2], E4M3 scales in the swizzled order, float32 global scale)."""
    m, k = x.shape
    wide = x.float()
    global_scale = wide.abs().amax() / (6.0 * 448.0)
    groups = wide.reshape(m, k // 16, 16) / global_scale
    scales = (groups.abs().amax(-1) / 6.0).clamp(max=448.0).to(torch.float8_e4m3fn)
    scaled = groups / scales.float().clamp(min=2.0**-9).unsqueeze(-1)
    magnitude = scaled.abs()
    index = torch.zeros_like(magnitude, dtype=torch.uint8)
    for position, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        index += (magnitude >= midpoint) if position % 2 else (magnitude > midpoint)
    codes = (index | (torch.signbit(scaled).to(torch.uint8) << 3)).reshape(m, k)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    rows, columns = -(-m // 128) * 128, -(-(k // 16) // 4) * 4
    padded = torch.zeros(rows, columns, dtype=torch.uint8, device=x.device)
    padded[:m, : k // 16] = scales.view(torch.uint8)
    swizzled = padded.reshape(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1).contiguous()
    return packed, swizzled, global_scale
