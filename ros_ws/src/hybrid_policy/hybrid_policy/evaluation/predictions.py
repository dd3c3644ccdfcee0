"""The predictions as a bag, for Foxglove, PlotJuggler and rviz: open it beside the recording.

For each recipe ``/replay/<recipe>/chunk`` (JointTrajectory, stamped with its observation, one message a
chunk, written when it came into force) and ``/replay/<recipe>/command`` (JointState: what the robot would
have been told, at the policy's rate); ``/replay/recorded`` (JointState) is what it was told.
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.replay_record import RecipeRun

if TYPE_CHECKING:
    from hybrid_policy.evaluation.metrics import Recorded

_STATE, _CHUNK = "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory"
#: (time, order, topic, type, message)
_Entry = tuple[int, int, str, str, Any]


def topic_name(recipe: str) -> str:
    """A recipe's name as a topic's: letters, digits and underscores."""
    stem = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    kept = "".join(c if c.isascii() and c.isalnum() else "_" for c in stem)
    return kept if kept[:1].isalpha() else f"recipe_{kept}"


def write_predictions(path: Path, runs: list[RecipeRun], robot: RobotFile, recorded: Recorded) -> None:
    """Write the bag at ``path``, in time order; an older one there is replaced."""
    if path.exists():
        shutil.rmtree(path)
    with BagWriter(path, "mcap", "chunk") as writer:
        streams = [_chunks(writer, run, robot, 2 * i) for i, run in enumerate(runs)]
        streams += [_commands(writer, run, robot, 2 * i + 1) for i, run in enumerate(runs)]
        if runs and recorded.available:
            streams.append(_recorded(writer, runs[0], robot, recorded, 2 * len(runs)))
        for t_ns, _, topic, kind, message in heapq.merge(*streams, key=lambda entry: entry[:2]):
            writer.write(topic, kind, message, t_ns)


def _chunks(writer: BagWriter, run: RecipeRun, robot: RobotFile, order: int) -> Iterator[_Entry]:
    names, topic = list(robot.command_names), f"/replay/{topic_name(run.recipe)}/chunk"
    times = robot.period * np.arange(len(run.chunks[0].commands) if run.chunks else 0, dtype=np.int64)
    for chunk in run.chunks:
        message = writer.trajectory(chunk.stamp, names, chunk.commands, times)
        yield chunk.finished, order, topic, _CHUNK, message


def _commands(writer: BagWriter, run: RecipeRun, robot: RobotFile, order: int) -> Iterator[_Entry]:
    names, topic = list(robot.command_names), f"/replay/{topic_name(run.recipe)}/command"
    for time, command in zip(run.executed_times, run.executed):
        yield time, order, topic, _STATE, writer.joint_state(time, names, command)


def _recorded(writer: BagWriter, run: RecipeRun, robot: RobotFile, recorded: Recorded, order: int) -> Iterator[_Entry]:
    names = list(robot.command_names)
    values = recorded.during(run.executed_times, run.executed_segments)
    for time, told in zip(run.executed_times, values):
        if np.isfinite(told).all():
            yield time, order, "/replay/recorded", _STATE, writer.joint_state(time, names, told)
