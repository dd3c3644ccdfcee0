"""Where a held robot is told to stay: with the robot if it is moved, and in silence if nobody knows where it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hybrid_policy.control.chunk_timeline import Trajectory
from hybrid_policy.control.cycle import ControlCycle, CycleSettings
from hybrid_policy.control.observation_buffer import ObservationBuffer

from ..control.synthetic import TWO_JOINTS, RampPolicy, joint_state, robot  # isort: skip
from ..control.test_robot_file import TWIST  # isort: skip

if importlib.util.find_spec("rclpy") is None:
    pytest.skip("rclpy is not installed", allow_module_level=True)

from hybrid_policy.ros.robot_hold import RobotHold

T0 = 100 * 10**9
SECOND = 10**9
FORWARD = TWO_JOINTS.replace("joint_trajectory, topic: jtc/joint_trajectory", "forward_position, topic: commands")


class Sent:
    """Stands for an output and for a log: keeps what it was given."""

    def __init__(self) -> None:
        self.holds: list[list[float]] = []
        self.said: list[str] = []

    def hold(self, position: Any, now: int) -> None:
        self.holds.append(np.asarray(position).round(6).tolist())

    def warn(self, key: str, text: str) -> None:
        self.said.append(text)

    error = warn


class Held:
    """A hold of a robot of two joints, what it knows and what it sends."""

    def __init__(self, tmp_path: Path, text: str) -> None:
        self.robot = robot(tmp_path, text)
        self.buffer, self.sent = ObservationBuffer(self.robot, self.robot.cameras), Sent()
        self.cycle = ControlCycle(self.robot, RampPolicy(self.robot), CycleSettings())
        self.hold = RobotHold(self.cycle, self.buffer, self.sent, 0.2, self.sent)  # type: ignore[arg-type]

    def stands(self, now: int, **positions: float) -> None:
        names = self.robot.joint_names
        self.buffer.receive_joints(joint_state(now, list(names), [positions.get(name, 0.05) for name in names]))


@pytest.mark.parametrize("text", [TWO_JOINTS, FORWARD], ids=["trajectory", "ticks"])
def test_a_hold_goes_along_with_a_robot_that_is_moved(tmp_path: Path, text: str) -> None:
    held = Held(tmp_path, text)
    a = held.robot.command_names.index("a")
    held.stands(T0, a=0.1)
    held.hold.begin(T0)
    assert held.sent.holds[-1][a] == 0.1  # nothing was commanded before: where it stands
    held.stands(T0 + SECOND, a=0.25)  # it sags, within the tolerance
    held.hold.repeat(T0 + SECOND, 10**18)
    assert held.sent.holds[-1][a] == 0.1
    held.stands(T0 + 2 * SECOND, a=-0.7)  # it was carried away
    held.hold.repeat(T0 + 2 * SECOND, 2 * 10**18)
    assert held.sent.holds[-1][a] == -0.7
    assert held.sent.said == ["the robot was moved while it was held: holding where it is now"]
    in_force = held.cycle.timeline.sample(T0 + 3 * SECOND)
    assert in_force is not None
    assert in_force[0][a] == -0.7  # the next chunk starts from there
    assert len(held.sent.holds) == 3


def test_a_hold_is_not_repeated_blindly(tmp_path: Path) -> None:
    held = Held(tmp_path, TWO_JOINTS)
    held.stands(T0, a=0.1)
    held.hold.begin(T0)
    held.hold.repeat(T0 + 5 * SECOND, 10**18)  # the joint states are five seconds old
    assert len(held.sent.holds) == 1
    held.stands(T0 + 6 * SECOND, a=0.1)
    held.hold.repeat(T0 + 6 * SECOND, 2 * 10**18)
    held.hold.repeat(T0 + 6 * SECOND, 2 * 10**18 + 1)  # not again within a second
    assert len(held.sent.holds) == 2


@pytest.mark.parametrize(("seen", "held_at"), [(0.1, 0.4), (-0.3, -0.3)], ids=["followed", "blocked"])
def test_without_fresh_joint_states_a_blocked_robot_is_not_sent_to_its_command(
    tmp_path: Path, seen: float, held_at: float
) -> None:
    held = Held(tmp_path, TWO_JOINTS)
    a = held.robot.command_names.index("a")
    start, end = np.full(2, 0.05), np.full(2, 0.05)
    start[a], end[a] = 0.1, 0.4
    still = np.zeros(2)
    held.cycle.timeline.commit(Trajectory(T0, np.ones(1), end[None], still[None], start, still))
    held.stands(T0, a=seen)  # told to be at 0.1 then
    now = T0 + 2 * SECOND
    held.hold.commanded = held.cycle.timeline.sample(now)[0]  # type: ignore[index]
    held.hold.begin(now)
    assert held.sent.holds[-1][a] == held_at


def test_a_twist_is_zero_at_every_tick(tmp_path: Path) -> None:
    held = Held(tmp_path, TWIST)
    held.hold.commanded = np.full(len(held.robot.command_names), 0.5)
    held.hold.begin(T0)
    held.hold.repeat(T0 + 5 * SECOND, 10**18)  # whatever is known of the joints
    assert len(held.sent.holds) == 2
    assert not any(held.sent.holds[-1][:6])


def test_no_action_means_nothing_is_sent(tmp_path: Path) -> None:
    held = Held(tmp_path, TWO_JOINTS.replace("action: hold", "action: none"))
    held.stands(T0, a=0.1)
    held.hold.begin(T0)
    held.hold.repeat(T0, 10**18)
    assert held.sent.holds == []
