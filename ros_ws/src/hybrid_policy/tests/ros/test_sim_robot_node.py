"""The simulated robot as a process: what it publishes, and that it obeys trajectories and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hybrid_policy.ros import bringup
from hybrid_policy.ros.processes import NodeProcess, ros_environment
from hybrid_policy.share import share_path

rclpy = pytest.importorskip("rclpy", reason="rclpy is not installed")
# Not imported here: the simulator chooses an OpenGL before MuJoCo is.
missing = importlib.util.find_spec("mujoco") is None
pytestmark = [pytest.mark.ros, pytest.mark.skipif(missing, reason="mujoco is not installed")]

from builtin_interfaces.msg import Duration  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data  # noqa: E402
from sensor_msgs.msg import Image, JointState  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint  # noqa: E402

DOMAIN = "7"
COMMAND = "joint_trajectory_controller/joint_trajectory"


class Listener:
    """A node that keeps everything it hears from the simulated robot."""

    def __init__(self) -> None:
        os.environ.update({**ros_environment(), "ROS_DOMAIN_ID": DOMAIN})
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=int(DOMAIN))
        self.node = rclpy.create_node("listener", context=self.context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.heard: dict[str, list[Any]] = {"overhead": [], "wrist": [], "joints": [], "status": []}
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._listen(Image, "camera_overhead/image_raw", "overhead", qos_profile_sensor_data)
        self._listen(Image, "camera_right_wrist/image_raw", "wrist", qos_profile_sensor_data)
        self._listen(JointState, "joint_states", "joints", 10)
        self._listen(String, "task/status", "status", latched)
        self.command = self.node.create_publisher(JointTrajectory, COMMAND, 5)
        self.prompt = self.node.create_publisher(String, "prompt", 5)

    def _listen(self, kind: type, topic: str, key: str, qos: Any) -> None:
        self.node.create_subscription(kind, topic, self.heard[key].append, qos)

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> bool:
        """Receive until the condition holds; False when it did not within the time."""
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.05)
        return condition()

    def position(self, joint: str) -> float:
        message = self.heard["joints"][-1]
        return float(message.position[message.name.index(joint)])

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listener]:
    folder = tmp_path_factory.mktemp("sim")
    node = bringup.NodeDescription("sim_robot_node", "sim_robot", {"seed": 3, "film": str(folder)})
    process = NodeProcess.start(node, folder / "log", {**ros_environment(), "ROS_DOMAIN_ID": DOMAIN})
    ears = Listener()
    try:
        assert ears.until(lambda: bool(ears.heard["joints"] and ears.heard["wrist"]), 60), process.tail()
        yield ears
    finally:
        ears.close()
        assert process.stop() == 0, process.tail()
    assert (folder / "episode.png").stat().st_size > 1000
    assert (folder / "episode.gif").stat().st_size > 1000


def trajectory(message: JointState, changes: dict[str, float], seconds: float = 0.5) -> JointTrajectory:
    positions = [changes.get(n, p) for n, p in zip(message.name, message.position)]
    whole = int(seconds)
    point = JointTrajectoryPoint(
        positions=positions,
        velocities=[0.0] * len(positions),
        time_from_start=Duration(sec=whole, nanosec=round((seconds - whole) * 1e9)),
    )
    return JointTrajectory(joint_names=message.name, points=[point])


def test_images_and_joint_states(listener: Listener) -> None:
    robot = yaml.safe_load(share_path("config/robots/sim_aloha.yaml").read_text())
    message = listener.heard["joints"][-1]
    assert list(message.name) == [joint["name"] for joint in robot["joints"]]
    for joint, position in zip(robot["joints"], message.position):
        assert joint["min"] - 1e-3 <= position <= joint["max"] + 1e-3
    for camera in ("overhead", "wrist"):
        image = listener.heard[camera][-1]
        assert (image.height, image.width, image.encoding, image.step) == (224, 224, "rgb8", 672)
        pixels = np.frombuffer(image.data, np.uint8)
        assert pixels.size == 224 * 224 * 3
        assert pixels.std() > 5  # a picture, not one colour


def test_stamps_rise_and_are_the_robots_time(listener: Listener) -> None:
    for key in ("joints", "overhead", "wrist"):
        start = len(listener.heard[key])
        assert listener.until(lambda key=key, start=start: len(listener.heard[key]) >= start + 5)  # type: ignore[misc]
        stamps = [m.header.stamp.sec + m.header.stamp.nanosec * 1e-9 for m in listener.heard[key]]
        assert np.diff(stamps).min() > 0
        assert abs(stamps[-1] - time.time()) < 5.0


def test_obeys_a_trajectory(listener: Listener) -> None:
    before = listener.position("right_waist")
    listener.command.publish(trajectory(listener.heard["joints"][-1], {"right_waist": before + 0.2}))
    assert listener.until(lambda: abs(listener.position("right_waist") - before - 0.2) < 0.02)
    assert abs(listener.position("left_waist")) < 0.3


def test_rejects_what_a_controller_rejects(listener: Listener) -> None:
    message = listener.heard["joints"][-1]
    before = listener.position("right_waist")
    moving = trajectory(message, {"right_waist": before + 0.5})
    moving.points[0].velocities = [1.0] * len(message.name)
    unknown = trajectory(message, {"right_waist": before + 0.5})
    unknown.joint_names = ["elsewhere", *message.name[1:]]
    for bad in (moving, unknown, JointTrajectory(joint_names=message.name)):
        listener.command.publish(bad)
    count = len(listener.heard["joints"])
    assert listener.until(lambda: len(listener.heard["joints"]) > count + 50)
    assert abs(listener.position("right_waist") - before) < 0.02


def test_the_prompt_names_the_target(listener: Listener) -> None:
    assert listener.until(lambda: bool(listener.heard["status"]))
    status = json.loads(listener.heard["status"][-1].data)
    assert status["target"] == "red"
    assert status["success"] is False
    assert set(status["heights"]) == {"red", "blue"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"cameras": [{"name": "x", "topic": "x", "rate": 1.0}]}, "cameras"),
        ({"colour": "grey"}, "colour"),
    ],
)
def test_bad_robot_file_is_one_line_and_exit_2(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    robot = yaml.safe_load(share_path("config/robots/sim_aloha.yaml").read_text())
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump({**robot, **change}))
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_policy.ros.sim_robot_node", "--ros-args", "-p", f"robot:={path}"],
        env={**ros_environment(), "ROS_DOMAIN_ID": DOMAIN},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stderr
    assert line in done.stderr
    assert "Traceback" not in done.stderr
