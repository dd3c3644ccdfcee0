"""Replay bags through a policy and say what it would have done: a bag in, a verdict out.

Each bag goes through the live node's own ingest, buffer, control cycle and guard, on the bag's clock and
with a delay that the arguments determine, so two replays of one bag give the same numbers. With several
recipes the first is the one that the others are held against, on the same observations and noise.

  hybrid-policy replay run1 run2.mcap --robot sim_aloha
  hybrid-policy replay bags/ --robot arm.yaml --checkpoint ckpt --recipe bf16 --recipe seed \\
      --fail-if 'action_cosine<0.99'
  hybrid-policy replay run1 --robot arm.yaml --latency-log run1.jsonl --jobs 4 --output out

Written to the output folder: report.html (one page, no network), report.json (docs/replay.md has its
form), bags/<name>/predictions (a bag for Foxglove and PlotJuggler) and foxglove_layout.json. Bags that
are done are not done again; --fresh does them anew.

Exit code: 0 every bag was replayed and no --fail-if condition holds; 1 a condition holds; 2 bad input, or a
bag could not be replayed (the others were, and the report says why).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_policy.control.cycle import CHUNKING
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation import batch, report
from hybrid_policy.evaluation.bag import find_bags
from hybrid_policy.evaluation.bag_job import ENGINE, BagJob
from hybrid_policy.evaluation.delays import DelayModel, from_log, read_log
from hybrid_policy.evaluation.extras import require
from hybrid_policy.evaluation.foxglove import write_layout
from hybrid_policy.evaluation.html_report import MOST_BAGS, write_page
from hybrid_policy.evaluation.node_parameters import read_parameters
from hybrid_policy.evaluation.progress import Bar
from hybrid_policy.evaluation.replay_record import ReplaySettings
from hybrid_policy.evaluation.summary import FIGURES, check, parse_conditions, summarise
from hybrid_policy.share import resolve

#: What ``--checkpoint shipped`` means, as for the node.
SHIPPED = "sim_pi05"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("bags", nargs="+", help="bags: folders, *.mcap, *.db3, or folders of bags")
    parser.add_argument("--robot", required=True, help="robot file, or the name of one that ships")
    parser.add_argument("--recipe", action="append", help="recipe file or name; may be repeated (default: bf16)")
    parser.add_argument("--inputs-only", action="store_true", help="look at the bags alone, without a policy")
    parser.add_argument("-o", "--output", type=Path, default=Path("replay"), help="folder (default: ./replay)")
    node = parser.add_argument_group(
        "the node", "What a node is started with decides what it does, so the node's own parameter file is read."
    )
    node.add_argument("--params-file", type=Path, help="the node's parameters (default: config/policy_node.yaml)")
    node.add_argument("--checkpoint", help="checkpoint folder (default: shipped, the simulated robot's policy)")
    node.add_argument("--device", help="auto, cpu, cuda, cuda:1 (default: auto)")
    node.add_argument("--rate", type=float, dest="inference_rate", help="inferences per second (default: 5)")
    node.add_argument("--chunking", choices=CHUNKING, help="how chunks follow each other (default: rtc)")
    node.add_argument("--seed", type=int, help="of the noise, and of the delays drawn (default: 0)")
    node.add_argument(
        "--cpu-threads", type=int, help="of PyTorch on the CPU; another number gives other last digits (default: 1)"
    )
    time = parser.add_argument_group("time")
    time.add_argument(
        "--delay", type=float, default=0.1, help="seconds that each inference takes (default: %(default)s)"
    )
    time.add_argument("--latency-log", type=Path, help="draw the delays from a node's latency log instead")
    time.add_argument(
        "--follow-log",
        type=Path,
        help="repeat a recorded run inference by inference, as this latency log says; needs the run's bag",
    )
    time.add_argument("--duration", type=float, default=0.0, help="replay only the first seconds of each bag")
    topics = parser.add_argument_group("topics")
    topics.add_argument("--remap", action="append", default=[], metavar="FROM:=TO",
                        help="robot file's topic := bag's topic; may be repeated")  # fmt: skip
    topics.add_argument("--command-topic", default="", help="the topic with the recorded actions, if another")
    topics.add_argument("--backend", choices=("rosbags", "rosbag2_py"), default="rosbags", help="default: %(default)s")
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION",
                        help="e.g. 'action_cosine<0.99' or 'seed:holds>0'; exit 1 where it holds. Figures: "
                        + ", ".join(f.name for f in FIGURES))  # fmt: skip
    work = parser.add_argument_group("work")
    work.add_argument("--jobs", type=int, default=1, help="bags at once, a process each (default: %(default)s)")
    work.add_argument("--ray", action="store_true", help="each bag a Ray task (pip install 'hybrid_policy[ray]')")
    work.add_argument("--fresh", action="store_true", help="do bags anew that are done already")
    parser.add_argument("--no-html", action="store_true", help="write report.json alone")
    parser.add_argument("--no-predictions", action="store_true", help="write no bags of predictions")
    parser.add_argument("--json", action="store_true", help="print report.json on stdout instead of the summary")
    parser.add_argument("--policy", default=ENGINE, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Replay every bag and write the report; the exit code is in the module's docstring."""
    require("rosbags", *([] if args.no_html else ["matplotlib"]))
    robot_path = resolve(args.robot, "config/robots")
    robot = RobotFile.load(robot_path)
    settings = _settings(args)
    recipes = () if args.inputs_only else tuple(dict.fromkeys(args.recipe or [settings.node.recipe]))
    conditions = parse_conditions(args.fail_if, recipes)
    jobs = _jobs(args, robot_path, recipes, settings)
    if args.fresh:
        for job in jobs:
            if (job.folder / "result.json").exists():
                shutil.rmtree(job.folder)
    results: list[dict[str, Any]] = [{} for _ in jobs]
    with Bar("replaying") as bar:
        for i, result in _run(args, jobs, bar):
            results[i] = result
            bar.say(_line(result))
    figures = summarise(results, recipes)
    checks = check(conditions, figures, recipes)
    made = report.build(results, _told(args, robot, recipes, settings), recipes, checks)
    args.output.mkdir(parents=True, exist_ok=True)
    report.write(made, args.output / "report.json")
    write_layout(robot, recipes, _image_topics(results), args.output / "foxglove_layout.json")
    if not args.no_html:
        write_page(made, {job.name: job.folder for job in jobs}, args.output / "report.html")
    if args.json:
        print((args.output / "report.json").read_text("utf-8"), end="")
    else:
        _print(made, recipes, args.output, html=not args.no_html)
    if any(c.failed for c in checks):
        return 1
    return 0 if all(report.is_complete(r, recipes) for r in results) else 2


