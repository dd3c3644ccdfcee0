"""Configurations of wgmma_gate_up.cu and wgmma_linear.cu: pure functions of the shape, from measurements on an H100."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybrid_policy.kernels.wgmma_packing import COLUMNS, PADDED_ROWS, SLAB

#: Shared memory of a block, and of each of two that share a multiprocessor (compute capability 9.0).
SHARED, SHARED_OF_TWO = 232448, 115712
MOST_TOKENS = 192


@dataclass(frozen=True)
class WgmmaTile:
    """See wgmma_gate_up.cu.

    Attributes:
        mt: 64-row products of each of the two consumer warpgroups; a block has 128 * mt rows.
        nt: tokens of a block, a multiple of 8.
        stages: of the ring, 64 columns each.
        group: k steps of 16 a commit.
        buffers: commits whose decoded weights are kept: 2, or 4 with a group of 1.
        split: 2: a cluster of two blocks cuts K.
        multicast: a cluster of two blocks of rows fetches x once.
        blocks: a multiprocessor.
        trigger: dependents may start at the start (0), or once the kernel before has ended (1): then each
            multiprocessor has one block of this launch and room for one of the next.
    """

    mt: int
    nt: int
    stages: int
    group: int = 4
    split: int = 1
    multicast: bool = False
    blocks: int = 1
    trigger: int = 1
    buffers: int = 2

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 2 if self.split == 2 or self.multicast else 1

    @property
    def set_registers(self) -> bool:
        """Whether the producer must give registers to the consumers: accumulators of more than 64."""
        return self.mt * self.nt > 128

    @property
    def threads(self) -> int:
        """Two consumer warpgroups and a producer warp (a warpgroup, to give its registers away)."""
        return 384 if self.set_registers else 288

    def shared_bytes(self, *, fp8_out: bool, squares: bool) -> int:
        """Dynamic shared memory of a block."""
        staging = min(64, self.nt) * (32 * self.mt * (1 if fp8_out else 2) + 16)
        end = self.stages * (self.nt * 128 + self.mt * SLAB) + (self.nt * 256 if self.split == 2 else 2 * staging)
        return end + (self.nt * 8 if squares else 0) + (3 * self.stages + 1) * 8

    def tiles(self, m: int, n: int) -> int:
        """Tiles of [m, n], each one cluster's work."""
        rows = -(-n // PADDED_ROWS) * PADDED_ROWS // (128 * self.mt)
        return rows // (2 if self.multicast else 1) * -(-m // self.nt)


def fitted(tile: WgmmaTile) -> WgmmaTile:
    """``tile`` with as few stages less as its shared memory wants; room for every epilogue is kept."""
    limit = SHARED if tile.blocks == 1 else SHARED_OF_TWO
    while tile.shared_bytes(fp8_out=False, squares=True) > limit:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def gate_up_tile(m: int, n: int, k: int, multiprocessors: int = 132) -> WgmmaTile:
    """The tile for ``n`` = 2F rows, ``k`` columns, ``m`` tokens."""
    chunks = -(-k // COLUMNS)
    if m <= 64:
        nt = -(-m // 8) * 8
        if n >= 192 * multiprocessors:
            return fitted(WgmmaTile(mt=1, nt=nt, stages=9, blocks=2))
        if chunks % 2 == 0 and n // 128 <= multiprocessors:
            return fitted(WgmmaTile(mt=1, nt=nt, stages=min(8, chunks // 2), split=2, blocks=2))
        return fitted(WgmmaTile(mt=1, nt=nt, stages=8, blocks=2))
    return fitted(_many_tokens(m, n, multiprocessors))


def _many_tokens(m: int, n: int, multiprocessors: int) -> WgmmaTile:
    """The token width whose waves of blocks compute the fewest tokens; of equals the widest."""
    best: tuple[float, WgmmaTile] | None = None
    for nt in range(MOST_TOKENS, 64, -16):
        tile = WgmmaTile(mt=2, nt=nt, stages=12, group=1 if nt > 128 else 2, multicast=True)
        clusters = multiprocessors // 2
        waves = -(-tile.tiles(m, n) // clusters)
        cost = waves * (nt + 80)  # measured: a tile takes 0.125 us a token and 10 us
        if best is None or cost < best[0]:
            best = (cost, tile)
    assert best is not None
    return best[1]


@dataclass(frozen=True)
class LinearTile:
    """See wgmma_linear.cu.

    Attributes:
        nt: tokens, a multiple of 8.
        cluster: blocks that cut K.
        groups: of 128 columns, a block's part of K.
        warpgroups: of a block; each takes a part of the groups.
        blocks: a multiprocessor.
        trigger: as in WgmmaTile.
    """

    nt: int
    cluster: int
    groups: int
    warpgroups: int = 2
    blocks: int = 2
    trigger: int = 1

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        slots = -(-(self.nt // 8) // self.cluster)
        operands = self.groups * (64 * 128 + self.nt * 128 + self.nt * 4)
        return operands + slots * self.warpgroups * self.cluster * 2048 + (self.groups + 2) * 8


def linear_tile(m: int, n: int, k: int, multiprocessors: int = 132) -> LinearTile | None:
    """The tile for an FP8 weight [n, k]; None where the kernel does not take the shape.

    K is cut in at most four as far as one wave of blocks goes (in eight, 64 rows x 4096 took 6.9 us instead of 5.8:
    such clusters are slow to place), in parts of at most eight groups of 128 columns, an even number.
    """
    if m > 64:
        return None
    nt = -(-m // 8) * 8
    row_tiles = -(-n // 64)
    best: LinearTile | None = None
    for cluster in (1, 2, 4, 8):
        groups, rest = divmod(k, 128 * cluster)
        if rest or groups % 2 or groups > 8:
            continue
        tile = LinearTile(nt, cluster, groups, blocks=2 if groups <= 4 else 1)
        if tile.shared_bytes() > (SHARED_OF_TWO if tile.blocks == 2 else SHARED):
            continue
        if best is None or (cluster <= 4 and row_tiles * cluster <= multiprocessors):
            best = tile
    return best
