"""One bag as one task: everything it needs travels with it, everything it finds is left in a folder.

The same function runs in this process, in a pool of processes (``--jobs``) and as a Ray task. A result
that is whole and was made of the same bag, settings, robot file and checkpoint is not made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation import html_bag, metrics
from hybrid_policy.evaluation.bag import BagSource, disk_size, open_bag
from hybrid_policy.evaluation.delays import read_log
from hybrid_policy.evaluation.follow_log import FollowLog, parity, published
from hybrid_policy.evaluation.node_parameters import NodeParameters
from hybrid_policy.evaluation.own_joints import by_own_names, sketch
from hybrid_policy.evaluation.policy_pass import PolicyPass, fit_robot
from hybrid_policy.evaluation.predictions import write_predictions
from hybrid_policy.evaluation.progress import Laps
from hybrid_policy.evaluation.replay import Replay
from hybrid_policy.evaluation.replay_record import (
    RecipeRun,
    ReplayedChunk,
    ReplaySettings,
    dropped_messages,
    why_no_chunk,
)
from hybrid_policy.evaluation.report import robot_facts
from hybrid_policy.evaluation.survey import Survey, survey
from hybrid_policy.evaluation.topic_match import match_topics
from hybrid_policy.models.observation import Policy

#: Recorded commands beyond a limit for more than this share of the time are worth a word.
_SUSPICIOUS = 0.05
RESULT, SERIES = "result.json", "series.npz"
#: (checkpoint, recipe, device, the node's parameters) -> a policy; "module:function", so that a task can name it.
ENGINE = "hybrid_policy.evaluation.policies:load_engine"
#: (fraction done, what is being done)
Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class BagJob:
    """What to replay and how. Paths are absolute.

    name: of the bag in the report and of its folder. recipes: the first is the one that others are held
    against. remap: robot file's topic -> bag's topic. follow: a latency log to follow exactly.
    """

    bag: Path
    name: str
    robot: Path
    checkpoint: str
    recipes: tuple[str, ...]
    device: str
    settings: ReplaySettings
    output: Path
    remap: Mapping[str, str] = field(default_factory=dict)
    command_topic: str = ""
    backend: str = "rosbags"
    predictions: bool = True
    follow: Path | None = None
    policy: str = ENGINE
    pictures: bool = True

    @property
    def folder(self) -> Path:
        """Where this bag's results go."""
        return self.output / "bags" / self.name

    def fingerprint(self) -> str:
        """Of everything that the result follows from; 16 hex digits."""
        parts = {k: v for k, v in asdict(self).items() if k not in ("output", "robot", "pictures")}
        parts["size"] = disk_size(self.bag) if self.bag.exists() else -1
        parts["changed"] = _changed(self.bag)
        parts["robot"] = self.robot.read_text("utf-8")
        parts["checkpoint_changed"] = _changed(Path(self.checkpoint))
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_job(job: BagJob, tell: Tell = lambda _fraction, _text: None) -> dict[str, Any]:
    """Replay one bag with every recipe; what it found, also left in ``job.folder``.

    Never raises for a bad bag: the result then has status ``failed`` and says why.
    """
    mark = job.fingerprint()
    kept = read_result(job.folder)
    if kept is not None and kept.get("fingerprint") == mark and kept.get("status") != "failed":
        return kept
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / html_bag.DRAWN).unlink(missing_ok=True)
    began = time.perf_counter()
    try:
        result, series = _replay(job, tell)
    except InputError as error:
        result, series = (
            {"status": "failed", "lacks": str(error).splitlines(), "notes": [], "seconds": 0.0},
            {},
        )
    result = {"name": job.name, "bag": str(job.bag), **result, "fingerprint": mark}
    result.setdefault("measured", {})["wall_seconds"] = time.perf_counter() - began  # all but the pictures
    with (job.folder / SERIES).open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **series)
    partial = job.folder / (RESULT + ".part")
    partial.write_text(json.dumps(clean(result), indent=1), "utf-8")
    partial.replace(job.folder / RESULT)
    result = read_result(job.folder) or result
    if job.pictures:
        _draw(job, result)
    return result


def _draw(job: BagJob, result: Mapping[str, Any]) -> None:
    """The bag's section of the report: here, where bags are worked on at once, rather than one after another."""
    if importlib.util.find_spec("matplotlib") is None:
        return  # a worker without it; whoever writes the report draws then
    page = html_bag.section(result, robot_facts(RobotFile.load(job.robot)), job.folder, job.recipes)
    (job.folder / html_bag.DRAWN).write_text(page, "utf-8")


def read_result(folder: Path) -> dict[str, Any] | None:
    """A finished result, or None."""
    try:
        return dict(json.loads((folder / RESULT).read_text("utf-8")))
    except (OSError, ValueError):
        return None


