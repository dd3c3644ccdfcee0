"""Success of a policy in the simulator, by recipe: the only unit that counts.

Two cubes lie on the table at random, the prompt names one, the right arm lifts it. Every recipe and delay
gets the same scenes and the same noise. Time is the simulator's; the delay of inference is made.

  hybrid-policy evaluate                                   the shipped policy in bf16, 50 scenes
  hybrid-policy evaluate --recipe bf16 seed w4a4 --episodes 200 --chart success.png
  hybrid-policy evaluate --delay 0 0.1 0.2 0.4             what the delay of inference costs
  hybrid-policy evaluate --distractor --json figures.json  a third cube on the table; figures to a file

Success has its 95 % interval (Wilson). Exit code 1 where --expect is given and a recipe stays below it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_policy.control.cycle import CHUNKING
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.closed_loop import TIME_LIMIT, EpisodeResult, LoopSettings, run_episode
from hybrid_policy.evaluation.progress import progress
from hybrid_policy.evaluation.success import summarise
from hybrid_policy.runtime.engine import Engine
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.share import resolve, share_path
from hybrid_policy.sim.rendering import choose_gl
from hybrid_policy.sim.robot import SimRobot
from hybrid_policy.sim.tasks import SceneSettings, sample_scene

CHECKPOINT = "checkpoints/sim_pi05"

#: Scenes are drawn from a stream of their own: no seed here repeats a scene of training.
SCENE_STREAM = 8_270_031


@dataclass(frozen=True)
class Job:
    """One episode to run in a worker: everything that it depends on."""

    checkpoint: str
    recipe: str
    device: str
    robot: str
    seed: int
    scenes: SceneSettings
    settings: LoopSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See ``cli``."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="a checkpoint directory (default: the shipped policy of the simulated robot)",
    )
    parser.add_argument("--recipe", nargs="+", default=["bf16"], help="names or files of recipes (default: bf16)")
    parser.add_argument("--episodes", type=int, default=50, help="scenes for each recipe and delay (default: 50)")
    parser.add_argument(
        "--delay", type=float, nargs="+", default=[0.1], help="made delays of inference, s (default: 0.1)"
    )
    parser.add_argument("--rate", type=float, default=5.0, help="inferences per second (default: 5)")
    parser.add_argument(
        "--chunking", choices=CHUNKING, default="rtc", help="how chunks follow each other (default: rtc)"
    )
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help=f"s an episode (default: {TIME_LIMIT:g})")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene and its noise (default: 0)")
    parser.add_argument("--distractor", action="store_true", help="put a third cube on the table")
    parser.add_argument("--switch", action="store_true", help="after the lift, prompt for the other cube too")
    parser.add_argument("--plain", action="store_true", help="no random light, shades, sizes, start pose, phrases")
    parser.add_argument("--robot", default="sim_aloha", help="robot file (default: sim_aloha)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="processes (default: one a core)")
    parser.add_argument("--expect", type=float, help="least success (0 to 1) of every recipe; below it: exit 1")
    parser.add_argument("--json", nargs="?", const="-", help="figures as JSON, to a file or (-) standard output")
    parser.add_argument("--chart", type=Path, help="bar chart (PNG); with several delays, success over delay")


def _check(args: argparse.Namespace) -> None:
    for name, low, high in (
        ("episodes", 1, 10**6),
        ("rate", 0.1, 100.0),
        ("limit", 0.5, 600.0),
        ("jobs", 1, 1024),
    ):
        value = getattr(args, name)
        if not low <= value <= high:
            raise InputError.at("evaluate", f"--{name}", value, f"a number from {low} to {high}")
    for delay in args.delay:
        if not 0.0 <= delay <= 5.0:
            raise InputError.at("evaluate", "--delay", delay, "seconds from 0 to 5")


def run(args: argparse.Namespace) -> int:
    """See ``cli``."""
    _check(args)
    checkpoint = Path(args.checkpoint) if args.checkpoint else share_path(CHECKPOINT)
    robot = resolve(args.robot, "config/robots")
    for recipe in args.recipe:
        load_recipe(recipe)  # a wrong name is told before anything starts
    scenes = SceneSettings(randomise=not args.plain, phrasings=not args.plain, distractor=float(args.distractor))
    cases = [(recipe, delay) for recipe in args.recipe for delay in args.delay]
    jobs = [
        Job(
            str(checkpoint),
            recipe,
            args.device,
            str(robot),
            args.seed + episode,
            scenes,
            LoopSettings(rate=args.rate, delay=delay, limit=args.limit, switch=args.switch, chunking=args.chunking),
        )
        for recipe, delay in cases
        for episode in range(args.episodes)
    ]
    done: dict[tuple[str, float], list[EpisodeResult]] = {case: [] for case in cases}
    for job, result in progress(_run_all(jobs, args.jobs), "evaluate", "episodes", len(jobs)):
        done[job.recipe, job.settings.delay].append(result)
    figures = {
        "checkpoint": str(checkpoint),
        "episodes": args.episodes,
        "seed": args.seed,
        "scenes": asdict(scenes),
        "rate": args.rate,
        "limit": args.limit,
        "switch": args.switch,
        "chunking": args.chunking,
        "results": [{"recipe": recipe, "delay": delay, **summarise(done[recipe, delay])} for recipe, delay in cases],
    }
    if args.chart is not None:
        draw(figures, args.chart)
    if args.json == "-":
        print(json.dumps(figures, indent=1))
    else:
        if args.json is not None:
            Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        _print(figures)
    if args.expect is None:
        return 0
    return int(any(result["success"] < args.expect for result in figures["results"]))


_engines: dict[tuple[str, str, str], Engine] = {}
_robots: list[SimRobot] = []


def _start_worker() -> None:
    """One thread a process: episodes are what runs in parallel."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)


