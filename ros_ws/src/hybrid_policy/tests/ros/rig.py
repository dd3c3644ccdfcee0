"""A robot of three joints and two cameras over DDS, whose faults are chosen, and what a controller heard."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.ros.processes import ros_environment
from hybrid_policy.ros.times import duration_ns, time_message
from hybrid_policy.sim import trajectory_controller as jtc
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

ROBOT = """
name: rig
cameras:
  - {name: front, topic: front/image_raw, rate: 20, frozen_after: 0.5}
  - {name: wrist, topic: wrist/image_raw, rate: 20, frozen_after: 0}
joint_states: {topic: joint_states, rate: 50}
prompt: {topic: prompt, default: go}
joints:
  - {name: shoulder, min: -1.0, max: 1.0, max_velocity: 2.0, max_acceleration: 20.0}
  - {name: elbow, min: -0.5, max: 1.5, max_velocity: 2.0, max_acceleration: 20.0}
  - {name: gripper, min: 0.0, max: 0.1, max_velocity: 0.5}
policy:
  rate: 20
  state: [shoulder, elbow, gripper]
  action: [shoulder, elbow, gripper]
  conventions: {gripper: {offset: 0.0, scale: 10.0}}
command: {interface: joint_trajectory, topic: controller/joint_trajectory}
timeouts: {camera: 0.4, joint_states: 0.2, skew: 0.15, action: hold}
"""
HOME = np.array([0.0, 0.5, 0.05])
HEIGHT, WIDTH = 24, 32


def claim_domain() -> tuple[int, IO[str]]:
    """A DDS domain that no other test on this machine has: in a shared one its node would be a second one.

    The file's lock goes with the process, however it ends.
    """
    for domain in range(20, 50):
        file = (Path(tempfile.gettempdir()) / f"hybrid_policy_domain_{domain}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        return domain, file
    raise RuntimeError("every test domain from 20 to 49 is in use")


@dataclass
class Faults:
    """What the robot's drivers do wrong; the defaults are right."""

    image: Callable[[str, Image, int], Image | None] = lambda camera, message, count: message
    joints: Callable[[JointState], JointState | None] = lambda message: message
    frozen: str = ""
    blocked: bool = False
    clock_offset: int = 0
    listening: bool = True


@dataclass
class Heard:
    """What reached the controller and the operator."""

    trajectories: list[tuple[float, JointTrajectory]] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    status: str = ""


