"""Numbers from a replay: against what was recorded, against another recipe, and by itself.

All are functions of a :class:`RecipeRun` and the bag's :class:`Survey`; none depends on this machine but
``latency``. Errors are in the commands' units (rad; m for a gripper's travel), cosines in the
checkpoint's units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.recorded_actions import RecordedActions
from hybrid_policy.evaluation.replay_record import RecipeRun, ReplayedChunk
from hybrid_policy.evaluation.survey import Survey, TopicSurvey

Array = NDArray[np.float64]
_MOST_SAMPLES = 200_000
STAGES = ("preprocess", "vision", "prefix", "denoise", "postprocess", "infer")


class Recorded:
    """The recorded actions at a chunk's due times; the segments are split once."""

    def __init__(self, known: Survey, robot: RobotFile) -> None:
        self._actions, self._robot = known.actions, robot
        self._segments: dict[int, RecordedActions] = {}

    @property
    def available(self) -> bool:
        """Whether there is anything to compare with."""
        return len(self._actions) > 0

    def sample(self, times: NDArray[np.int64], segment: int) -> Array:
        """float64 [times, commands]; NaN where nothing is known."""
        if segment not in self._segments:
            self._segments[segment] = self._actions.segment(segment)
        return self._segments[segment].sample(times)

    def at(self, chunk: ReplayedChunk) -> Array:
        """float64 [horizon, commands]: what was recorded when each action of the chunk is due."""
        due = chunk.stamp + self._robot.period * np.arange(len(chunk.actions), dtype=np.int64)
        return self.sample(due, chunk.segment)

    def during(self, times: Sequence[int], segments: Sequence[int]) -> Array:
        """float64 [ticks, commands]: what was recorded at ticks of known segments."""
        at, owner = np.array(times, dtype=np.int64), np.array(segments)
        told = np.full((len(at), len(self._robot.command_names)), np.nan)
        for segment in np.unique(owner):
            told[owner == segment] = self.sample(at[owner == segment], int(segment))
        return told

    def score(self, chunk: ReplayedChunk) -> float:
        """Mean absolute error of one chunk; NaN where nothing is known."""
        error = np.abs(chunk.commands - self.at(chunk))
        return float(np.nanmean(error)) if np.isfinite(error).any() else math.nan


def errors(error: Array, names: Sequence[str]) -> dict[str, Any]:
    """MSE, MAE and max of an error [chunks, horizon, commands] with NaN, in all, by joint and by step."""
    known = np.isfinite(error)
    if not known.any():
        return {}
    size = np.where(known, np.abs(error), 0.0)
    square = size * size

    def mean(values: Array, axes: tuple[int, ...]) -> list[float | None]:
        count = known.sum(axis=axes)
        total = values.sum(axis=axes)
        return [float(t / c) if c else None for t, c in zip(total.reshape(-1), count.reshape(-1))]

    joints = [
        {"name": name, "mse": mse, "mae": mae, "max": float(size[:, :, i].max())}
        for i, (name, mse, mae) in enumerate(zip(names, mean(square, (0, 1)), mean(size, (0, 1))))
        if mse is not None
    ]
    return {
        "values": int(known.sum()),
        "mse": float(square.sum() / known.sum()),
        "mae": float(size.sum() / known.sum()),
        "max": float(size.max()),
        "joints": joints,
        "horizon": {"mae": mean(size, (0, 2)), "mse": mean(square, (0, 2))},
    }


def cosine(a: Array, b: Array) -> float:
    """Cosine of two arrays as vectors, over the entries that both know; NaN where one is zero."""
    known = np.isfinite(a) & np.isfinite(b)
    x, y = a[known], b[known]
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm > 0.0 else math.nan