def _replay(job: BagJob, tell: Tell) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    robot = RobotFile.load(job.robot)
    source = open_bag(job.bag, job.backend)
    laps = Laps()
    try:
        tell(0.0, "reading the bag")
        known = survey(source, robot, match_topics(robot, source.topics, job.remap, job.command_topic))
        robot = fit_robot(robot, known)
        result = _describe(known, robot, source)
        series = _input_series(known)
        laps("reading")
        if job.recipes:
            _excuse_cameras(job, known)
        if known.lacks or not job.recipes:
            result["status"] = "inputs only"
            _own_joints(source, robot, known, result, series)
            return result, series
        recorded = metrics.Recorded(known, robot)
        passes = _runs(job, known, robot, source, recorded, tell, laps)
        runs = [one.run_record for one in passes]
        result |= _measure(runs, robot, recorded)
        result["status"] = "replayed"
        dropped = dropped_messages(runs[0], known)
        if any(not run.chunks for run in runs):
            result["status"] = "inputs only"
            result["lacks"].append(why_no_chunk(runs[0], dropped))
        else:
            result["notes"] += dropped
        _compare_published(passes, result)
        result["problems"] = list(source.problems)
        series |= _run_series(runs, recorded)
        if job.predictions:
            write_predictions(job.folder / "predictions", runs, robot, recorded)
        laps("figures")
        result["measured"]["seconds"] = laps.spent
        return result, series
    finally:
        source.close()


def _excuse_cameras(job: BagJob, known: Survey) -> None:
    """Cameras that the robot has, the bag lacks and the checkpoint does not look through are no lack."""
    cameras = [line for line in known.lacks if line.startswith("camera ")]
    if not cameras or len(cameras) < len(known.lacks) or not known.match.cameras:
        return
    needed = load_policy(job, job.recipes[0]).spec.cameras
    for line in cameras:
        if line.split(":")[0].removeprefix("camera ") not in needed:
            known.lacks.remove(line)
            known.notes.append(f"{line}; the checkpoint does not use it")


def _own_joints(
    source: BagSource,
    robot: RobotFile,
    known: Survey,
    result: dict[str, Any],
    series: dict[str, NDArray[Any]],
) -> None:
    """What the joints alone tell, by the bag's own names where the robot file has others."""
    found = by_own_names(source, robot, known)
    used, file = found if found is not None else (known, robot)
    if found is not None:
        result["tracking"] = metrics.tracking(used, file)
        result["recorded"] = _recorded(used, file)
        result["inputs"] = [metrics.inputs(topic, used.start) for topic in used.topics.values()]
        result["robot_file_sketch"] = sketch(file, used)
        result["notes"] = [line for line in known.notes if not line.startswith(("recorded", known.match.command))]
        result["notes"] += [line for line in used.notes if line not in known.match.notes]
        result["notes"].append(
            "joints: evaluated by the bag's own names; robot_file_sketch has them as a robot file's section"
        )
        series |= _input_series(used)
    if len(used.joints) and len(file.command_index):
        told = used.actions.segment(0)
        series["joint_told"] = told.sample(used.joint_times).astype(np.float32)
        series["joint_index"] = file.command_index
        result["joint_columns"] = list(file.command_names)
        if used.actions.source == "measured joint positions":
            del series["joint_told"]


def _runs(
    job: BagJob,
    known: Survey,
    robot: RobotFile,
    source: BagSource,
    recorded: metrics.Recorded,
    tell: Tell,
    laps: Laps,
) -> list[PolicyPass]:
    runs: list[PolicyPass] = []
    length = min(known.seconds, job.settings.duration or known.seconds)
    log = read_log(job.follow) if job.follow is not None else []
    sent = list(published(source, known.match.command)) if log else []
    for i, recipe in enumerate(job.recipes):
        tell(i / len(job.recipes), f"{recipe}: loading")
        policy = load_policy(job, recipe)
        laps("loading")
        score = _difference(runs[0].run_record) if runs else recorded.score
        one: PolicyPass
        if log:
            one = FollowLog(
                robot, policy, known, node=job.settings.node, log=log, sent=sent, recipe=recipe, score=score
            )
        else:
            one = Replay(robot, policy, known, settings=job.settings, recipe=recipe, score=score)
        for seconds in one.run(source):
            share = seconds / length if length else 1.0
            tell((i + min(share, 1.0)) / len(job.recipes), recipe)
        laps("replaying")
        runs.append(one)
    return runs


def _compare_published(passes: list[PolicyPass], result: dict[str, Any]) -> None:
    """Where a log was followed: the trajectories against those that the node published."""
    for one in passes:
        if isinstance(one, FollowLog):
            result["recipes"][one.run_record.recipe]["parity"] = parity(one.pairs)
            if one.unmatched:
                result["notes"].append(
                    f"{one.run_record.recipe}: {len(one.unmatched)} chunks of the log have inputs that the "
                    f"bag lacks (the first is {one.unmatched[0]}); what follows may differ from the run"
                )


