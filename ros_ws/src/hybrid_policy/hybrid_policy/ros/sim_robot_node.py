"""sim_robot_node: publishes what a real robot's drivers publish, and obeys the same trajectory topic.

The simulated bimanual ViperX with two cubes before it. Physics and the trajectory controller run in one
thread on absolute deadlines, cameras in another (on a copy of the state), so that drawing never delays
joint states. The simulator judges the task and publishes the verdict.
"""

from __future__ import annotations

import json
import secrets
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.ros.times import duration_ns, time_message
from hybrid_policy.share import resolve
from hybrid_policy.sim.episode_film import EpisodeFilm
from hybrid_policy.sim.rendering import load_mujoco
from hybrid_policy.sim.robot import CAMERAS, IMAGE_SIZE, TIME_STEP, SimRobot
from hybrid_policy.sim.scene import JOINT_NAMES
from hybrid_policy.sim.tasks import SceneSettings, Verdict, colour_in, judge, sample_scene
from hybrid_policy.sim.trajectory_controller import Trajectory, TrajectoryController, TrajectoryPoint

#: Nanoseconds after a new scene during which the controller is off, as a real one is while its robot is carried
#: back: what was planned from the old place would throw it there.
CARRIED_BACK = 250_000_000
#: name -> (default, description)
PARAMETERS: dict[str, tuple[object, str]] = {
    "robot": ("sim_aloha", "Robot file with the topics to publish: a path, or the name of one that ships"),
    "prompt": ("", "The task to judge until a prompt arrives on its topic; empty: the robot file's"),
    "seed": (-1, "Seed of the scenes; -1 draws one"),
    "randomise": (True, "Draw light, shades, sizes and the start pose at random too"),
    "distractor": (False, "Put a third cube on the table"),
    "publish_clock": (False, "Publish /clock with simulated time and stamp with it"),
    "episode_timeout": (0.0, "Seconds until a new scene; 0: only ~/reset makes one"),
    "film": ("", "Folder for pictures of the episode, written at exit; empty: none"),
}


