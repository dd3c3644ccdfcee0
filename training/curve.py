"""Draw the curves of training runs, one after the other.

python training/curve.py training/results/curve.png training/results/first-curve.csv ...
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure


def draw(target: Path, sources: list[Path]) -> None:
    """Losses over the steps of all runs; a dashed line where a run goes on from the one before."""
    picture = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = picture.add_subplot()
    begin = 0.0
    steps: list[float] = []
    losses: dict[str, list[float]] = {"flow": [], "grounding": []}
    for source in sources:
        with source.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if begin:
            axes.axvline(begin, color="grey", linestyle="--", linewidth=0.8)
        for row in rows:
            steps.append(begin + float(row["step"]))
            for name, values in losses.items():
                values.append(float(row[name]))
        begin = steps[-1]
    for name, values in losses.items():
        axes.plot(steps, values, label=name, linewidth=1.0)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (mean of 50 steps)")
    axes.legend()
    picture.savefig(target, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
