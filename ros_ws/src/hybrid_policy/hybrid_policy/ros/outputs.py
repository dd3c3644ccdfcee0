"""The three ways in which commands leave, chosen in the robot file.

``joint_trajectory``: whole chunks, for joint_trajectory_controller, stamp 0 (at once), velocities filled.
``forward_position``: ticks, for a forward_command_controller. ``twist``: ticks, for moveit_servo.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from typing import Any

import numpy as np
from geometry_msgs.msg import TwistStamped
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from hybrid_policy.control.chunk_timeline import Trajectory
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.ros.times import time_message

Array = NDArray[np.float64]
#: A hold's one point is due this long after it is sent (ns): the controller brakes within it.
HOLD_DURATION = 100_000_000


class Output(ABC):
    """Where commands go: publishers on one node, of which the first has the command topic.

    Times are nanoseconds of the node's clock.
    """

    def __init__(self, node: Node, topic: str, kind: type[Any], depth: int) -> None:
        self.topic = topic
        self._node = node
        self._publishers: list[Any] = []
        self._publisher = self._publish_on(kind, topic, depth)

    def _publish_on(self, kind: type[Any], topic: str, depth: int) -> Any:
        publisher = self._node.create_publisher(kind, topic, QoSProfile(depth=depth))
        self._publishers.append(publisher)
        return publisher

    def chunk(self, trajectory: Trajectory) -> None:  # noqa: B027
        """A new trajectory is in force: nothing, where the ticks carry it."""

    def tick(self, position: Array, now: int) -> None:  # noqa: B027
        """The command at this tick, float64 [commands]: nothing, where the controller has the chunk."""

    @abstractmethod
    def hold(self, position: Array, now: int) -> None:
        """Stand still at ``position`` (a twist: do not move; the gripper keeps its place)."""

    def listeners(self) -> int:
        """How many subscribers the command topic has."""
        return int(self._publisher.get_subscription_count())

    def flush(self) -> None:
        """Wait, 0.2 s at most, until what was sent has been received."""
        self._publisher.wait_for_all_acked(Duration(seconds=0.2))

    def close(self) -> None:
        """Take the topics back."""
        for publisher in self._publishers:
            self._node.destroy_publisher(publisher)


class TrajectoryOutput(Output):
    """Chunks as trajectory_msgs/JointTrajectory; the message objects are made once."""

    def __init__(self, node: Node, robot: RobotFile, topic: str, horizon: int) -> None:
        super().__init__(node, topic, JointTrajectory, 5)
        self._message = JointTrajectory(joint_names=list(robot.command_names))
        self._points = [JointTrajectoryPoint() for _ in range(horizon)]
        self._buffers = [self._fields(point, len(robot.command_names)) for point in self._points]
        still = JointTrajectoryPoint(velocities=[0.0] * len(robot.command_names))
        still.time_from_start.nanosec = HOLD_DURATION
        self._hold = JointTrajectory(joint_names=list(robot.command_names), points=[still])

    def chunk(self, trajectory: Trajectory) -> None:
        """Publish the points."""
        count = len(trajectory.times)
        nanoseconds = np.round(trajectory.times * 1e9).astype(np.int64).tolist()
        for k in range(count):
            positions, velocities, time_from_start = self._buffers[k]
            positions[:] = trajectory.positions[k]
            velocities[:] = trajectory.velocities[k]
            time_from_start.sec, time_from_start.nanosec = divmod(nanoseconds[k], 1_000_000_000)
        self._message.points = self._points[:count]
        self._publisher.publish(self._message)

    @staticmethod
    def _fields(point: JointTrajectoryPoint, commands: int) -> tuple[Array, Array, Any]:
        """A point's memory to write into: a message's own setter looks at each number one by one."""
        point.positions, point.velocities = array("d", bytes(8 * commands)), array("d", bytes(8 * commands))
        views = np.frombuffer(point.positions), np.frombuffer(point.velocities)
        return *views, point.time_from_start

    def hold(self, position: Array, now: int) -> None:
        """Publish one point, at rest: an empty trajectory would be rejected and the old one go on."""
        self._hold.points[0].positions = position.tolist()
        self._publisher.publish(self._hold)


class PositionOutput(Output):
    """Ticks as std_msgs/Float64MultiArray; the gripper's joints on their own topic if the file says so."""

    def __init__(self, node: Node, robot: RobotFile, topic: str, gripper_topic: str) -> None:
        super().__init__(node, topic, Float64MultiArray, 1)
        gripper = robot.command.gripper.joints if robot.command.gripper is not None else ()
        names = robot.command_names
        self._main = [i for i, name in enumerate(names) if name not in gripper]
        self._grip = [names.index(name) for name in gripper]
        self._gripper: Any = None
        if gripper:
            self._gripper = self._publish_on(Float64MultiArray, gripper_topic, 1)

    def tick(self, position: Array, now: int) -> None:
        """Publish the set-points."""
        self._publisher.publish(Float64MultiArray(data=position[self._main].tolist()))
        if self._gripper is not None:
            self._gripper.publish(Float64MultiArray(data=position[self._grip].tolist()))

    def hold(self, position: Array, now: int) -> None:
        """Publish the held set-points."""
        self.tick(position, now)


class TwistOutput(Output):
    """Ticks as geometry_msgs/TwistStamped in the robot file's frame; the gripper on its own topic."""

    def __init__(self, node: Node, robot: RobotFile, topic: str, gripper_topic: str) -> None:
        super().__init__(node, topic, TwistStamped, 1)
        self._message = TwistStamped()
        self._message.header.frame_id = robot.command.frame
        self._gripper: Any = None
        if "gripper" in robot.command_names:
            self._gripper = self._publish_on(Float64MultiArray, gripper_topic, 1)

    def _twist(self, values: Array, now: int) -> None:
        twist = self._message.twist
        twist.linear.x, twist.linear.y, twist.linear.z = values[:3].tolist()
        twist.angular.x, twist.angular.y, twist.angular.z = values[3:6].tolist()
        self._message.header.stamp = time_message(now)
        self._publisher.publish(self._message)

    def tick(self, position: Array, now: int) -> None:
        """Publish the twist (m/s, rad/s) and the gripper's position."""
        self._twist(position, now)
        if self._gripper is not None:
            self._gripper.publish(Float64MultiArray(data=[float(position[6])]))

    def hold(self, position: Array, now: int) -> None:
        """Publish a zero twist."""
        self._twist(np.zeros(6), now)


def make_output(node: Node, robot: RobotFile, horizon: int, preview: bool) -> Output:
    """The output that the robot file names; ``preview``: the same messages, on ``~/preview`` instead."""
    command = robot.command
    topic = "~/preview" if preview else command.topic
    gripper = command.gripper.topic if command.gripper is not None else ""
    if preview and gripper:
        gripper = "~/preview_gripper"
    if command.interface == "joint_trajectory":
        return TrajectoryOutput(node, robot, topic, horizon)
    if command.interface == "forward_position":
        return PositionOutput(node, robot, topic, gripper)
    return TwistOutput(node, robot, topic, gripper)