class SimRobotNode(Node):
    """The robot, its cameras and its task. Call :meth:`run` after construction, :meth:`close` at the end."""

    def __init__(self) -> None:
        super().__init__("sim_robot")
        for name, (default, description) in PARAMETERS.items():
            descriptor = ParameterDescriptor(description=description, read_only=True)
            self.declare_parameter(name, default, descriptor)
        value: dict[str, Any] = {name: self.get_parameter(name).value for name in PARAMETERS}
        self._file = RobotFile.load(resolve(str(value["robot"]), "config/robots"))
        _check(self._file)
        seed = int(value["seed"])
        self._seed = seed if seed >= 0 else secrets.randbelow(2**31)
        self._random = np.random.default_rng(self._seed)
        self._settings = SceneSettings(
            randomise=bool(value["randomise"]), distractor=1.0 if value["distractor"] else 0.0
        )
        self._episode_timeout = float(value["episode_timeout"])
        self._publish_clock = bool(value["publish_clock"])

        self._robot = SimRobot(sample_scene(self._random, self._settings), self._seed)
        self._shown = SimRobot(self._robot.scene, self._seed)  # the cameras' own copy, drawn by their thread
        self._controller = TrajectoryController(JOINT_NAMES, self._robot.positions)
        self._target = colour_in(str(value["prompt"]) or self._file.prompt or self._robot.scene.prompt)
        self._lock = threading.Lock()  # robot, controller, target and scene
        self._verdict = Verdict(False, False, {})
        self._solved_at: float | None = None
        self._started = self._status_due = 0.0
        self._scene_number = 0
        self._film = EpisodeFilm(Path(str(value["film"]))) if value["film"] else None
        self._stop = threading.Event()
        self._controller_on = 0  # ns: the controller takes no trajectory before
        self._base = 0  # ns: the ROS time of simulated time 0

        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._images = {
            camera.name: self.create_publisher(Image, camera.topic, qos_profile_sensor_data)
            for camera in self._file.cameras
        }
        states = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
        self._joint_states = self.create_publisher(JointState, self._file.joint_states_topic, states)
        self._success = self.create_publisher(Bool, "task/success", latched)
        self._status = self.create_publisher(String, "task/status", latched)
        self._time = self.create_publisher(ClockMessage, "/clock", 10) if self._publish_clock else None
        self.create_subscription(JointTrajectory, self._file.command.topic, self._on_trajectory, 5)
        self.create_subscription(String, self._file.prompt_topic, self._on_prompt, 5)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self._threads = [
            threading.Thread(target=self._physics, name="physics"),
            threading.Thread(target=self._cameras, name="cameras"),
        ]

    def run(self) -> None:
        """Start physics and cameras."""
        self.get_logger().info(
            f"simulated robot: seed {self._seed}, target {self._target}; lift it above 8 cm to succeed"
        )
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads and write the pictures."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        if self._film is not None:
            with self._lock:
                caption = self._report()
            self._film.save(caption)

    # --- what comes in -------------------------------------------------------------------------

    def _on_trajectory(self, message: JointTrajectory) -> None:
        trajectory = Trajectory(
            joint_names=message.joint_names,
            points=[
                TrajectoryPoint(duration_ns(p.time_from_start), p.positions, p.velocities, p.accelerations)
                for p in message.points
            ],
            stamp=duration_ns(message.header.stamp),
        )
        with self._lock:
            if self._now() < self._controller_on:
                return
            reason = self._controller.receive(trajectory, self._now())
        if reason is not None:
            self.get_logger().warning(f"trajectory rejected: {reason}", throttle_duration_sec=1.0)

    def _on_prompt(self, message: String) -> None:
        try:
            target = colour_in(message.data)
        except InputError as error:
            self.get_logger().warning(f"the task stays as it is: {error}")
            return
        with self._lock:
            if target != self._target:
                self._target, self._solved_at = target, None
                self._status_due = 0.0

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._lock:
            self._new_scene()
        response.success, response.message = True, f"scene {self._scene_number}"
        return response

    def _new_scene(self) -> None:
        scene = sample_scene(self._random, self._settings)
        elapsed = self._robot.time_ns
        self._robot.reset(scene)
        self._base += elapsed  # stamps go on where they were
        self._controller = TrajectoryController(JOINT_NAMES, self._robot.positions)
        self._controller_on = self._now() + CARRIED_BACK
        self._verdict, self._solved_at, self._started = Verdict(False, False, {}), None, self._now() * 1e-9
        self._status_due = 0.0
        self._scene_number += 1

    # --- what goes out -------------------------------------------------------------------------

    def _now(self) -> int:
        """Nanoseconds of the time that this node stamps with."""
        return self._base + self._robot.time_ns

    def _physics(self) -> None:
        """Joint states at their rate; between two of them the controller is sampled every 2 ms."""
        period = round(1e9 / self._file.joint_states_rate)
        steps = max(1, round(period * 1e-9 / TIME_STEP))
        # Minus one period: a state is published when its own time has come, not before.
        self._base = 0 if self._publish_clock else self.get_clock().now().nanoseconds - period
        self._started = self._base * 1e-9
        due = time.monotonic_ns()
        while not self._stop.is_set():
            with self._lock:
                for _ in range(steps):
                    robot = self._robot
                    robot.command(self._controller.sample(self._now(), robot.positions, robot.velocities))
                    robot.step()
                message = self._joint_state()
                self._judge()
            if self._time is not None:
                self._time.publish(ClockMessage(clock=message.header.stamp))
            self._joint_states.publish(message)
            due += period
            late = time.monotonic_ns() - due
            if late > 1_000_000_000:
                self.get_logger().warning(f"physics is {late * 1e-9:.1f} s late; simulated time falls behind")
                due += late
                if not self._publish_clock:
                    self._base += late
            self._stop.wait(max(0.0, -late * 1e-9))

    def _joint_state(self) -> JointState:
        message = JointState(name=list(JOINT_NAMES))
        message.header.stamp = time_message(self._now())
        message.position = self._robot.positions.tolist()
        message.velocity = self._robot.velocities.tolist()
        return message

    def _judge(self) -> None:
        """Publish the verdict when it changes and every second; a new scene when its time is over."""
        verdict = judge(self._robot, self._target)
        now = self._now() * 1e-9
        if verdict.success and self._solved_at is None:
            self._solved_at = now
        changed = (verdict.success, verdict.wrong) != (self._verdict.success, self._verdict.wrong)
        due = now >= self._status_due
        self._verdict = verdict
        if changed or due:
            self._status_due = now + 1.0
            self._success.publish(Bool(data=verdict.success))
            self._status.publish(String(data=json.dumps(self._report())))
        if self._episode_timeout and now - self._started > self._episode_timeout:
            self._new_scene()

    def _report(self) -> dict[str, object]:
        return {
            "scene": self._scene_number,
            "seed": self._seed,
            "target": self._target,
            "success": self._verdict.success,
            "wrong": self._verdict.wrong,
            "seconds": round((self._solved_at or self._now() * 1e-9) - self._started, 3),
            "heights": {colour: round(height, 4) for colour, height in self._verdict.heights.items()},
            "rejected_trajectories": self._controller.rejected,
        }

    def _cameras(self) -> None:
        """Draw each camera at its rate from a snapshot; the stamp is the snapshot's time."""
        mujoco = load_mujoco()
        names = [camera.name for camera in self._file.cameras]
        period = round(1e9 / max(camera.rate for camera in self._file.cameras))
        due = time.monotonic_ns()
        frames = 0
        while not self._stop.is_set():
            with self._lock:
                if self._shown.scene is not self._robot.scene:
                    self._shown.reset(self._robot.scene)
                self._shown.data.qpos[:] = self._robot.data.qpos
                stamp = self._now()
            mujoco.mj_forward(self._shown.model, self._shown.data)
            for name in names:
                self._images[name].publish(self._image(name, stamp))
            if self._film is not None and frames % 5 == 0:
                self._film.add(self._shown.render_frame("angle", 360, 480), stamp)
            frames += 1
            due = max(due + period, time.monotonic_ns())
            self._stop.wait(max(0.0, (due - time.monotonic_ns()) * 1e-9))
        self._shown.close()

    def _image(self, camera: str, stamp: int) -> Image:
        pixels = self._shown.render(camera)
        message = Image(height=IMAGE_SIZE, width=IMAGE_SIZE, encoding="rgb8", step=3 * IMAGE_SIZE)
        message.header.stamp = time_message(stamp)
        message.header.frame_id = camera
        message.data = pixels.tobytes()
        return message


def _check(robot: RobotFile) -> None:
    """Raise InputError unless the robot file describes the robot that is simulated here."""
    cameras = [camera.name for camera in robot.cameras]
    if sorted(cameras) != sorted(CAMERAS):
        raise InputError.at(robot.path, "cameras", cameras, f"{', '.join(CAMERAS)} (the simulated robot's)")
    if robot.joint_names != JOINT_NAMES:
        raise InputError.at(robot.path, "joints", list(robot.joint_names), "the simulated robot's 14 joints")
    if robot.command.interface != "joint_trajectory":
        raise InputError.at(robot.path, "command.interface", robot.command.interface, "joint_trajectory")


def main() -> int:
    """Run the node until it is interrupted; exit code 2 for bad input."""
    # Our own handlers: rclpy's would end the context under the threads that still publish.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        node = SimRobotNode()
    except InputError as error:
        print(error, file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    node.run()
    try:
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.1)
    finally:
        node.close()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