def _settings(args: argparse.Namespace) -> ReplaySettings:
    if args.jobs < 1:
        raise InputError(f"--jobs: {args.jobs} given, expected at least 1")
    if not 0.0 <= args.delay <= 60.0:
        raise InputError(f"--delay: {args.delay} given, expected seconds from 0 to 60")
    if args.follow_log is not None and args.latency_log is not None:
        raise InputError("--follow-log, --latency-log: both given, expected one of them")
    names = ("checkpoint", "device", "inference_rate", "chunking", "seed", "cpu_threads")
    node = read_parameters(args.params_file, {name: getattr(args, name) for name in names})
    if args.latency_log is not None:
        delay = from_log(args.latency_log, node.seed)
    elif args.follow_log is not None:
        delay = DelayModel(source=args.follow_log.name, followed=len(read_log(args.follow_log)))
    else:
        delay = DelayModel(fixed=round(args.delay * 1e9))
    return ReplaySettings(node, delay, args.duration)


def _jobs(args: argparse.Namespace, robot: Path, recipes: tuple[str, ...], settings: ReplaySettings) -> list[BagJob]:
    checkpoint = _checkpoint(settings)
    if recipes and args.policy == ENGINE:
        checkpoint = str(resolve(checkpoint, "checkpoints", "").resolve())
        for recipe in recipes:
            resolve(recipe, "config/recipes")
    bags = find_bags(args.bags)
    if args.follow_log is not None and len(bags) != 1:
        raise InputError(f"--follow-log: {len(bags)} bags given, expected the one of that run")
    remap = dict(_remap(given) for given in args.remap)
    names: dict[str, int] = {}
    jobs: list[BagJob] = []
    for bag in bags:
        stem = bag.name.removesuffix("".join(bag.suffixes)) if bag.is_file() else bag.name
        names[stem] = names.get(stem, 0) + 1
        name = stem if names[stem] == 1 else f"{stem}_{names[stem]}"
        jobs.append(
            BagJob(
                bag=bag.resolve(),
                name=name,
                robot=robot.resolve(),
                checkpoint=checkpoint,
                recipes=recipes,
                device=settings.node.device,
                settings=settings,
                output=args.output.resolve(),
                remap=remap,
                command_topic=args.command_topic,
                backend=args.backend,
                predictions=not args.no_predictions,
                follow=args.follow_log.resolve() if args.follow_log else None,
                policy=args.policy,
                pictures=not args.no_html and len(jobs) < MOST_BAGS,
            )
        )
    return jobs


