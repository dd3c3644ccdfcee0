"""The loop kernel's weights: which rows and columns each block's each warp has, and the order of a warp's bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_policy.kernels import expert, expert_packing, packing

TILES, PARTS = 16, 8
WIDTH, FEATURES, HEADS, HEAD_DIM = 1024, 4096, 8, 256
#: stages with weights: rows, K, and k steps of 16 of a block
STAGES = {
    "qkv": ((HEADS + 2) * HEAD_DIM, WIDTH, 32),
    "o": (WIDTH, HEADS * HEAD_DIM, 16),
    "gate_up": (2 * FEATURES, WIDTH, 64),
    "down": (WIDTH, FEATURES, 32),
}
QKV_BLOCKS = STAGES["qkv"][0] // 64 * 2
#: k steps in 16 bytes of each lane of a warp, and bytes of a warp for them
SIXTEEN = {"bf16": (1, 512), "e4m3": (2, 512), "nvfp4": (4, 640), "w8a8": (2, 512)}
#: the macros' names of formats; w8a8: weights in E4M3, and activations too
FORMATS = expert.FORMATS | {"w8a8": 3}
#: warpgroups of a block, and their warps; a lane's loads, 16 bytes each, in a piece of the ring
GROUPS, WARPS, LOADS = 2, 8, 4


def steps_of(stage: str) -> int:
    """K steps of a warp in a stage."""
    return STAGES[stage][2] // GROUPS


def pieces(fmt: str, values: Tensor, scales: Tensor | None) -> Tensor:
    """Rows of W cut into a warp's shares of bulk copies: uint8 [N / 16, K / 16 / steps, bytes].

    Lane ``4g + t`` holds wgmma's A fragment of 16 rows and 16 k: element (k8, r8, e) is row ``2g + r8``, k
    ``2t + 8 k8 + e``. A share is `LOADS` times 512 bytes, of each lane 16. bf16: one k step, (k8, r8, e). E4M3:
    two k steps, four words (step, k8) of `e4m3_words`. w8a8: two k steps, four words (step, r8) of k ``4t`` to
    ``4t + 3``. NVFP4: four k steps, a word of `packing.pack_words` each; then as often 128 bytes of scales: for each g
    four words, one a k step, of bf16(scale · 2^119) of rows 2g (low) and 2g + 1.
    """
    n, k = values.shape
    raw = values.view(torch.uint8) if fmt in ("e4m3", "w8a8") else values
    if fmt == "w8a8":  # T g r8 S k16 t e -> T S g t k16 r8 e
        bytes_ = raw.reshape(n // 16, 8, 2, k // 32, 2, 4, 4).permute(0, 3, 1, 5, 4, 2, 6)
        return bytes_.reshape(n // 16, -1, LOADS * SIXTEEN[fmt][1])
    # T g r8 S k8 t e -> T S g t k8 r8 e
    f = raw.reshape(n // 16, 8, 2, k // 16, 2, 4, 2).permute(0, 3, 1, 5, 4, 2, 6)
    size = LOADS * SIXTEEN[fmt][1]
    if fmt == "bf16":
        return f.contiguous().view(torch.uint8).reshape(n // 16, -1, size)
    if fmt == "e4m3":
        words = e4m3_words(f).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)  # T I g t step k8
        return words.contiguous().view(torch.uint8).reshape(n // 16, -1, size)
    assert scales is not None
    words = packing.pack_words(f.flatten(-3))[..., 0]  # T S g t
    words = words.unflatten(1, (-1, 4)).permute(0, 1, 3, 4, 2)  # T I g t step
    codes = words.contiguous().view(torch.uint8).reshape(n // 16, -1, LOADS * 512)
    wide = expert_packing.wide_scales(scales).reshape(n // 16, 8, 2, -1, 4)  # T g r8 I step
    wide = wide.permute(0, 3, 1, 4, 2)  # T I g step r8
    return torch.cat((codes, wide.contiguous().view(torch.uint8).reshape(n // 16, -1, LOADS * 128)), -1)


def e4m3_words(codes: Tensor) -> Tensor:
    """Bytes of E4M3 [..., r8, e] -> int32 [...]: see `operand_of` in expert_loop_parts.cu."""
    wide = codes.to(torch.int64)
    first, second = wide[..., 0, :], wide[..., 1, :]
    half = (first & 0x80) << 8 | (first & 0x7F) << 4
    half |= (second & 0x80) << 4 | (second & 0x70) << 8 | second & 0x0F
    word = half[..., 0] | half[..., 1] << 16
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def shares(stage: str) -> tuple[Tensor, Tensor]:
    """Which 16 rows, and from which k step on, each block's each warp has: two int64 [128, warps]."""
    block, warp = torch.arange(TILES * PARTS)[:, None], torch.arange(WARPS)[None]
    tile, part = block // PARTS, block % PARTS
    pair, group, row_tile, steps = block // 2, warp // 4, warp % 4, STAGES[stage][2]
    if stage == "qkv":
        return pair * 4 + row_tile, part % 2 * steps + group * (steps // GROUPS)
    if stage == "gate_up":
        return pair * 8 + warp, (part % 2 * (steps // GROUPS)).expand(-1, WARPS)
    return (tile * 4 + row_tile).expand(len(block), -1), part * steps + group * (steps // GROUPS)
