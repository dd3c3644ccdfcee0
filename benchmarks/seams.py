"""Seams between chunks and success, by how chunks follow each other and by the delay of inference.

    python benchmarks/seams.py --episodes 20                 the shipped policy, every mode, 0 to 400 ms
    python benchmarks/seams.py --modes off rtc --delays 0.2  a part of it

Every mode and delay gets the same scenes and the same noise, in simulated time with a made delay. A seam
is measured at the moment of the swap and before the fade: how far the curve through the new chunk's
actions lies from the command in force (position), and how much their velocities differ. `sent` is the
largest acceleration in the commands after guard and fade, over the 0.2 s after the swap; `inside` is what
the policy itself asks for in that time, within its chunk: the largest change of velocity from one step to
the next, as a velocity and as an acceleration. Writes seams.json and seams.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.share import resolve, share_path

#: mode -> (chunking of the cycle, mode of the engine, seconds of blend)
MODES = {
    "off, no blend": ("off", "off", 0.0),
    "off": ("off", "off", 0.2),
    "rtc": ("rtc", "guided", 0.2),
    "rtc prior-corrected": ("rtc", "prior_corrected", 0.2),
    "ensemble": ("ensemble", "off", 0.2),
}


COLUMNS = ("position (rad)", "velocity (rad/s)", "sent (rad/s^2)", "inside (rad/s)", "inside (rad/s^2)")


@dataclass(frozen=True)
class Job:
    """All episodes of one mode and delay."""

    mode: str
    delay: float
    episodes: int
    checkpoint: str
    rate: float


def run_job(job: Job) -> dict[str, Any]:
    """Run the episodes; a row of the table."""
    import torch
    from hybrid_policy.evaluation.closed_loop import Episode, LoopSettings
    from hybrid_policy.evaluation.evaluate_command import SCENE_STREAM
    from hybrid_policy.runtime.engine import Engine
    from hybrid_policy.runtime.rtc import RealTimeChunking
    from hybrid_policy.sim.rendering import choose_gl
    from hybrid_policy.sim.robot import SimRobot
    from hybrid_policy.sim.tasks import SceneSettings, sample_scene

    torch.set_num_threads(1)
    choose_gl()
    chunking, engine_mode, blend = MODES[job.mode]
    engine = Engine.from_checkpoint(job.checkpoint, "bf16", "cpu", rtc=RealTimeChunking(mode=engine_mode))  # type: ignore[arg-type]
    file = RobotFile.load(resolve("sim_aloha", "config/robots"))
    settings = LoopSettings(rate=job.rate, delay=job.delay, chunking=chunking, blend=blend)
    seams: list[tuple[float, ...]] = []
    successes, seconds = 0, []
    robot: SimRobot | None = None
    for seed in range(job.episodes):
        scene = sample_scene(np.random.default_rng([SCENE_STREAM, seed]), SceneSettings())
        if robot is None:
            robot = SimRobot(scene)
        episode = Episode(robot, scene, file, engine.spec, settings=settings, seed=seed)
        swaps = 0
        while (asked := episode.observe()) is not None:
            chunk = engine.infer(*asked)
            before = episode.cycle.timeline.current
            measure(episode, chunk, seams if swaps else [])
            swaps += episode.cycle.timeline.current is not before
        successes += episode.result.success
        seconds.append(episode.result.seconds)
    if robot is not None:
        robot.close()
    table = np.array(seams)
    return {
        "mode": job.mode,
        "delay_ms": round(job.delay * 1e3),
        "episodes": job.episodes,
        "success": successes / job.episodes,
        "seconds": float(np.mean(seconds)),
        "seams": len(seams),
        **{
            f"{name} {what}": float(value)
            for i, name in enumerate(COLUMNS)
            for what, value in zip(("p50", "p95", "max"), np.percentile(table[:, i], [50, 95, 100]))
        },
    }


def inside(episode: Any, result: Any) -> tuple[float, float]:
    """Largest change of velocity (rad/s), and acceleration (rad/s^2), within a chunk, over the fade."""
    period = episode.robot_file.period * 1e-9
    steps = np.diff(episode.robot_file.commands(result.chunk.actions), n=2, axis=0)
    count = max(1, round(0.2 / period))
    change = float(np.abs(steps[max(0, result.first - 1) :][:count]).max()) / period
    return change, change / period


def measure(episode: Any, chunk: Any, seams: list[tuple[float, ...]]) -> None:
    """Let a chunk take over and note its seam."""
    cycle = episode.cycle
    accept = type(cycle).accept

    def noting(*args: Any, **keywords: Any) -> Any:
        result = accept(cycle, *args, **keywords)
        if result.trajectory is not None:
            seam = result.seam
            seams.append((seam.position, seam.velocity, seam.acceleration, *inside(episode, result)))
        return result

    cycle.accept = noting
    episode.act(chunk)


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Success, and the seams' 95th percentiles, over the delay."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4), constrained_layout=True)
    titles = {
        "success": "success",
        "position (rad) p95": "position jump at a seam, p95 (rad)",
        "velocity (rad/s) p95": "velocity jump at a seam, p95 (rad/s)",
        "sent (rad/s^2) p95": "acceleration sent after it, p95 (rad/s²)",
    }
    for axis, (key, title) in zip(axes, titles.items()):
        for mode in dict.fromkeys(row["mode"] for row in rows if row["mode"] != "off, no blend"):
            points = sorted((row["delay_ms"], row[key]) for row in rows if row["mode"] == mode)
            axis.plot(*zip(*points), marker="o", label=mode)
        axis.set_xlabel("delay (ms)")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run every mode at every delay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(share_path("checkpoints/sim_pi05")))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--delays", nargs="+", type=float, default=[0.0, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    jobs = [Job(m, d, args.episodes, args.checkpoint, args.rate) for m in args.modes for d in args.delays]
    rows = []
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(run_job, jobs):
            rows.append(row)
            print(
                f"{time.monotonic() - began:6.0f} s  {row['mode']:<20} {row['delay_ms']:>3} ms  "
                f"success {row['success']:.2f}  position p95 {row['position (rad) p95']:.4f} "
                f"max {row['position (rad) max']:.4f}  velocity p95 {row['velocity (rad/s) p95']:.3f} "
                f"max {row['velocity (rad/s) max']:.3f}  sent p95 {row['sent (rad/s^2) p95']:.2f}",
                flush=True,
            )
    report = {
        "checkpoint": Path(args.checkpoint).name,
        "machine": f"{platform.machine()} CPU, simulated time",
        "date": time.strftime("%Y-%m-%d"),
        "inferences per second": args.rate,
        "rows": rows,
    }
    (args.output / "seams.json").write_text(json.dumps(report, indent=1) + "\n")
    chart(rows, args.output / "seams.png")


if __name__ == "__main__":
    main()