def _run_one(job: Job) -> EpisodeResult:
    key = (job.checkpoint, job.recipe, job.device)
    if key not in _engines:
        for engine in _engines.values():
            engine.close()
        _engines.clear()
        _engines[key] = Engine.from_checkpoint(job.checkpoint, job.recipe, job.device)
    scene = sample_scene(np.random.default_rng((SCENE_STREAM, job.seed)), job.scenes)
    if not _robots:
        _robots.append(SimRobot(scene))
    robot_file = RobotFile.load(job.robot)
    return run_episode(_engines[key], _robots[0], scene, robot_file, settings=job.settings, seed=job.seed)


def _run_all(jobs: list[Job], processes: int) -> Iterator[tuple[Job, EpisodeResult]]:
    """Every job with its result, as they finish. The same results for any number of processes."""
    choose_gl()
    context = get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=_start_worker) as pool:
        waiting = {pool.submit(_run_one, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{figures['checkpoint']}, {figures['episodes']} scenes, {figures['rate']:g} Hz")
    for column in ("recipe", "delay", "success", "95 %", "by colour", "wrong cube", "steps", "seconds"):
        table.add_column(column, justify="left" if column in ("recipe", "by colour") else "right")
    for result in figures["results"]:
        low, high = result["interval"]
        colours = ", ".join(f"{name} {100 * c['success']:.0f} %" for name, c in result["by_colour"].items())
        steps, seconds = result["steps_to_success"], result["seconds_to_success"]
        table.add_row(
            result["recipe"],
            f"{1e3 * result['delay']:.0f} ms",
            f"{100 * result['success']:.1f} %",
            f"{100 * low:.1f} ... {100 * high:.1f}",
            colours,
            f"{100 * result['wrong_cube']:.1f} %",
            "-" if steps is None else f"{steps['median']:.0f}",
            "-" if seconds is None else f"{seconds['median']:.1f}",
        )
    Console().print(table)


def draw(figures: dict[str, Any], path: Path) -> None:
    """The figures as a picture: bars by recipe, or lines over the delay where there are several."""
    from matplotlib.figure import Figure

    results = figures["results"]
    recipes = list(dict.fromkeys(result["recipe"] for result in results))
    delays = sorted({result["delay"] for result in results})
    picture = Figure(figsize=(1.6 + 1.3 * max(len(recipes), 3), 3.6), layout="constrained")
    axes = picture.add_subplot()

    def bounds(rows: list[dict[str, Any]]) -> list[list[float]]:
        low = [100 * (row["success"] - row["interval"][0]) for row in rows]
        return [low, [100 * (row["interval"][1] - row["success"]) for row in rows]]

    if len(delays) > 1:
        for recipe in recipes:
            rows = sorted((r for r in results if r["recipe"] == recipe), key=lambda row: row["delay"])
            places = [1e3 * row["delay"] for row in rows]
            success = [100 * row["success"] for row in rows]
            axes.errorbar(places, success, yerr=bounds(rows), marker="o", capsize=4, label=recipe)
        axes.set_xlabel("delay of inference (ms)")
        axes.legend()
    else:
        success = [100 * row["success"] for row in results]
        bars = axes.bar(recipes, success, yerr=bounds(results), capsize=5, color="#4477aa")
        axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
        axes.plot(
            range(len(recipes)),
            [100 * r["wrong_cube"] for r in results],
            "x",
            color="#cc3311",
            label="wrong cube",
        )
        axes.legend(loc="lower right")
    axes.set_ylim(0, 104)
    axes.set_ylabel("success (%)")
    axes.set_title(f"{figures['episodes']} scenes, 95 % intervals")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=150)
