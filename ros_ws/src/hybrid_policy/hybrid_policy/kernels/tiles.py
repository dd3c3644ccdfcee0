"""Which tile a product takes: pure functions of shape, format and target, from tables of measurements.

Nothing is tuned at run time: a process that captures CUDA graphs must not time kernels, and the same shape must take
the same kernel on every start. A target without its own measurements takes the rules of the nearest one, within its
shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Format = Literal["bf16", "fp8", "nvfp4"]

#: Shared memory that one program may use, in bytes (CUDA programming guide, technical specifications).
SHARED_MEMORY = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    110: 232448,
    120: 101376,
}
#: Programs that fill the usual chip of a target: multiprocessors.
MULTIPROCESSORS = {89: 128, 90: 132, 100: 148, 110: 20, 120: 170}


@dataclass(frozen=True)
class Tile:
    """One configuration of ``stream_gemm``: see its module for the meaning of each."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    swap: bool = False
    split: int = 1
    bm2: int = 0
    #: cache lines of weights each program prefetches before the wait of a dependent launch (a power of two)
    prefetch: int = 256
    #: load x (and NVFP4 weights) by the bulk tensor copy engine: compute capability 9.0 and above
    tma_x: bool = False
    tma_w: bool = False
    #: each row tile starts at another K step
    rotate: bool = False
    #: dependents may launch at the start (0) or behind the main loop (1)
    trigger: int = 0

    def programs(self, m: int, n: int) -> int:
        """Programs launched for [m, n]."""
        return -(-m // (self.bm + self.bm2)) * -(-n // self.bn) * self.split


def shared_bytes(tile: Tile, fmt: Format) -> int:
    """An upper estimate of the shared memory of a tile: staged x and weights, and the decoded tile."""
    tokens = tile.bm + tile.bm2
    weight_bits = {"bf16": 16, "fp8": 8, "nvfp4": 5}[fmt]
    staged = tile.stages * tile.bk * (tokens * 2 + tile.bn * weight_bits // 8)
    decoded = tile.bn * tile.bk * 2 if fmt == "nvfp4" else 0
    quantized = tokens * tile.bk if fmt == "fp8" else 0
    return max(staged + decoded + quantized, tokens * tile.bn * 4)


def fit(tile: Tile, fmt: Format, capability: int) -> Tile:
    """``tile`` with fewer stages, then a shorter K step, until it fits the target's shared memory."""
    limit = SHARED_MEMORY.get(capability, 101376)
    while shared_bytes(tile, fmt) > limit:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.bk > 64 and fmt != "fp8":
            tile = replace(tile, bk=tile.bk // 2)
        elif tile.bm2:
            tile = replace(tile, bm2=0)
        elif tile.bm > 64:
            tile = replace(tile, bm=tile.bm // 2)
        else:
            return tile
    return tile


Route = Literal["stream", "library"]


def route(fmt: Format, m: int, n: int, k: int, capability: int) -> Route:
    """Our streaming kernel, or the vendor's library product with our quantiser and epilogue around it.

    Weights are read once either way. The library wins where the product is bound by arithmetic (many tokens); it has
    no NVFP4 x bf16 product, and its FP8 needs compute capability 8.9 and K, N multiples of 16.
    """
    if fmt == "nvfp4" or m <= 64:
        return "stream"
    if fmt == "fp8" and (k % 16 or n % 16):
        return "stream"
    return "library"


def power_of_two_at_least(value: int, least: int, most: int) -> int:
    """``value`` rounded up to a power of two within [least, most]."""
    result = least
    while result < value and result < most:
        result *= 2
    return result


def gate_up_tile(fmt: Format, m: int, n: int, k: int, capability: int) -> Tile:
    """The tile of ``gate_up_geglu``; ``n`` = 2F rows, ``k`` columns, ``m`` tokens."""
    if m <= 64:
        bm = power_of_two_at_least(m, 16, 64)
        tile = Tile(bm=bm, bn=64, bk=128, warps=4, stages=3)
        if n >= 16384:
            tile = Tile(bm=bm, bn=128, bk=128, warps=8, stages=3, swap=True)
    elif m <= 128:
        tile = Tile(bm=128, bn=128, bk=64, warps=8, stages=3, swap=True)
    else:
        # 192 tokens a program: 560 = 3 * 192 - 16, 968 = 5 * 192 + 8 (128-token tiles when they waste less).
        waste_192, waste_128 = -m % 192, -m % 128
        bm2 = 64 if waste_192 <= waste_128 + 64 else 0
        tile = Tile(bm=128, bm2=bm2, bn=128, bk=64, warps=8, stages=3, swap=True)
    if fmt == "fp8":
        tile = replace(tile, bk=128, bm=min(tile.bm, 128), bm2=0)
    return fit(tile, fmt, capability)


def linear_tile(fmt: Format, m: int, n: int, k: int, capability: int) -> Tile:
    """The tile of a linear layer [n, k] on ``m`` tokens; splits K where rows alone would leave the chip idle."""
    if m > 64:
        base = gate_up_tile(fmt, m, n, k, capability)
        return replace(base, split=1)
    bm = power_of_two_at_least(m, 16, 64)
    tile = Tile(bm=bm, bn=64 if n >= 4096 else 32, bk=128, warps=4, stages=3)
    chip = MULTIPROCESSORS.get(capability, 128)
    split = 1
    # Split while the parts still fit one wave and each keeps at least four K steps.
    while (
        tile.programs(m, n) * split * 2 <= chip and k % (split * 2 * tile.bk) == 0 and k // (split * 2) >= 512
    ):
        split *= 2
    return fit(replace(tile, split=split), fmt, capability)
