"""A robot, messages and a policy small enough to know every number of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.models.observation import ActionChunk, Observation, PolicySpec
from hybrid_policy.share import share_path

ALOHA = share_path("config/robots/sim_aloha.yaml")
#: The arm's own rest position: inside every limit.
HOME = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.03, 0, -0.96, 1.16, 0, -0.3, 0, 0.03])

TWO_JOINTS = """
name: two
cameras: [{name: cam, topic: cam/image_raw, rate: 20}]
joint_states: {topic: joint_states, rate: 50}
prompt: {topic: prompt, default: go}
joints:
  - {name: a, min: -1.0, max: 1.0, max_velocity: 1.0, max_acceleration: 10.0}
  - {name: b, min: 0.0, max: 0.1, max_velocity: 0.5}
policy:
  rate: 20
  state: [b, a]
  action: [b, a]
  conventions: {b: {offset: 0.02, scale: 10.0}}
command: {interface: joint_trajectory, topic: jtc/joint_trajectory}
timeouts: {camera: 0.5, joint_states: 0.2, skew: 0.1, action: hold}
"""


def robot(tmp_path: Path, text: str = TWO_JOINTS) -> RobotFile:
    path = tmp_path / "robot.yaml"
    path.write_text(text, encoding="utf-8")
    return RobotFile.load(path)


def stamp(nanoseconds: int) -> Any:
    return SimpleNamespace(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)


def header(nanoseconds: int) -> Any:
    return SimpleNamespace(stamp=stamp(nanoseconds), frame_id="")


def image(nanoseconds: int, value: int = 0, height: int = 6, width: int = 8, encoding: str = "rgb8") -> Any:
    channels = 1 if encoding == "mono8" else 3
    data = bytes([value % 256]) * (height * width * channels)
    return SimpleNamespace(
        header=header(nanoseconds),
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=width * channels,
        data=data,
    )


def joint_state(nanoseconds: int, names: list[str], positions: Any) -> Any:
    return SimpleNamespace(
        header=header(nanoseconds), name=list(names), position=list(positions), velocity=[], effort=[]
    )


class RampPolicy:
    """Predicts a straight ramp from the state, ``slope`` a step; honours a Continuation if asked to."""

    def __init__(self, robot: RobotFile, horizon: int = 50, slope: float = 0.01, rtc: bool = True) -> None:
        self.spec = PolicySpec(
            name="ramp",
            cameras=tuple(c.name for c in robot.cameras),
            state_dim=len(robot.state_names),
            action_dim=len(robot.action_names),
            max_action_dim=32,
            horizon=horizon,
        )
        self.slope, self.rtc, self.calls = slope, rtc, 0
        self.previous: list[Any] = []

    def infer(self, observation: Observation, noise: Any = None, previous: Any = None) -> ActionChunk:
        self.calls += 1
        self.previous.append(previous)
        steps = np.arange(self.spec.horizon, dtype=np.float32)[:, None]
        actions = observation.state[None, : self.spec.action_dim] + self.slope * steps
        actions = actions.astype(np.float32)
        normalised = np.zeros((self.spec.horizon, self.spec.max_action_dim), np.float32)
        normalised[:, : self.spec.action_dim] = actions
        return ActionChunk(actions, normalised, observation.stamp, {"denoise": 0.001})