def against_recorded(run: RecipeRun, robot: RobotFile, recorded: Recorded) -> dict[str, Any]:
    """Predicted chunks against recorded actions; empty where nothing was recorded.

    ``hold`` is the error of standing still instead, and ``skill`` 1 - mse / mse of holding: above 0 the
    policy says more than nothing. ``motion_cosine`` compares displacements from where the robot was.
    """
    chunks = [c for c in run.chunks if np.isfinite(c.commands).all()]
    if not recorded.available or not chunks:
        return {}
    told = np.stack([recorded.at(c) for c in chunks])
    predicted = np.stack([c.commands for c in chunks])
    found = errors(predicted - told, robot.command_names)
    if not found:
        return {}
    cosines = [cosine(_actions(robot, p), _actions(robot, t)) for p, t in zip(predicted, told)]
    found["action_cosine"] = _spread(cosines, low=True)
    if len(robot.command_index):
        here = np.stack([c.joints[robot.command_index] for c in chunks])[:, None, :]
        still = errors(here - told, robot.command_names)
        found["hold"] = {key: still[key] for key in ("mse", "mae")}
        found["skill"] = 1.0 - found["mse"] / still["mse"] if still["mse"] > 0 else None
        moved = [cosine(p - h, t - h) for p, t, h in zip(predicted, told, here)]
        found["motion_cosine"] = _spread(moved, low=True)
    executed = _executed(run, recorded)
    if executed is not None:
        found["executed_mae"], found["executed_max"] = executed
    return found


def against_recipe(run: RecipeRun, base: RecipeRun, robot: RobotFile) -> dict[str, Any]:
    """Chunks of one recipe against another's, on the same observations and noise."""
    pairs = pair(run, base)
    if not pairs:
        return {}
    mine = np.stack([c.commands for c, _ in pairs])
    theirs = np.stack([c.commands for _, c in pairs])
    found = errors(mine - theirs, robot.command_names)
    cosines = [cosine(a.actions.astype(float), b.actions.astype(float)) for a, b in pairs]
    found["action_cosine"] = _spread(cosines, low=True)
    size = np.abs(mine - theirs).mean(axis=(1, 2))
    worst = int(np.argmax(size))
    found["worst"] = {
        "chunk": pairs[worst][0].number,
        "mae": float(size[worst]),
        "stamp": pairs[worst][0].stamp,
    }
    found["pairs"] = len(pairs)
    return found


def pair(run: RecipeRun, base: RecipeRun) -> list[tuple[ReplayedChunk, ReplayedChunk]]:
    """Chunks of both runs that come from the same observation and the same draw of noise."""
    by_key = {(c.segment, c.number, c.stamp): c for c in base.chunks}
    keys = [(c, by_key.get((c.segment, c.number, c.stamp))) for c in run.chunks]
    return [(a, b) for a, b in keys if b is not None and np.isfinite(a.actions).all() and np.isfinite(b.actions).all()]


def motion(run: RecipeRun) -> dict[str, Any]:
    """Seams, guard and holds of one run."""
    taken = [c for c in run.chunks if c.accepted]
    joints: Counter[str] = Counter(name for c in taken for name in c.clipped_joints)
    seams = np.array([c.seam for c in taken[1:]]).reshape(-1, 3)
    return {
        "chunks": len(run.chunks),
        "accepted": len(taken),
        "refused": len(run.chunks) - len(taken),
        "refusals": _reasons(c.reason for c in run.chunks if not c.accepted),
        "seams": {key: _spread(list(seams[:, i])) for i, key in enumerate(("position", "velocity", "acceleration"))},
        "guard": {
            "chunks_limited": sum(any(c.clipped) for c in taken),
            "position": sum(c.clipped[0] for c in taken),
            "velocity": sum(c.clipped[1] for c in taken),
            "acceleration": sum(c.clipped[2] for c in taken),
            "joints": dict(joints.most_common()),
        },
        "holds": len(run.holds),
        "hold_reasons": _reasons(reason for _, reason in run.holds),
        "missed_starts": run.missed,
        "damaged_images": sum(run.damaged.values()),
        "continued": sum(c.continued for c in run.chunks),
        "skew": _spread([c.skew for c in run.chunks]),
        "age": {
            name: _spread([c.ages[name] for c in run.chunks if name in c.ages])
            for name in sorted({name for c in run.chunks for name in c.ages})
        },
        "prompts": sorted({c.prompt for c in run.chunks}),
    }


