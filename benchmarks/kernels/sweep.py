"""Which tile wins at each shape: checks every configuration, then times it, with and without dependent launch.

    PYTHONPATH=ros_ws/src/hybrid_policy python benchmarks/kernels/sweep.py --out sweep.csv [--only expert,down]

Each configuration is first compiled, run and compared with float64 in a process of its own (eight at a time), so that
one that fails costs itself only. Timing: one CUDA graph a configuration, weights rotated, median over replays.
The winners go into hybrid_policy/kernels/tiles.py by hand.
"""

from __future__ import annotations

import argparse
import csv
import functools
import multiprocessing
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hybrid_policy.kernels.tiles import Tile
from problems import (
    DOWN,
    DOWN_GIVEN,
    DOWN_NVFP4,
    EXPERT,
    OUT,
    PREFIX,
    PREFIX_SMALL,
    QKV,
    Inputs,
    Problem,
    launch_arguments,
    output,
    random_weight,
    relative_error,
)


def tiles_of(name: str) -> list[tuple[Problem, list[Tile]]]:
    """The configurations of one group."""
    t = Tile
    if name == "expert":
        tiles = [t(64, 64, 256, 4, s, swap=w, tma_x=True, tma_w=True) for s in (3, 4) for w in (True, False)]
        tiles += [
            t(64, 64, 128, 4, 6, swap=True, tma_x=True),
            t(64, 64, 256, 4, 3, swap=True, tma_x=True, tma_w=True, prefetch=0),
        ]
        tiles += [t(64, 128, 256, 8, s, swap=True, tma_x=True, tma_w=True) for s in (2, 3)]
        tiles += [t(64, 128, 128, 8, s, swap=True, tma_x=True) for s in (4, 6)]
        return [(EXPERT, tiles)]
    if name == "prefix_small":
        tiles = [t(64, 128, 128, 8, s, swap=True, tma_x=True, prefetch=p) for s in (2, 3, 4) for p in (0, 256)]
        tiles += [t(64, 256, 128, w, s, swap=True, tma_x=True) for w in (8, 16) for s in (2, 3)]
        return [(PREFIX_SMALL, tiles)]
    if name == "prefix":
        tiles = [t(256, 128, 128, 8, 2, swap=True, bm2=32, tma_x=True), t(128, 256, 128, 16, 3, swap=True, tma_x=True)]
        tiles += [t(128, 256, 128, w, s, swap=True, bm2=16, tma_x=True) for w in (8, 16) for s in (2, 3)]
        tiles += [
            t(128, 256, 128, 16, 4, swap=True, bm2=16, tma_x=True),
            t(128, 128, 128, 8, 3, swap=True, bm2=64, tma_x=True),
        ]
        return [(PREFIX, tiles)]
    if name == "down":
        rows = [
            (64, 512, 8, 8, 1),
            (64, 256, 8, 8, 2),
            (32, 512, 8, 8, 1),
            (128, 512, 8, 8, 1),
            (32, 512, 4, 8, 1),
            (64, 512, 8, 4, 1),
        ]
        tiles = [t(64, bn, bk, w, s, split=p, tma_x=b, tma_w=b) for bn, bk, p, w, s in rows for b in (False, True)]
        tiles += [t(64, 64, 512, 8, 1, split=8, trigger=1), t(64, 64, 512, 8, 1, split=8, prefetch=0)]
        rows = [
            (32, 256, 4, 4, 3),
            (64, 256, 8, 4, 2),
            (64, 512, 8, 8, 1),
            (32, 512, 4, 4, 2),
            (32, 512, 8, 4, 1),
            (16, 512, 2, 4, 3),
        ]
        given = [t(64, bn, bk, w, s, split=p, tma_x=True, tma_w=True) for bn, bk, p, w, s in rows]
        given += [t(64, 64, 512, 8, 1, split=8), t(64, 32, 512, 4, 1, split=8)]
        nvfp4 = [t(64, 64, 256, 4, 2, split=8, swap=w, tma_x=True, tma_w=True) for w in (False, True)]
        nvfp4 += [
            t(64, 32, 256, 4, 3, split=4, tma_x=True, tma_w=True),
            t(64, 64, 128, 4, 4, split=8, swap=True, tma_x=True),
        ]
        return [(DOWN, tiles), (DOWN_GIVEN, given), (DOWN_NVFP4, nvfp4)]
    qkv = [t(64, 32, 256, 4, 3, tma_x=True, tma_w=True), t(64, 32, 256, 4, 3, tma_x=True)]
    out = [t(64, 16, 256, 4, 4, tma_x=True), t(64, 32, 256, 4, 2, tma_x=True, tma_w=True, split=2),
           t(64, 32, 256, 4, 2, tma_x=True, tma_w=True, split=4), t(64, 64, 256, 4, 1, split=8)]  # fmt: skip
    return [(QKV, qkv), (OUT, out)]