def _checkpoint(settings: ReplaySettings) -> str:
    return SHIPPED if settings.node.checkpoint == "shipped" else settings.node.checkpoint


def _remap(text: str) -> tuple[str, str]:
    before, sign, after = text.partition(":=")
    if not sign or not before or not after:
        raise InputError(f"--remap: {text!r} given, expected FROM:=TO")
    return before, after


def _run(args: argparse.Namespace, jobs: Sequence[BagJob], bar: Bar) -> Iterator[batch.Done]:
    if not args.ray and args.jobs == 1:
        yield from batch.run_here(jobs, bar.update)
        return
    if args.ray:
        running = batch.run_ray(jobs, gpus=1.0 if jobs[0].device.startswith("cuda") else 0.0)
    else:
        running = batch.run_pool(jobs, min(args.jobs, len(jobs)))
    for count, done in enumerate(running, 1):
        bar.update(count / len(jobs), f"{count} of {len(jobs)} bags")
        yield done


def _told(
    args: argparse.Namespace, robot: RobotFile, recipes: Sequence[str], settings: ReplaySettings
) -> Mapping[str, Any]:
    return {
        **report.robot_facts(robot),
        "checkpoint": Path(_checkpoint(settings)).name,
        "recipes": list(recipes),
        "rate": settings.node.inference_rate,
        "delay": settings.delay.text,
        "chunking": settings.node.chunking,
        "seed": settings.node.seed,
        "duration": settings.duration,
        "fail_if": list(args.fail_if),
    }


def _image_topics(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Camera name -> the topic that the first bag with it has."""
    found: dict[str, str] = {}
    for one in (one for result in results for one in result.get("inputs", [])):
        role, _, name = one["role"].partition(" ")
        if role == "camera":
            found.setdefault(name, one["topic"])
    return found


def _line(result: Mapping[str, Any]) -> str:
    if result.get("status") == "replayed":
        chunks = next(iter(result["recipes"].values()))["chunks"]
        return f"{result['name']}: replayed, {result['seconds']:.1f} s, {chunks} chunks a recipe"
    return f"{result['name']}: {result['status']}: {'; '.join(result['lacks']) or 'lacks nothing'}"


def _print(made: Mapping[str, Any], recipes: Sequence[str], output: Path, html: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if recipes and any(v is not None for row in made["summary"].values() for v in row.values()):
        table = Table("figure", *recipes, "unit", box=None, pad_edge=False, header_style="bold")
        for column in table.columns[1 : 1 + len(recipes)]:
            column.justify = "right"
        for figure in FIGURES:
            values = [{**made["summary"][r], **made["measured"]["summary"][r]}.get(figure.name) for r in recipes]
            if any(value is not None for value in values):
                table.add_row(figure.name, *("–" if v is None else f"{v:.5g}" for v in values), figure.unit)
        console.print(table)
    for one in made["verdict"]["checks"] + made["measured"]["checks"]:
        if one["failed"]:
            console.print(
                f"[red]FAILED[/red] {one['recipe']}: {one['figure']} is {one['value']} (fail if {one['condition']})"
            )
    console.print(f"[bold]{made['verdict']['line']}[/bold]", soft_wrap=True)
    print(f"{output / ('report.html' if html else 'report.json')}", file=sys.stdout)
