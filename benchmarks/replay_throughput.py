"""How many seconds of bag a second of replay does, with the shipped policy and the report, and where it goes.

    python benchmarks/replay_throughput.py                       two bags of 200 s, two at once, recipe bf16
    python benchmarks/replay_throughput.py --seconds 30 --json   short bags, figures as JSON

Makes the bags first (the expert on the simulated robot, as its drivers publish: two cameras at 20 Hz as JPEG,
joint states at 50 Hz; kept where --bags says), then runs `hybrid-policy replay --jobs N` as one would and times
the whole command, its start included. Of the split, `start, drawing, report` is what is left of the whole
after the longest bag; `inference` is part of `replaying`. CPU seconds are of all processes together: on a
machine that does other work they say more than the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hybrid_policy.sim.rendering import choose_gl

ROOT = Path(__file__).resolve().parents[1]
MAKER = ROOT / "ros_ws/src/hybrid_policy/tests/evaluation"


def bags(folder: Path, count: int, seconds: float) -> list[Path]:
    """``count`` bags in ``folder``; those that are there are taken."""
    sys.path.insert(0, str(MAKER))
    from make_bag import record_expert

    found = []
    for seed in range(count):
        path = folder / f"expert_{seed}_{seconds:g}s"
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            record_expert(path, seed=100 + seed, seconds=seconds)
        found.append(path)
    return found


def measure(paths: list[Path], output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run of the command; its figures."""
    recipes = [part for recipe in args.recipe for part in ("--recipe", recipe)]
    command = [sys.executable, "-m", "hybrid_policy.cli", "replay", *map(str, paths), "--robot", "sim_aloha"]
    command += [*recipes, "--jobs", str(args.jobs), "--device", "cpu", "--fresh", "--output", str(output)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((output / "report.json").read_text("utf-8"))
    split: dict[str, float] = {}
    for bag in report["bags"]:
        one = report["measured"]["bags"][bag["name"]]
        spent = dict(one["seconds"])
        spent["inference"] = sum(
            1e-3 * latency["infer"]["mean"] * bag["recipes"][recipe]["chunks"]
            for recipe, latency in one["latency"].items()
        )
        for what, seconds in spent.items():
            split[what] = split.get(what, 0.0) + seconds / len(report["bags"])
    longest = max(one["wall_seconds"] for one in report["measured"]["bags"].values())
    split["start, drawing, report"] = wall - longest * max(1, -(-len(paths) // args.jobs))
    replayed = sum(bag["seconds"] for bag in report["bags"])
    return {
        "times_real_time": replayed / wall,
        "bag_seconds": replayed,
        "wall_seconds": wall,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "latency_p50_ms": {r: row["latency_p50"] for r, row in report["measured"]["summary"].items()},
        "seconds_a_bag": split,
    }


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2, help="bags (default: 2)")
    parser.add_argument("--seconds", type=float, default=200.0, help="length of each (default: 200)")
    parser.add_argument("--jobs", type=int, default=2, help="bags at once (default: 2)")
    parser.add_argument("--recipe", nargs="+", default=["bf16"], help="(default: bf16)")
    parser.add_argument("--repeat", type=int, default=1, help="runs; each is printed (default: 1)")
    parser.add_argument("--bags", type=Path, help="folder to keep the bags in (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="figures of every run as JSON")
    args = parser.parse_args()
    choose_gl()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        if args.bags is not None:
            args.bags.mkdir(parents=True, exist_ok=True)
        paths = bags(args.bags or Path(folder), args.count, args.seconds)
        for i in range(args.repeat):
            run = measure(paths, Path(folder) / f"replay_{i}", args)
            runs.append(run)
            if not args.json:
                print(f"{run['times_real_time']:.2f} x real time: {run['bag_seconds']:.0f} s in", end=" ")
                print(f"{run['wall_seconds']:.1f} s, {run['cpu_seconds']:.1f} s of CPU; seconds a bag:")
                for what, seconds in run["seconds_a_bag"].items():
                    print(f"  {what:24s} {seconds:6.2f}")
    if args.json:
        about = {"machine": platform.machine(), "cores": os.cpu_count(), "jobs": args.jobs, "recipes": args.recipe}
        print(json.dumps({**about, "runs": runs}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