class Rig:
    """Publishes cameras at 20 Hz and joints at 50 Hz; follows trajectories as a controller would."""

    def __init__(self, folder: Path, sim_time: bool = False, robot: str = ROBOT) -> None:
        os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        self.folder, self.sim_time = folder, sim_time
        self.domain, self._claim = claim_domain()
        self.file = folder / "rig.yaml"
        self.file.write_text(robot)
        self.robot = RobotFile.load(self.file)
        self.faults, self.heard = Faults(), Heard()
        self.rejected: list[str] = []
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.controller = jtc.TrajectoryController(self.robot.joint_names, HOME)
        self._measured = HOME.copy()
        self._random = np.random.default_rng(0)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=self.domain)
        self.node = rclpy.create_node("rig", context=self._context)
        sensor = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        make = self.node.create_publisher
        self.images = {c.name: make(Image, c.topic, sensor) for c in self.robot.cameras}
        self.joints = make(JointState, "joint_states", sensor)
        self._clock = make(Clock, "/clock", 10) if sim_time else None
        self.prompt = make(String, "prompt", 1)
        self._listener: Any = None
        self.listen(self.robot.command.interface == "joint_trajectory")
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.node.create_subscription(String, "/policy_node/status", self._on_status, 10)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._spin, self._drive)]
        for thread in self._threads:
            thread.start()

    def now(self) -> int:
        """The robot's time, nanoseconds."""
        return time.time_ns() + self.faults.clock_offset

    def listen(self, on: bool) -> None:
        """Start or stop the controller's subscription."""
        if on and self._listener is None:
            self._listener = self.node.create_subscription(
                JointTrajectory, self.robot.command.topic, self._on_trajectory, 10
            )
        elif not on and self._listener is not None:
            self.node.destroy_subscription(self._listener)
            self._listener = None

    def close(self) -> None:
        """End."""
        for process in self.nodes:  # of a test that failed before it ended them
            if process.poll() is None:
                process.kill()
        self._stop.set()
        self._executor.shutdown()
        for thread in self._threads:
            thread.join(5)
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)
        self._claim.close()

    # Threads

    def _spin(self) -> None:
        try:
            while not self._stop.is_set():
                self._executor.spin_once(timeout_sec=0.1)
        except ExternalShutdownException:
            pass

    def _drive(self) -> None:
        count, due = 0, time.monotonic()
        while not self._stop.is_set():
            now = self.now()
            if self._clock is not None:
                self._clock.publish(Clock(clock=time_message(now)))
            with self._lock:
                desired = self.controller.sample(now, self._measured, np.zeros(3))
                if not self.faults.blocked:
                    self._measured = desired
            if count % 2 == 0:
                joints = JointState(name=list(self.robot.joint_names), position=self._measured.tolist())
                joints.header.stamp = time_message(now)
                changed = self.faults.joints(joints)
                if changed is not None:
                    self.joints.publish(changed)
            if count % 5 == 0:
                for name, publisher in self.images.items():
                    image = self.faults.image(name, self._image(name, now), count // 5)
                    if image is not None:
                        publisher.publish(image)
            count += 1
            due = max(due + 0.01, time.monotonic())
            self._stop.wait(due - time.monotonic())

    def _image(self, camera: str, now: int) -> Image:
        message = Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=3 * WIDTH)
        message.header.stamp = time_message(now)
        if self.faults.frozen == camera:
            message.data = bytes(3 * HEIGHT * WIDTH)
        else:
            message.data = self._random.integers(0, 256, 3 * HEIGHT * WIDTH, np.uint8).tobytes()
        return message

    def _on_trajectory(self, message: JointTrajectory) -> None:
        points = [
            jtc.TrajectoryPoint(duration_ns(p.time_from_start), list(p.positions), list(p.velocities))
            for p in message.points
        ]
        stamp = duration_ns(message.header.stamp)
        with self._lock:
            reason = self.controller.receive(jtc.Trajectory(list(message.joint_names), points, stamp), self.now())
        if reason is not None:
            self.rejected.append(reason)
        self.heard.trajectories.append((time.monotonic(), message))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.heard.diagnostics[status.name] = status

    def _on_status(self, message: String) -> None:
        self.heard.status = message.data

    # Asking

    def diagnostic(self, name: str) -> tuple[int, str, dict[str, str]]:
        """(level, message, values) of a status, e.g. ``output``."""
        status = self.heard.diagnostics.get(f"policy_node: {name}")
        if status is None:
            return -1, "", {}
        return status.level[0], status.message, {v.key: v.value for v in status.values}

    def said(self) -> str:
        """Everything that diagnostics say at the moment."""
        return " | ".join(f"{name}: {s.message}" for name, s in sorted(self.heard.diagnostics.items()))

    def desired(self) -> np.ndarray:
        """The controller's set-points."""
        with self._lock:
            return self.controller.desired

    def measured(self) -> np.ndarray:
        """Where the robot is."""
        with self._lock:
            return self._measured.copy()

    def carry(self, position: np.ndarray) -> None:
        """Move the robot by hand, its controller off meanwhile: it then stands there, whatever was commanded."""
        with self._lock:
            self._measured = position.copy()
            self.controller = jtc.TrajectoryController(self.robot.joint_names, position)

    def chunks(self, since: float) -> list[JointTrajectory]:
        """Trajectories of more than a point that were heard since a time."""
        return [m for t, m in list(self.heard.trajectories) if t >= since and len(m.points) > 1]

    def holds(self, since: float) -> list[tuple[float, JointTrajectory]]:
        """Hold commands heard since a time."""
        return [(t, m) for t, m in list(self.heard.trajectories) if t >= since and len(m.points) == 1]

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
        """Wait until a condition holds; fails with what the robot heard."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if result := condition():
                return result
            time.sleep(0.01)
        raise AssertionError(f"{what}: not within {seconds} s; status {self.heard.status!r}; {self.said()}")

    def wait_running(self) -> None:
        """Until chunks flow."""
        since = time.monotonic()
        self.wait(lambda: len(self.chunks(since)) >= 2, "chunks")

    def check_commands(self) -> None:
        """Every command ever heard is one that the controller takes and within the robot's limits."""
        limits = self.robot.limits
        for _, message in list(self.heard.trajectories):
            assert message.points, "an empty trajectory"
            path = np.array([p.positions for p in message.points])
            assert np.isfinite(path).all()
            assert (path >= limits.lower - 1e-9).all(), path
            assert (path <= limits.upper + 1e-9).all(), path
            speeds = np.array([p.velocities for p in message.points])
            assert (np.abs(speeds) <= limits.velocity + 1e-6).all()
            times = np.array([duration_ns(p.time_from_start) for p in message.points]) * 1e-9
            steps = np.abs(np.diff(path, axis=0)) / np.diff(times)[:, None] if len(times) > 1 else np.zeros((1, 3))
            assert (steps <= limits.velocity + 1e-4).all()
        assert self.rejected == []


class NodeUnderTest:
    """The policy node, with a scripted policy (scripted_node.py), in a process of its own."""

    def __init__(self, rig: Rig, name: str = "node", **parameters: Any) -> None:
        values = {
            "robot": str(rig.file),
            "checkpoint": "random",  # not loaded: the scripted policy takes its place
            "inference_rate": 10.0,
            "output_timeout": 0.6,
            "discovery_time": 1.0,
            "latency_log": str(rig.folder / f"{name}.jsonl"),
            "rt.fifo_priority": 0,
            "use_sim_time": rig.sim_time,
            **parameters,
        }
        arguments = ["--ros-args"]
        for key, value in values.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            arguments += ["-p", f"{key}:={text}"]
        self.log = rig.folder / f"{name}.log"
        self._output = self.log.open("wb")
        environment = ros_environment() | {"ROS_DOMAIN_ID": str(rig.domain), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("scripted_node.py")), *arguments],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment,
        )

        rig.nodes.append(self.process)

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")

    def end(self, timeout: float = 20.0) -> int:
        """Interrupt it and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(2)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._output.close()
        return code
