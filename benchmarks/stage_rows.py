"""What the benchmarks of single stages share: chains of launches timed as graphs, and the rows of their table."""

from __future__ import annotations

import csv
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

ROWS: list[dict[str, object]] = []


def chain(*calls, launches=12, replays=15, rest=0) -> float:
    """Median microseconds a launch. rest: clocks before each replay in which the device does nothing, and cools."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # what the calls read was made on another stream
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            calls[i % len(calls)]()
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if rest:
            torch.cuda._sleep(rest)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return float(np.median(times[3:]))


def note(what: str, shape: str, microseconds: float, error: float = float("nan")) -> None:
    """One row."""
    ROWS.append({"what": what, "shape": shape, "microseconds": round(microseconds, 2), "relative_error": error})
    print(f"{what:44} {shape:22} {microseconds:9.2f} us   error {error:.2e}", flush=True)


def guarded(function, *args) -> None:
    """Go on after a failure."""
    try:
        function(*args)
    except Exception:
        traceback.print_exc(limit=4)
        sys.stdout.flush()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def layers(nbytes: int) -> int:
    """How many weights of ``nbytes`` are more than twice an L2 cache of 50 MB, 12 to 48."""
    return min(48, max(12, -(-110_000_000 // nbytes)))


def write(path: Path) -> None:
    """The rows as CSV, with the device and the date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*ROWS[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in ROWS)
