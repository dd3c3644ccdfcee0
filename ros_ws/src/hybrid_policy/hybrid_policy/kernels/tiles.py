"""Which tile a product takes: pure functions of shape, format and target, from tables of measurements.

Nothing is tuned at run time: a process that captures CUDA graphs must not time kernels, and the same shape must take
the same kernel on every start. A target without its own measurements takes the rules of the nearest one, within its
shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hybrid_policy.kernels import wgmma_tiles

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
    """``tile`` with fewer stages, then a shorter K step, then fewer tokens, until the target's shared memory holds it.

    With SWAP a step stays at 128 or more: Triton leaves up to seven of a step's products of 16 columns in flight, so a
    shorter step would let the next copy overwrite x under a product still running (seen on an H100 with 64).
    """
    limit = SHARED_MEMORY.get(capability, 101376)
    shortest = 128 if tile.swap or fmt == "fp8" else 64
    while shared_bytes(tile, fmt) > limit:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.bk > shortest:
            tile = replace(tile, bk=tile.bk // 2, tma_w=tile.tma_w and fmt != "nvfp4")
        elif tile.bm2:
            tile = replace(tile, bm2=0)
        elif tile.bm > 64:
            tile = replace(tile, bm=tile.bm // 2)
        else:
            return tile
    return tile


Route = Literal["wgmma", "stream", "library"]


def gate_up_route(precision: str, capability: int) -> Literal["wgmma", "stream"]:
    """Hopper's own kernel for NVFP4 gate and up; elsewhere, and in the other formats, the streaming kernel's layer.

    wgmma, setmaxnreg and the tensor copy engine's multicast are of compute capability 9.0 alone.
    """
    return "wgmma" if precision == "nvfp4_w4a16" and capability == 90 else "stream"


def route(fmt: Format, m: int, n: int, k: int, capability: int, *, norm_out: bool = False) -> Route:
    """A linear layer's kernel: Hopper's own for FP8, our streaming kernel, or the vendor's library.

    Weights are read once either way. The library (with our quantiser and epilogue around it) wins where the product is
    bound by arithmetic (many tokens); it has no NVFP4 x bf16 product, and its FP8 needs compute capability 8.9 and K, N
    multiples of 16. Hopper's kernel takes K in whole parts (wgmma_tiles.linear_tile) and leaves nothing for a norm.
    """
    if fmt == "fp8" and capability == 90 and not norm_out and wgmma_tiles.linear_tile(m, n, k) is not None:
        return "wgmma"
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


def bulk_copies(k: int, capability: int) -> bool:
    """Whether x [M, k] is loaded by the bulk tensor copy engine: tuned for 9.0, rows multiples of 16 bytes."""
    return capability == 90 and k % 16 == 0


def gate_up_tile(fmt: Format, m: int, n: int, k: int, capability: int) -> Tile:
    """The tile of ``gate_up_geglu``; ``n`` = 2F rows, ``k`` columns, ``m`` tokens."""
    bulk = bulk_copies(k, capability)
    if not bulk:
        return _portable_tile(fmt, m, n, capability)
    if m <= 64:
        bm = power_of_two_at_least(m, 16, 64)
        if fmt != "nvfp4":
            tile = Tile(bm, bn=64 if n >= 8192 else 32, bk=256, warps=4, stages=3, tma_x=True, tma_w=True)
        elif n >= 16384:
            tile = Tile(bm, bn=128, bk=128, warps=8, stages=3, swap=True, tma_x=True, prefetch=0)
        else:
            tile = Tile(bm, bn=64, bk=256, warps=4, stages=3, swap=True, tma_x=True, tma_w=True, prefetch=0)
    else:
        tile = _large_tile(fmt, m)
    return fit(tile, fmt, capability)


def _large_tile(fmt: Format, m: int) -> Tile:
    """Hopper, more than 64 tokens: as many tokens a program as its registers hold, so that W is decoded seldom."""
    if m <= 128 or fmt == "fp8":
        return Tile(bm=128, bn=128, bk=128, warps=8, stages=3, swap=True, tma_x=True)
    # The width of the token tile that computes the fewest tokens wins. Time a token computed hardly differs: 0.27,
    # 0.28 and 0.27 us on an H100 at 2 x 16384 x 2048; of equals the narrowest, which keeps three stages.
    widths = {192: Tile(128, 128, 128, 8, 3, swap=True, bm2=64, tma_x=True),
              256: Tile(256, 128, 128, 8, 2, swap=True, tma_x=True),
              288: Tile(256, 128, 128, 8, 2, swap=True, bm2=32, tma_x=True)}  # fmt: skip
    computed = {width: -(-m // width) * width for width in widths}
    return widths[min(widths, key=lambda width: (computed[width], width))]


def _portable_tile(fmt: Format, m: int, n: int, capability: int) -> Tile:
    """Targets without measurements of ours: pointer loads, warp-level or fifth-generation tensor cores."""
    if fmt == "fp8":
        tile = Tile(power_of_two_at_least(m, 16, 64), bn=32, bk=256, warps=4, stages=1)
    elif m <= 64:
        bk = 64 if fmt == "bf16" else 128
        tile = Tile(power_of_two_at_least(m, 16, 64), bn=64 if n >= 4096 else 32, bk=bk, warps=4, stages=2)
    else:
        tile = Tile(128, bn=128, bk=64, warps=8, stages=2)
    return fit(tile, fmt, capability)


def linear_tile(fmt: Format, m: int, n: int, k: int, capability: int, *, x_fp8: bool = False) -> Tile:
    """The tile of a linear layer [n, k] on ``m`` tokens; splits K where rows alone would leave the chip idle.

    ``x_fp8``: the activations come in FP8, so that nothing is left to quantise.
    """
    if m > 64:
        return gate_up_tile(fmt, m, n, k, capability)
    bm = power_of_two_at_least(m, 16, 64)
    narrow = n < 2048 and k >= 2048
    longest = 8
    if not bulk_copies(k, capability):
        tile = _portable_tile(fmt, m, n, capability)
    elif fmt == "fp8" and x_fp8:
        tile, longest = Tile(bm, bn=32, bk=512, warps=4, stages=2, tma_x=True, tma_w=True), 4
    elif fmt == "fp8":
        tile = Tile(bm, bn=64, bk=512, warps=8, stages=1, trigger=1)
    elif fmt == "nvfp4":
        tile = Tile(bm, bn=64, bk=256, warps=4, stages=2 if narrow else 3, swap=True, tma_x=True, tma_w=True)
    elif narrow:
        tile, longest = Tile(bm, bn=16, bk=256, warps=4, stages=4, tma_x=True), 1
    else:
        tile, longest = Tile(bm, bn=32, bk=256, warps=4, stages=3, tma_x=True, tma_w=True), 1
    return fit(replace(tile, split=_split(tile, m, n, k, capability, longest)), fmt, capability)


def _split(tile: Tile, m: int, n: int, k: int, capability: int, longest: int) -> int:
    """Parts of K: while they fit one wave, and each has whole steps, 512 columns and a row of the tile to finish."""
    chip = MULTIPROCESSORS.get(capability, 128)
    split = 1
    while (
        split < min(longest, tile.bm)
        and tile.programs(m, n) * split * 2 <= chip
        and k % (split * 2 * tile.bk) == 0
        and k // (split * 2) >= 512
    ):
        split *= 2
    return split
