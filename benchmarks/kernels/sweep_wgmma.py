"""Time configurations of Hopper's kernels (wgmma_gate_up, wgmma_linear), each checked first; compute capability 9.0.

    PYTHONPATH=ros_ws/src/hybrid_policy python benchmarks/kernels/sweep_wgmma.py --out sweep_wgmma.csv

One CUDA graph a line, weights rotated beyond twice the L2 cache, median over 25 replays, plain and with programmatic
dependent launches. The winners become the rules of wgmma_tiles.py.
"""

from __future__ import annotations

import argparse
import csv
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import problems as p
import torch
from hybrid_policy.kernels import wgmma, wgmma_linear
from hybrid_policy.kernels.stream import StreamWeight
from hybrid_policy.kernels.wgmma import WgmmaWeight
from hybrid_policy.kernels.wgmma_tiles import LinearTile, WgmmaTile, fitted
from timing import graph_time_us, weight_sets

SMALL = WgmmaTile(mt=1, nt=56, stages=9, blocks=2)
EXPERT = WgmmaTile(mt=1, nt=56, stages=8, split=2, blocks=2)
LARGE = WgmmaTile(mt=2, nt=192, stages=12, group=1, multicast=True)
GATE_UP: list[tuple[p.Problem, list[WgmmaTile]]] = [
    (
        p.EXPERT,
        [EXPERT, replace(EXPERT, group=2), replace(EXPERT, group=1), replace(EXPERT, group=1, buffers=4)],
    ),
    (
        p.PREFIX_SMALL,
        [
            SMALL,
            replace(SMALL, group=2),
            replace(SMALL, group=1),
            replace(SMALL, group=1, buffers=4),
            WgmmaTile(mt=2, nt=56, stages=12),
            WgmmaTile(mt=2, nt=56, stages=12, group=1),
            WgmmaTile(mt=2, nt=56, stages=12, group=1, buffers=4),
        ],
    ),
    (p.PREFIX, [LARGE, replace(LARGE, multicast=False)]),
    (replace(p.PREFIX, m=968), [replace(LARGE, nt=nt) for nt in (144, 176)]),
]
DOWN = [
    LinearTile(56, 4, 8, blocks=1),
    LinearTile(56, 4, 8, blocks=1, trigger=0),
    LinearTile(56, 8, 4),
]


def build(tile: WgmmaTile, k: int, pdl: bool) -> None:
    """Compile ahead; errors are reported where the tile is timed."""
    try:
        torch.zeros(1, device="cuda")  # this thread's context
        wgmma._kernel(tile, k // 64, False, False, False, pdl, wgmma_linear.SPIN_LIMIT, torch.cuda.current_device())
    except Exception as error:
        print(f"{tile}: {error}"[:2000], flush=True)


def gate_up_us(packs: list[WgmmaWeight], inputs: p.Inputs, out: torch.Tensor, tile: WgmmaTile, pdl: bool) -> float:
    """Microseconds of one configuration."""
    return graph_time_us([lambda w=w: w.launch(inputs.x, out, tile, pdl=pdl) for w in packs])


def down(weight: StreamWeight, inputs: p.Inputs, out: torch.Tensor, tile: LinearTile, pdl: bool) -> None:
    """One call."""
    assert weight.row_scale is not None
    wgmma_linear.launch(
        weight.weight, weight.row_scale, inputs.operand, out, tile, residual=inputs.residual, gate=inputs.gate,
        x_scale=inputs.x_scale, pdl=pdl,
    )  # fmt: skip


def down_us(weights: list[StreamWeight], inputs: p.Inputs, out: torch.Tensor, tile: LinearTile, pdl: bool) -> float:
    """Microseconds of one configuration."""
    return graph_time_us([lambda w=w: down(w, inputs, out, tile, pdl) for w in weights])


def main() -> int:
    """Every line that fails prints why and is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sweep_wgmma.csv"))
    parser.add_argument("--only", default="", help="problems whose name contains this")
    args = parser.parse_args()
    gate_up = [(q, [fitted(t) for t in tiles]) for q, tiles in GATE_UP if args.only in q.name]
    with ThreadPoolExecutor(12) as pool:
        for q, tiles in gate_up:
            for tile in tiles:
                for pdl in (False, True):
                    pool.submit(build, tile, q.k, pdl)
    rows: list[dict[str, object]] = []

    def report(q: p.Problem, tile: object, plain: float, pdl: float, error: float) -> None:
        rows.append({"problem": q.name, "m": q.m, "us": plain, "us_pdl": pdl, "relative_error": error, "tile": tile})
        print(f"{q.name[:34]:34} M={q.m:<4} {plain:8.2f} {pdl:8.2f} pdl  error {error:.1e}  {tile}", flush=True)

    for q, tiles in gate_up:
        packs = [p.random_slabs(q, seed) for seed in range(weight_sets(q.n * q.k * 9 // 16))]
        inputs, out = p.Inputs.random(q, 0), p.output(q)
        for tile in tiles:
            try:
                packs[-1].launch(inputs.x, out.fill_(float("nan")), tile)
                error = p.slabs_error(q, packs[-1], inputs, out)
                times = [gate_up_us(packs, inputs, out, tile, on) for on in (False, True)]
                report(q, tile, times[0], times[1], error)
            except Exception as failure:
                print(f"{q.name} {tile}: {type(failure).__name__}: {str(failure)[:500]}", flush=True)
    for q in (p.DOWN, p.DOWN_GIVEN):
        if args.only not in q.name:
            continue
        weights = [p.random_weight(q, seed) for seed in range(weight_sets(q.n * q.k))]
        inputs, out = p.Inputs.random(q, 0), p.output(q)
        for small in DOWN:
            try:
                down(weights[-1], inputs, out, small, False)
                error = p.relative_error(q, weights[-1], inputs, out, 128)
                times = [down_us(weights, inputs, out, small, on) for on in (False, True)]
                report(q, small, times[0], times[1], error)
            except Exception as failure:
                print(f"{q.name} {small}: {type(failure).__name__}: {str(failure)[:500]}", flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["problem", "m", "us", "us_pdl", "relative_error", "tile"])
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
