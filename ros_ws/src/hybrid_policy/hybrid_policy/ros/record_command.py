"""Record a robot file's topics as an mcap bag, with the ROS 2 wheels alone (no ros2bag needed).

Cameras, joint states, prompt, commands and diagnostics are recorded as they come, with the time of their
arrival; each topic as soon as somebody publishes it, with that publisher's quality of service. Ctrl-C
ends the recording. `hybrid-policy replay`, `ros2 bag play` and Foxglove read it. Where a ROS 2
installation is at hand, `ros2 bag record` does as well.

  hybrid-policy record bags/run1 --robot sim_aloha
  hybrid-policy record bags/run2 --robot arm.yaml --topic /wrench --seconds 60

Exit code: 0 recorded, 1 nothing came on a camera or the joint states (said which), 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib
import json
import queue
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import free_space
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.extras import require
from hybrid_policy.share import resolve

#: Seconds between two looks at which topics there are.
_LOOK = 0.25
#: Bytes waiting for the disk beyond which messages are dropped (and counted) rather than memory filled.
_MOST_WAITING = 512 << 20
#: Bytes that stay free on the disk.
_SPARE = 200 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("bag", type=Path, help="the bag to write: a new folder")
    parser.add_argument("--robot", required=True, help="robot file, or the name of one that ships")
    parser.add_argument("--topic", action="append", default=[], help="another topic; may be repeated")
    parser.add_argument("--namespace", default="", help="namespace of the robot's topics")
    parser.add_argument("--seconds", type=float, default=0.0, help="end after this long (default: Ctrl-C)")
    parser.add_argument(
        "--compression", choices=("none", "chunk"), default="none",
        help="chunk: zstd, for raw images and a fast CPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was recorded as JSON")


def run(args: argparse.Namespace) -> int:
    """Record until Ctrl-C; the exit code is in the module's docstring."""
    require("rosbags")
    robot = RobotFile.load(resolve(args.robot, "config/robots"))
    if args.seconds < 0.0:
        raise InputError(f"--seconds: {args.seconds} given, expected 0 or more")
    try:
        import rclpy
        from rclpy.signals import SignalHandlerOptions
    except ImportError as error:
        raise InputError(f"rclpy: not importable ({error}); pip install 'hybrid_policy[ros]'") from error
    needed, others = _topics(robot, args.namespace, args.topic)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    node = rclpy.create_node("hybrid_policy_record", namespace=args.namespace)
    try:
        with BagWriter(args.bag, "mcap", args.compression) as writer:
            recording = Recording(node, writer, {*needed, *others}, args.bag)
            recording.run(stop, args.seconds)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    missing = [topic for topic in needed if not recording.counts[topic]]
    if args.json:
        told = {"bag": str(args.bag), "messages": dict(recording.counts), "dropped": recording.dropped}
        print(json.dumps(told | {"missing": missing}))
    else:
        for topic, count in sorted(recording.counts.items()):
            print(f"{count:>8}  {topic}")
    if recording.dropped:
        print(f"{recording.dropped} messages dropped: the disk is too slow", file=sys.stderr)
    if recording.error:
        raise InputError(recording.error)
    for topic in missing:
        print(f"{topic}: nothing received", file=sys.stderr)
    return 1 if missing else 0


def _topics(robot: RobotFile, namespace: str, extra: list[str]) -> tuple[list[str], list[str]]:
    """(those without which a recording is of no use, the others), absolute."""
    prefix = "/" + namespace.strip("/") if namespace.strip("/") else ""

    def absolute(name: str) -> str:
        return name if name.startswith("/") else f"{prefix}/{name}"

    needed = [absolute(camera.topic) for camera in robot.cameras] + [absolute(robot.joint_states_topic)]
    others = [robot.prompt_topic, robot.command.topic, "/diagnostics", "/clock", *extra]
    if robot.command.gripper is not None:
        others.append(robot.command.gripper.topic)
    return needed, [absolute(name) for name in others if name]


class Recording:
    """Subscribes to topics as they appear and writes what comes.

    The executor only hands bytes over; a thread of its own writes, so that a slow disk delays no message.
    """

    def __init__(self, node: Any, writer: BagWriter, topics: set[str], path: Path) -> None:
        self._node, self._writer, self._wanted, self._path = node, writer, set(topics), path
        self._queue: queue.SimpleQueue[tuple[str, str, bytes, int] | None] = queue.SimpleQueue()
        self._waiting = 0
        self.counts: Counter[str] = Counter(dict.fromkeys(topics, 0))
        self.dropped = 0
        self.error = ""

    def run(self, stop: threading.Event, seconds: float) -> None:
        """Record until ``stop`` is set or ``seconds`` have passed (0: no limit)."""
        from rclpy.executors import SingleThreadedExecutor

        thread = threading.Thread(target=self._write, name="bag writer")
        thread.start()
        executor = SingleThreadedExecutor()
        executor.add_node(self._node)
        end = time.monotonic() + seconds if seconds > 0.0 else float("inf")
        look = 0.0
        try:
            while not stop.is_set() and not self.error and time.monotonic() < end:
                if time.monotonic() >= look:
                    self._look()
                    look = time.monotonic() + _LOOK
                executor.spin_once(timeout_sec=0.05)
        finally:
            self._queue.put(None)
            thread.join()
            executor.shutdown()

    def _look(self) -> None:
        """Subscribe to wanted topics that somebody publishes now."""
        for name, kinds in self._node.get_topic_names_and_types():
            if name not in self._wanted:
                continue
            offers = [info.qos_profile for info in self._node.get_publishers_info_by_topic(name)]
            if not offers:
                continue
            self._wanted.discard(name)
            kind = kinds[0]
            if kind not in self._writer.types.fielddefs:
                print(f"{name}: {kind} is no standard type and was left out", file=sys.stderr)
                continue
            package, _, message = kind.split("/")
            message_class = getattr(importlib.import_module(f"{package}.msg"), message)
            self._node.create_subscription(message_class, name, self._receiver(name, kind), _quality(offers), raw=True)

    def _receiver(self, name: str, kind: str) -> Any:
        def receive(data: bytes, info: Any) -> None:
            if self._waiting > _MOST_WAITING:
                self.dropped += 1
                return
            self._waiting += len(data)
            arrived = info.get("received_timestamp") or time.time_ns()
            self._queue.put((name, kind, data, int(arrived)))

        return receive

    def _write(self) -> None:
        written = 0
        while (item := self._queue.get()) is not None:
            name, kind, data, arrived = item
            self._waiting -= len(data)
            if self.error:
                continue
            if written % 500 == 0 and free_space(self._path) < _SPARE:
                self.error = f"{self._path}: less than {_SPARE >> 20} MB free on the disk, recording ended"
                continue
            try:
                self._writer.write_raw(name, kind, data, arrived)
            except OSError as error:
                self.error = f"{self._path}: cannot be written ({error.strerror})"
                continue
            self.counts[name] += 1
            written += 1


def _quality(offers: list[Any]) -> Any:
    """What every publisher offers: reliable and latched only where all are."""
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    reliable = all(offer.reliability == ReliabilityPolicy.RELIABLE for offer in offers)
    latched = all(offer.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers)
    return QoSProfile(
        depth=100,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )
