"""The order in which NVFP4 weights lie in memory for the W4A16 kernel, and its exact inverse.

Slabs. A matrix [N, K] is cut along K into slabs of 256, K padded with zeros to whole slabs::

    words  int32 [K / 256, N, 32]     a row of a slab is 128 bytes: one cache line
    scales uint8 [K / 256, N, 16]     E4M3 bytes of the row's 16 groups

so the tile of any row range is contiguous, and can be prefetched line by line.

Words. One int32 holds eight neighbouring k: k = 2g in its low half and k = 2g + 1 in its high half, g = 0..3. The
kernel wants pair g as two bfloat16 whose sign lies at bit 15 and whose index (e1 e0 m) lies at bits 8..6: that is
v * 2**-126 exactly, subnormals included. With M = 0x81C081C0 the four pairs come out of one word w in nine integer
instructions (each ``(a ^ b) & M`` is one LOP3)::

    pair 0 =  w                    & M
    pair 1 = ((w << 3) ^ (w << 2)) & M
    pair 2 =  (w << 6)             & M
    pair 3 = ((w << 1) ^ (w >> 4)) & M

Sixteen bits a half leave no room for four disjoint fields of that shape (no four translations of bits {15, 8, 7, 6}
tile sixteen), hence the exclusive-ors: the packer below solves them for the bits of w, high half first, because the
right shift brings bit 3 of the high half into the sign of the low half's pair 3::

    w15 = s0      w8..w6 = v0     w9 = s2      w2..w0 = v2
    w5 = v1.2 ^ w6     w4 = v1.1 ^ w5     w3 = v1.0 ^ w4
    w12 = v3.2 ^ w7    w11 = v3.1 ^ w6    w10 = v3.0 ^ w5
    w13 = s1 ^ w12     w14 = s3 ^ (w19 for the low half, 0 for the high half)

Considered and left: natural nibbles (8 to 9 instructions a weight instead of 1.6); a fragment-order layout for the
register operand of wgmma, which spreads each group's scale over four lanes (3.2 to 4.4).
"""

from __future__ import annotations

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.nvfp4 import GROUP, NVFP4Tensor, pack_codes, unpack_codes

SLAB = 256
MASK = 0x81C081C0


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes uint8 [..., 8 * J] -> int32 words [..., J]."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8).to(torch.int64)
    high = _pack_half(eight[..., 1::2], None)
    low = _pack_half(eight[..., 0::2], high)
    word = low | (high << 16)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _pack_half(codes: torch.Tensor, high: torch.Tensor | None) -> torch.Tensor:
    """The sixteen bits of one half from its four codes [..., 4]; ``high`` is the other half for the low one."""

    def bit(pair: int, position: int) -> torch.Tensor:
        return (codes[..., pair] >> position) & 1

    w: dict[int, torch.Tensor] = {15: bit(0, 3), 9: bit(2, 3)}
    for i in range(3):
        w[6 + i], w[i] = bit(0, i), bit(2, i)
    w[5] = bit(1, 2) ^ w[6]
    w[4] = bit(1, 1) ^ w[5]
    w[3] = bit(1, 0) ^ w[4]
    w[12] = bit(3, 2) ^ w[7]
    w[11] = bit(3, 1) ^ w[6]
    w[10] = bit(3, 0) ^ w[5]
    w[13] = bit(1, 3) ^ w[12]
    w[14] = bit(3, 3) ^ (0 if high is None else (high >> 3) & 1)
    return sum((value << position for position, value in w.items()), torch.zeros_like(w[15]))


def pair_words(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four pairs of each word as the kernel computes them, int64 holding 32 bits (two bfloat16 patterns)."""
    w = words.to(torch.int64) & 0xFFFFFFFF
    return w & MASK, ((w << 3) ^ (w << 2)) & MASK, (w << 6) & MASK, ((w << 1) ^ (w >> 4)) & MASK


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """int32 words [..., J] -> codes uint8 [..., 8 * J]; the inverse of :func:`pack_words`."""
    halves = []
    for pair in pair_words(words):
        for shift in (0, 16):
            half = pair >> shift
            halves.append(((half >> 6) & 7) | ((half >> 12) & 8))
    return torch.stack(halves, dim=-1).flatten(-2).to(torch.uint8)


def prepack(tensor: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(words int32 [S, N, 32], scales uint8 [S, N, 16]) of a matrix [N, K], S = ceil(K / 256)."""
    n, k = tensor.shape
    slabs = -(-k // SLAB)
    codes = torch.nn.functional.pad(unpack_codes(tensor.codes), (0, slabs * SLAB - k))
    words = pack_words(codes).reshape(n, slabs, SLAB // 8).transpose(0, 1).contiguous()
    scales = torch.nn.functional.pad(tensor.scales.view(torch.uint8), (0, (slabs * SLAB - k) // GROUP))
    return words, scales.reshape(n, slabs, SLAB // GROUP).transpose(0, 1).contiguous()


def unprepack(words: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor, k: int) -> NVFP4Tensor:
    """The exact inverse of :func:`prepack` for a matrix of ``k`` columns."""
    n = words.shape[1]
    codes = unpack_words(words.transpose(0, 1).reshape(n, -1))[:, :k]
    scale_bytes = scales.transpose(0, 1).reshape(n, -1)[:, : k // GROUP].contiguous()
    return NVFP4Tensor(pack_codes(codes), scale_bytes.view(torch.float8_e4m3fn), global_scale)


def interleave_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows gate 0..7, up 0..7, gate 8..15, up 8..15, …

    A tile holds both halves of each GeGLU output, and so does each thread: tensor-core accumulators give a thread rows
    r and r + 8 (weights as A) or columns c and c + 8 (weights as B). Row counts are multiples of 8.
    """
    n = gate.shape[0]
    if n % 8:
        raise InputError.at("gate_up", "features", n, "a multiple of 8")
    eights = torch.stack((gate.reshape(n // 8, 8, -1), up.reshape(n // 8, 8, -1)), dim=1)
    return eights.reshape(2 * n, *gate.shape[1:]).contiguous()


def separate_rows(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up); the inverse of :func:`interleave_rows`."""
    eights = both.reshape(both.shape[0] // 16, 2, 8, *both.shape[1:])
    return eights[:, 0].flatten(0, 1).contiguous(), eights[:, 1].flatten(0, 1).contiguous()


def interleave(gate: NVFP4Tensor, up: NVFP4Tensor) -> NVFP4Tensor:
    """:func:`interleave_rows` of codes and scales; the global scale is the gate's (the kernel takes one a row)."""
    return NVFP4Tensor(
        interleave_rows(gate.codes, up.codes),
        interleave_rows(gate.scales.view(torch.uint8), up.scales.view(torch.uint8)).view(torch.float8_e4m3fn),
        gate.global_scale,
    )
