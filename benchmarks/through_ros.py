"""Success of a policy through ROS: node and simulated robot as two processes, in real time.

    python benchmarks/through_ros.py --scenes 40 --output benchmarks/results/through_ros.json

Each scene is drawn by the simulated robot (``~/reset``), the prompt names one of its cubes at random, the
policy node is reset, and the scene counts as solved when the simulator says so within the time limit.
Also counted: chunks, deadlines missed, and every commanded position outside the robot file's limits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import rclpy
from hybrid_policy.control.latency import ChunkRecord, LatencyRecorder
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.closed_loop import TIME_LIMIT
from hybrid_policy.ros import bringup
from hybrid_policy.ros.processes import NodeProcess, check_running, ros_environment
from hybrid_policy.share import share_path
from hybrid_policy.sim.tasks import PROMPTS, TASK_COLOURS
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory


class Judge:
    """Asks for scenes and listens to what the simulator says of them."""

    def __init__(self, robot: RobotFile) -> None:
        rclpy.init()
        self.node = rclpy.create_node("judge")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.status: dict[str, Any] = {}
        self.commands = self.beyond = 0
        self._limits = {joint.name: (joint.min or 0.0, joint.max or 0.0) for joint in robot.joints}
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.node.create_subscription(String, "task/status", self._on_status, latched)
        self.node.create_subscription(JointTrajectory, robot.command.topic, self._on_command, 10)
        self.prompt = self.node.create_publisher(String, robot.prompt_topic, 5)
        self._reset = [self.node.create_client(Trigger, f"/{n}/reset") for n in ("policy_node", "sim_robot")]

    def _on_status(self, message: String) -> None:
        self.status = json.loads(message.data)

    def _on_command(self, message: JointTrajectory) -> None:
        for point in message.points:
            self.commands += 1
            for name, position in zip(message.joint_names, point.positions):
                low, high = self._limits[name]
                self.beyond += not low - 1e-9 <= position <= high + 1e-9

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Receive until the condition holds; False if it did not within the time."""
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.05)
        return condition()

    def new_scene(self, prompt: str, target: str) -> None:
        """Another scene and prompt, the policy starting afresh."""
        before = self.status.get("scene", -1)
        for client in reversed(self._reset):  # the robot's first: the policy holds where it then is
            client.wait_for_service(timeout_sec=30.0)
            future = client.call_async(Trigger.Request())
            self.until(future.done, 10.0)
        self.prompt.publish(String(data=prompt))
        self.until(lambda: self.status.get("scene", -1) > before and self.status.get("target") == target, 10.0)


def main() -> int:
    """Run the scenes; exit code 1 when a process failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=700)
    parser.add_argument("--recipe", default="bf16")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help=f"s a scene (default: {TIME_LIMIT})")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("ROS_DOMAIN_ID", "97")
    environment = ros_environment()
    os.environ.update(environment)
    robot = RobotFile.load(share_path("config/robots/sim_aloha.yaml"))
    draw = random.Random(args.seed)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "latency.jsonl"
        values = {a.name: a.default for a in bringup.ARGUMENTS} | {"sim": "true", "recipe": args.recipe}
        described = bringup.nodes(values)
        described[0].parameters["seed"] = args.seed
        described[1].parameters["latency_log"] = str(log)
        judge = Judge(robot)
        processes = [NodeProcess.start(n, Path(folder) / f"{n.name}.log", environment) for n in described]
        try:
            judge.until(lambda: judge.commands > 0, 120.0)
            for number in range(args.scenes):
                check_running(processes)
                target = draw.choice(TASK_COLOURS)
                prompt = draw.choice(PROMPTS).format(target)
                began = time.monotonic()  # the limit counts from here: resets and the prompt's way are included
                judge.new_scene(prompt, target)
                left = args.limit - (time.monotonic() - began)
                solved = judge.until(lambda: bool(judge.status.get("success")), left)
                seconds = time.monotonic() - began
                results.append({"prompt": prompt, "target": target, "solved": solved, "seconds": round(seconds, 2)})
                word = "lifted" if solved else "not"
                print(f"{number + 1:3d} {prompt:24s} {word:6s} {seconds:.1f} s", file=sys.stderr)
        finally:
            codes = {p.name: p.stop() for p in reversed(processes)}
        recorder = LatencyRecorder()
        for line in log.read_text().splitlines():
            recorder.add(ChunkRecord(**json.loads(line)))
    report = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores",
        "recipe": args.recipe,
        "seed": args.seed,
        "limit_s": args.limit,
        "scenes": len(results),
        "solved": sum(r["solved"] for r in results),
        "commanded points": judge.commands,
        "commanded positions beyond the robot file's limits": judge.beyond,
        "exit_codes": codes,
        "latency": recorder.summary().to_dict(),
        "episodes": results,
    }
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(json.dumps({k: v for k, v in report.items() if k not in ("episodes", "latency")}))
    print(recorder.summary().table())
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
