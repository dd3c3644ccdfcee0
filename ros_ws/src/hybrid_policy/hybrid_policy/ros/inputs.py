"""The node's subscriptions: each only checks and stores its newest message."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import rclpy
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from hybrid_policy.control.observation_buffer import ObservationBuffer
from hybrid_policy.control.robot_file import Camera, Joint, RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.ros.log import ThrottledLog
from hybrid_policy.ros.receiver import Receiver, ReceiverGroup

#: Best effort hears reliable publishers too, and never waits for an old image.
SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Inputs:
    """Subscribes to what a robot file names and feeds an :class:`ObservationBuffer`.

    A message that cannot be used is dropped, counted in the buffer and named in a throttled warning.
    """

    def __init__(
        self,
        node: LifecycleNode,
        robot: RobotFile,
        buffer: ObservationBuffer,
        cameras: Sequence[Camera],
        reports: ThrottledLog,
    ) -> None:
        self.buffer = buffer
        self._node, self._reports = node, reports
        self._subscriptions = []
        group = ReceiverGroup()
        for camera in cameras:
            kind = CompressedImage if camera.type == "compressed" else Image
            image = self._safely(camera.name, functools.partial(buffer.receive_image, camera.name))
            made = node.create_subscription(kind, camera.topic, image, SENSOR, callback_group=group)
            self._subscriptions.append(made)
        joints = self._safely("joints", buffer.receive_joints)
        depth = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
        made = node.create_subscription(JointState, robot.joint_states_topic, joints, depth, callback_group=group)
        self._subscriptions.append(made)
        self._receiver = Receiver(node, self._subscriptions, self._unreadable)
        self._prompt = self._safely("prompt", buffer.receive_prompt)
        self._prompt_topic, self._latched = robot.prompt_topic, False
        self._subscriptions.append(
            node.create_subscription(String, robot.prompt_topic, self._prompt, QoSProfile(depth=1))
        )

    def look_for_latched_prompt(self) -> None:
        """Listen to a latched prompt too, once one is published.

        The volatile subscription hears every publisher but misses what was latched before it; a latched
        one hears latched publishers only, and makes every other one warn.
        """
        if self._latched:
            return
        found = [i.qos_profile.durability for i in self._node.get_publishers_info_by_topic(self._prompt_topic)]
        if found and all(durability == DurabilityPolicy.TRANSIENT_LOCAL for durability in found):
            self._latched = True
            self._subscriptions.append(
                self._node.create_subscription(String, self._prompt_topic, self._prompt, LATCHED)
            )

    def _safely(self, name: str, receive: Callable[[Any], None]) -> Callable[[Any], None]:
        def callback(message: Any) -> None:
            try:
                receive(message)
            except InputError as error:
                self._reports.warn(f"{name} {str(error)[:32]}", f"dropped: {error}")

        return callback

    def _unreadable(self, error: Exception) -> None:
        self._reports.error("callback", f"dropped: {type(error).__name__}: {error}")

    def close(self) -> None:
        """End the subscriptions."""
        self._receiver.close()
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)


def urdf_limits(text: str, joints: Sequence[Joint]) -> tuple[Joint, ...]:
    """Joints with the limits that their own file leaves out taken from a URDF.

    Raises:
        InputError: not XML, or a limit that is in neither.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"robot_description: not XML ({error}), expected a URDF") from None
    limits = {}
    for element in root.iter("joint"):
        limit = element.find("limit")
        if limit is not None:
            limits[element.get("name")] = {key: float(value) for key, value in limit.attrib.items()}
    filled = []
    for joint in joints:
        found = limits.get(joint.name, {})
        low = joint.min if joint.min is not None else found.get("lower")
        high = joint.max if joint.max is not None else found.get("upper")
        speed = joint.max_velocity if joint.max_velocity is not None else found.get("velocity")
        for key, value in (("lower", low), ("upper", high), ("velocity", speed)):
            if value is None:
                raise InputError(
                    f"robot_description: {joint.name}: no {key} limit, expected it there or in the robot file"
                )
        filled.append(replace(joint, min=low, max=high, max_velocity=speed))
    return tuple(filled)


def await_robot_description(node: Node, robot: RobotFile, seconds: float = 10.0) -> RobotFile:
    """The robot with the limits of the published URDF where its file has none.

    Raises:
        InputError: nothing was published in time, or a limit is missing.
    """
    texts: list[str] = []
    helper = rclpy.create_node(f"{node.get_name()}_description", namespace=node.get_namespace())
    try:
        helper.create_subscription(
            String, robot.robot_description_topic, lambda message: texts.append(message.data), LATCHED
        )
        end = time.monotonic() + seconds
        while not texts and time.monotonic() < end:
            rclpy.spin_once(helper, timeout_sec=0.1)
    finally:
        helper.destroy_node()
    if not texts:
        raise InputError(
            f"{robot.path}: robot_description.topic: nothing on {robot.robot_description_topic!r} within "
            f"{seconds:g} s, expected a URDF"
        )
    return robot.with_joints(urdf_limits(texts[0], robot.joints))