GROUPS = ("expert", "prefix_small", "prefix", "down", "bf16")


def check(job: tuple[int, Problem, Tile, bool]) -> tuple[int, str, float]:
    """(index, error text or "", relative error) of one configuration."""
    import torch

    index, problem, tile, pdl = job
    try:
        torch.cuda.init()
        packed = random_weight(problem, index)
        inputs = Inputs.random(problem, index)
        out = output(problem)
        arguments = launch_arguments(problem, inputs)
        for _ in range(2):  # the second run finds the counters as the first left them
            out.fill_(float("nan"))
            packed.launch(inputs.operand, out, tile, pdl=pdl, **arguments)
        torch.cuda.synchronize()
        return index, "", relative_error(problem, packed, inputs, out, tile.bk)
    except Exception as error:  # every kind is reported and the others go on
        return (
            index,
            f"{type(error).__name__}: {error}".splitlines()[0][:160] + traceback.format_exc()[-300:],
            float("nan"),
        )


def main() -> int:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sweep.csv"))
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, by comma")
    parser.add_argument("--workers", type=int, default=8)
    args = parser.parse_args()
    jobs: list[tuple[int, Problem, Tile, bool]] = []
    for group in args.only.split(","):
        for problem, tiles in tiles_of(group):
            for tile in tiles:
                # Dependent launch changes the kernel; at many tokens it cannot matter.
                for pdl in (False, True) if problem.m <= 64 else (False,):
                    jobs.append((len(jobs), problem, tile, pdl))
    begin = time.time()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        checked = {index: (text, error) for index, text, error in pool.imap_unordered(check, jobs)}
    print(f"{len(jobs)} configurations checked in {time.time() - begin:.0f} s", flush=True)

    import torch
    from timing import graph_time_us, weight_sets

    rows = []
    sets: dict[Problem, tuple[list, Inputs]] = {}
    for index, problem, tile, pdl in jobs:
        text, error = checked[index]
        row = {"problem": problem.name, "m": problem.m, "n": problem.n, "k": problem.k, "format": problem.fmt}
        row |= {**vars(tile), "pdl": int(pdl), "relative_error": f"{error:.2e}", "us": "", "failure": text[:200]}
        rows.append(row)
        if text or not error < 2e-2:
            print("FAILED", row, flush=True)
            continue
        if problem not in sets:
            sets.clear()
            torch.cuda.empty_cache()
            bytes_each = int(problem.n * problem.k * {"bf16": 2, "fp8": 1, "nvfp4": 0.5625}[problem.fmt])
            packs = [random_weight(problem, seed) for seed in range(weight_sets(bytes_each))]
            sets[problem] = (packs, Inputs.random(problem, 0))
        packs, inputs = sets[problem]
        out, arguments = output(problem), launch_arguments(problem, inputs)
        try:
            calls = [functools.partial(p.launch, inputs.operand, out, tile, pdl=pdl, **arguments) for p in packs]
            row["us"] = f"{graph_time_us(calls):.2f}"
        except Exception as failure:
            row["failure"] = f"{type(failure).__name__}: {failure}"[:200]
            print("FAILED", row, flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name in dict.fromkeys((r["problem"], r["m"]) for r in rows):
        print(name)
        timed = [r for r in rows if (r["problem"], r["m"]) == name and r["us"]]
        for r in sorted(timed, key=lambda r: float(r["us"]))[:24]:
            keys = (
                "us",
                "bm",
                "bm2",
                "bn",
                "bk",
                "warps",
                "stages",
                "swap",
                "split",
                "tma_x",
                "tma_w",
                "trigger",
                "pdl",
                "relative_error",
            )
            print(
                "  ", *(f"{key}={r[key]}" if key != "us" else f"{r[key]:>7} us" for key in keys if r[key] is not False)
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