def latency(run: RecipeRun) -> dict[str, Any]:
    """Milliseconds of each stage on this machine, the first (cold) chunk left out where there are others."""
    chunks = run.chunks[1:] or run.chunks
    return {
        stage: _spread([c.timings[stage] * 1e3 for c in chunks])
        for stage in STAGES
        if all(stage in c.timings for c in chunks) and chunks
    }


def inputs(topic: TopicSurvey, start: int) -> dict[str, Any]:
    """One input of a bag: rate, gaps, drops. ``start``: the bag's first moment, ns."""
    gaps = topic.gaps()
    return {
        "topic": topic.name,
        "type": topic.type,
        "role": topic.role,
        "messages": topic.messages,
        "used": len(topic.stamps),
        "rate": topic.rate(),
        "expected_rate": topic.expected_rate,
        "zero_stamps": topic.zero_stamps,
        "resets": topic.resets,
        "refused": dict(topic.refused.most_common()),
        "gaps": len(gaps),
        "longest_gap": max((seconds for _, seconds in gaps), default=0.0),
        "gap_list": [{"at": (at - start) * 1e-9, "seconds": s} for at, s in sorted(gaps, key=lambda g: -g[1])[:20]],
        "lag": _spread([(a - s) * 1e-9 for a, s in zip(topic.arrivals, topic.stamps)]),
    }


def tracking(known: Survey, robot: RobotFile) -> dict[str, Any]:
    """How far the joints were from what they were told; empty without commands or joint states."""
    if known.actions.source in ("", "measured joint positions") or not len(known.joints):
        return {}
    if not len(robot.command_index):
        return {}
    told = known.actions.segment(0).sample(known.joint_times)
    found = errors((known.joints[:, robot.command_index] - told)[:, None, :], robot.command_names)
    found.pop("horizon", None)
    return found


def beyond_limits(known: Survey, robot: RobotFile) -> dict[str, dict[str, float]]:
    """Shares of the bag's time in which the recorded commands break the robot file's limits, by joint.

    Joint -> position, velocity (0 to 1); only joints that do. Much of it means wrong units or limits.
    """
    if not len(known.actions) or known.seconds <= 0.0:
        return {}
    count = min(int(known.seconds * 1e9 / robot.period), _MOST_SAMPLES)
    times = known.start + np.linspace(0.0, known.seconds * 1e9, max(count, 2)).astype(np.int64)
    told = known.actions.segment(0).sample(times)
    limits, step = robot.limits, float(times[1] - times[0]) * 1e-9
    with np.errstate(invalid="ignore"):
        outside = (told < limits.lower - 1e-6) | (told > limits.upper + 1e-6)
        fast = np.abs(np.diff(told, axis=0)) / step > limits.velocity * (1 + 1e-6)
    shares = {
        name: {"position": float(outside[:, i].mean()), "velocity": float(fast[:, i].mean())}
        for i, name in enumerate(robot.command_names)
    }
    return {name: share for name, share in shares.items() if any(share.values())}


def _executed(run: RecipeRun, recorded: Recorded) -> tuple[float, float] | None:
    if not run.executed:
        return None
    told = recorded.during(run.executed_times, run.executed_segments)
    error = np.abs(np.stack(run.executed) - told)
    if not np.isfinite(error).any():
        return None
    return float(np.nanmean(error)), float(np.nanmax(error))


def _actions(robot: RobotFile, commands: Array) -> Array:
    return robot.actions(commands).astype(np.float64)


def _reasons(texts: Any) -> dict[str, int]:
    """Reasons with their numbers taken out, so that like ones count together."""
    counted: Counter[str] = Counter(texts)
    return dict(counted.most_common(10))


def _spread(values: Sequence[float], low: bool = False) -> dict[str, float | None]:
    """mean, p50, p95, p99, max; for a value of which less is worse (``low``): mean, p50, p5, p1, min."""
    known = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    keys = ("mean", "p50", "p5", "p1", "min") if low else ("mean", "p50", "p95", "p99", "max")
    if not len(known):
        return dict.fromkeys(keys)
    points = np.percentile(known, [50, 5, 1, 0] if low else [50, 95, 99, 100])
    return dict(zip(keys, map(float, (known.mean(), *points))))
