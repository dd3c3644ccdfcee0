"""The order in which NVFP4 weights lie in memory for wgmma_gate_up.cu, and its inverse.

Slabs of 128 rows x 64 columns, 4608 bytes each, columns fastest: uint8 [N / 128, K / 64, 4608], N padded to a multiple
of 512 and K of 64 with zeros. A slab holds, for each half of 64 rows, the words of 128 threads (16 bytes each), then
for each half the scales. Thread ``32 w + 4 g + q`` is lane (g, q) of warp w; word j of its four is its share of the
register operand of the tensor core's k step j (PTX: wgmma m64k16, matrix A)::

    rows 16 w + g, 16 w + g + 8      columns 16 j + 2 q + {0, 1}, 16 j + 8 + 2 q + {0, 1}
    pairs of a word (packing.pack_words): (row, left), (row + 8, left), (row, right), (row + 8, right)

Scales: 8 bytes for (w, g), for each k step the bytes of rows g and g + 8. A byte is the scale with its exponent
normalised, five bits, and three of mantissa: ``2**(e - 9) * (1 + m / 8)``. E4M3's sign is always zero, which makes room
for the exponents of its subnormals; so one multiply-add turns two bytes into two bfloat16. A zero has no such form:
codes under a zero scale become zeros (keeping their sign) under the least scale.
"""

from __future__ import annotations

import functools

import torch

from hybrid_policy.kernels import packing
from hybrid_policy.kernels.nvfp4 import GROUP, NVFP4Tensor, pack_codes, unpack_codes

ROWS, COLUMNS, SLAB = 128, 64, 4608
#: Row counts are padded to this, so that every tile of every configuration is whole.
PADDED_ROWS = 512
_AT_ONCE = 4096  # rows packed at a time, for memory's sake


@functools.cache
def _normalised() -> torch.Tensor:
    """uint8 [128]: E4M3 byte -> normalised byte (0 for zero)."""
    table = []
    for byte in range(128):
        exponent, mantissa = byte >> 3, byte & 7
        if exponent:
            table.append((exponent + 2) << 3 | mantissa)
        else:
            high = max(mantissa.bit_length() - 1, 0)
            table.append(high << 3 | (mantissa << (3 - high)) & 7)
    return torch.tensor(table, dtype=torch.uint8)


def normalise_scales(scales: torch.Tensor) -> torch.Tensor:
    """Positive E4M3 bytes uint8 -> bytes of the kernel's form."""
    return _normalised().to(scales.device)[scales.long()]


def denormalise_scales(normalised: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`normalise_scales` but for zero, which comes back as 2**-9."""
    value = normalised.to(torch.int32)
    field, mantissa = value >> 3, value & 7
    subnormal = (8 + mantissa) >> (3 - field).clamp(min=0)
    return torch.where(field >= 3, (field - 2).clamp(min=0) << 3 | mantissa, subnormal).to(torch.uint8)


def pack(tensor: NVFP4Tensor) -> torch.Tensor:
    """[N, K] -> slabs uint8 [ceil(N / 512) * 4, ceil(K / 64), 4608]."""
    n = tensor.shape[0]
    parts = [_pack_rows(tensor, begin, min(begin + _AT_ONCE, n)) for begin in range(0, n, _AT_ONCE)]
    return torch.cat(parts).contiguous()


def _pack_rows(tensor: NVFP4Tensor, begin: int, end: int) -> torch.Tensor:
    k = tensor.shape[1]
    codes = unpack_codes(tensor.codes[begin:end])
    scales = tensor.scales[begin:end].view(torch.uint8)
    zero = (scales == 0).repeat_interleave(GROUP, dim=1)
    codes = torch.where(zero, codes & 8, codes)
    below, right = -(end - begin) % PADDED_ROWS, -k % COLUMNS
    codes = torch.nn.functional.pad(codes, (0, right, 0, below))
    scales = torch.nn.functional.pad(normalise_scales(scales), (0, right // GROUP, 0, below))
    slabs, chunks = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS
    # slab, half, warp, row + 8, g; chunk, k step, right, q, element
    split = codes.reshape(slabs, 2, 4, 2, 8, chunks, 4, 2, 4, 2)
    words = packing.pack_words(split.permute(0, 5, 1, 2, 4, 8, 6, 7, 3, 9).reshape(slabs, chunks, -1, 8))
    word_bytes = words.reshape(slabs, chunks, 1024).contiguous().view(torch.uint8).reshape(slabs, chunks, 4096)
    ordered = scales.reshape(slabs, 2, 4, 2, 8, chunks, 4).permute(0, 5, 1, 2, 4, 6, 3).reshape(slabs, chunks, 512)
    return torch.cat((word_bytes, ordered), dim=-1)


def unpack(slabs: torch.Tensor, n: int, k: int, global_scale: torch.Tensor) -> NVFP4Tensor:
    """The inverse of :func:`pack` (equal values; see the module on zero scales)."""
    count, chunks = slabs.shape[:2]
    words = slabs[..., :4096].contiguous().view(torch.int32)
    codes = packing.unpack_words(words.reshape(count, chunks, -1, 1)).reshape(count, chunks, 2, 4, 8, 4, 4, 2, 2, 2)
    # slab, chunk, half, warp, g, q, k step, right, row + 8, element
    codes = codes.permute(0, 2, 3, 8, 4, 1, 6, 7, 5, 9).reshape(count * ROWS, chunks * COLUMNS)[:n, :k]
    scales = slabs[..., 4096:].reshape(count, chunks, 2, 4, 8, 4, 2).permute(0, 2, 3, 6, 4, 1, 5)
    scales = denormalise_scales(scales.reshape(count * ROWS, chunks * 4)[:n, : k // GROUP].contiguous())
    return NVFP4Tensor(pack_codes(codes.contiguous()), scales.view(torch.float8_e4m3fn), global_scale)