def _difference(base: RecipeRun) -> Callable[[ReplayedChunk], float]:
    by_key = {(c.segment, c.number, c.stamp): c for c in base.chunks}

    def score(chunk: ReplayedChunk) -> float:
        other = by_key.get((chunk.segment, chunk.number, chunk.stamp))
        return float(np.abs(chunk.commands - other.commands).mean()) if other is not None else float("nan")

    return score


def load_policy(job: BagJob, recipe: str) -> Policy:
    """The policy that the job's factory makes for a recipe; kept, as loading takes long."""
    key = (job.policy, job.checkpoint, recipe, job.device, job.settings.node)
    if key not in _LOADED:
        module, _, name = job.policy.partition(":")
        make = getattr(importlib.import_module(module), name)
        _LOADED[key] = make(job.checkpoint, recipe, job.device, job.settings.node)
    return _LOADED[key]


_LOADED: dict[tuple[str, str, str, str, NodeParameters], Policy] = {}


def _describe(known: Survey, robot: RobotFile, source: BagSource) -> dict[str, Any]:
    described = {
        "seconds": known.seconds,
        "clock": known.clock,
        "lacks": known.lacks,
        "notes": known.notes,
        "problems": list(source.problems),
        "topics": [
            {"name": t.name, "type": t.type, "messages": t.count}
            for t in sorted(source.topics.values(), key=lambda t: t.name)
        ],
        "joint_names": list(known.joint_names),
        "inputs": [metrics.inputs(topic, known.start) for topic in known.topics.values()],
        "recorded": _recorded(known, robot),
        "tracking": metrics.tracking(known, robot),
    }
    return described


def _recorded(known: Survey, robot: RobotFile) -> dict[str, Any]:
    beyond = metrics.beyond_limits(known, robot)
    for name, share in beyond.items():
        for kind, value in share.items():
            if value > _SUSPICIOUS:
                known.notes.append(
                    f"recorded actions: {name} is beyond its {kind} limit {value:.0%} of the time: are the robot "
                    "file's limits and units right?"
                )
    return {"source": known.actions.source, "messages": len(known.actions), "beyond_limits": beyond}


def _measure(runs: list[RecipeRun], robot: RobotFile, recorded: metrics.Recorded) -> dict[str, Any]:
    found: dict[str, Any] = {"recipes": {}, "measured": {"latency": {}}}
    for run in runs:
        one = metrics.motion(run)
        one["against_recorded"] = metrics.against_recorded(run, robot, recorded)
        one["against_first"] = metrics.against_recipe(run, runs[0], robot) if run is not runs[0] else {}
        one["drops"] = run.drops
        one["worst"] = [{"chunk": m.number, "score": m.score} for m in run.worst]
        found["recipes"][run.recipe] = one
        found["measured"]["latency"][run.recipe] = metrics.latency(run)
    return found


def _input_series(known: Survey) -> dict[str, NDArray[Any]]:
    series: dict[str, NDArray[Any]] = {
        "span": np.array([known.start, known.end], dtype=np.int64),
        "joint_times": known.joint_times,
        "joints": known.joints.astype(np.float32),
    }
    for topic in known.topics.values():
        series[f"stamps/{topic.role}"] = np.array(topic.stamps, dtype=np.int64)
    return series


def _run_series(runs: list[RecipeRun], recorded: metrics.Recorded) -> dict[str, NDArray[Any]]:
    series: dict[str, NDArray[Any]] = {}
    for run in runs:
        key = f"run/{run.recipe}/"
        chunks = run.chunks
        if not chunks:
            continue
        series[key + "stamps"] = np.array([c.stamp for c in chunks], dtype=np.int64)
        series[key + "segments"] = np.array([c.segment for c in chunks], dtype=np.int64)
        series[key + "accepted"] = np.array([c.accepted for c in chunks])
        series[key + "commands"] = np.stack([c.commands for c in chunks]).astype(np.float32)
        series[key + "recorded"] = np.stack([recorded.at(c) for c in chunks]).astype(np.float32)
        series[key + "seams"] = np.array([c.seam for c in chunks])
        series[key + "infer_ms"] = np.array([c.timings["infer"] * 1e3 for c in chunks])
        series[key + "executed_times"] = np.array(run.executed_times, dtype=np.int64)
        series[key + "executed"] = np.array(run.executed, dtype=np.float32)
        series[key + "told"] = recorded.during(run.executed_times, run.executed_segments).astype(np.float32)
        series[key + "holds"] = np.array([at for at, _ in run.holds], dtype=np.int64)
        for rank, moment in enumerate(run.worst):
            series[f"{key}worst/{rank}/number"] = np.array(moment.number)
            for name, pixels in moment.pictures.items():
                series[f"{key}worst/{rank}/picture/{name}"] = pixels
    return series


def clean(value: Any) -> Any:
    """Plain JSON: numpy numbers to Python's, what is not finite to null."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, (np.integer, np.bool_)):
        return value.item()
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def _changed(path: Path) -> list[int]:
    if not path.exists():
        return []
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [f.stat().st_mtime_ns for f in files]
