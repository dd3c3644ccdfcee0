"""What the node adds to the engine: from the newest image's stamp to the command on its topic.

    python benchmarks/node_overhead.py --seconds 30

A process of its own plays camera and joint drivers (two 224 x 224 cameras at 30 Hz, 14 joints at 100 Hz) and
listens to the commands; the node runs with a policy that answers at once, so that all that is left is the
node's own time: waiting for the deadline, matching, decoding, planning, guard, message, DDS. With
--checkpoint, or --full-size on a GPU, it runs a real policy instead, and the engine's own latency stands beside.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from hybrid_policy.control.latency import ENGINE_STAGES
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.models.observation import ActionChunk, Observation, PolicySpec
from hybrid_policy.share import resolve

DOMAIN = 62


class InstantPolicy:
    """Stands still, at once."""

    def __init__(self, robot: RobotFile) -> None:
        cameras = tuple(camera.name for camera in robot.cameras)
        self.spec = PolicySpec("instant", cameras, len(robot.state_names), len(robot.action_names), 32, 50)
        self._normalised = np.zeros((50, 32), np.float32)

    def infer(self, observation: Observation, noise: Any = None, previous: Any = None) -> ActionChunk:
        """The state, fifty times."""
        actions = np.repeat(observation.state[None], 50, axis=0)
        return ActionChunk(actions, self._normalised, observation.stamp, {})


def full_size_policy(robot: RobotFile, recipe_name: str) -> Any:
    """pi0.5 at full size on the GPU with random weights: what it costs does not depend on them."""
    import torch
    from engine import RandomWeights
    from hybrid_policy.models.config import PI05_FULL
    from hybrid_policy.models.normalization import Normalization
    from hybrid_policy.models.processors import Processors
    from hybrid_policy.models.tokenizer import load_tokenizer
    from hybrid_policy.runtime.cuda_backend import CudaBackend
    from hybrid_policy.runtime.device_weights import build_weights
    from hybrid_policy.runtime.engine import Engine
    from hybrid_policy.runtime.loading import choose_table, device_precisions
    from hybrid_policy.runtime.random_policy import byte_tokenizer
    from hybrid_policy.runtime.recipe import load_recipe
    from hybrid_policy.runtime.rtc import RealTimeChunking
    from hybrid_policy.runtime.sites import model_sites

    device = torch.device("cuda")
    values = len(robot.action_names)
    cameras = tuple(camera.name for camera in robot.cameras)
    config = PI05_FULL.replace(cameras=cameras, state_dim=len(robot.state_names), action_dim=values)
    rtc, recipe = RealTimeChunking("prior_corrected"), load_recipe(recipe_name)
    precisions = device_precisions(recipe, model_sites(config), device)
    table = choose_table(rtc, recipe, config, precisions, device)
    with torch.inference_mode():
        weights = build_weights(
            config, RandomWeights(config), precisions, dtype=torch.bfloat16, expert=table.expert, pdl=table.pdl
        )
        backend = CudaBackend(weights, table, rtc, recipe.prefix_cache, name=recipe.name, timing=True)
    tokenizer = Path(tempfile.mkdtemp()) / "tokenizer.json"
    byte_tokenizer(tokenizer)
    # Random weights act at random: so little around where the robot stands that no limit is touched.
    middle = robot.state(np.array([0.5 * ((j.min or 0.0) + (j.max or 0.0)) for j in robot.joints]))
    ends = {"q01": middle - 1e-3, "q99": middle + 1e-3}
    norm = Normalization.of("quantiles", "lerobot", ends, values, "range")
    # The prompt without the state: one token a letter makes 40 of them, about what PaliGemma's takes with it.
    processors = Processors(config, norm, norm, "task", load_tokenizer(tokenizer))
    spec = PolicySpec("full size", cameras, config.state_dim, values, config.max_action_dim, config.horizon)
    return Engine(spec, processors, backend, recipe, rtc, seed=0)


def run_node(arguments: list[str], kind: str) -> None:
    """The policy node in a process of its own. kind: instant, full or checkpoint."""
    sys.argv = ["policy_node", *arguments]
    from hybrid_policy.models.observation import Policy
    from hybrid_policy.ros.policy_node import PolicyNode, main

    class InstantNode(PolicyNode):
        """The node, with another policy."""

        def make_policy(self, recipe: str) -> Policy:
            return InstantPolicy(self.robot) if kind == "instant" else full_size_policy(self.robot, recipe)

    raise SystemExit(main(PolicyNode if kind == "checkpoint" else InstantNode))


def drive(robot: RobotFile, seconds: float) -> list[tuple[int, int]]:
    """Publish and listen; (stamp of the newest image sent, time of arrival) of every chunk, nanoseconds."""
    import rclpy
    from hybrid_policy.ros.times import time_message
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image, JointState
    from trajectory_msgs.msg import JointTrajectory

    rclpy.init(domain_id=DOMAIN)
    node = rclpy.create_node("drivers")
    cameras = [node.create_publisher(Image, c.topic, qos_profile_sensor_data) for c in robot.cameras]
    joints = node.create_publisher(JointState, robot.joint_states_topic, qos_profile_sensor_data)
    heard: list[tuple[int, int]] = []
    newest = 0
    node.create_subscription(
        JointTrajectory,
        robot.command.topic,
        lambda message: heard.append((newest, time.time_ns())) if len(message.points) > 1 else None,
        10,
    )
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    data = np.random.default_rng(0).integers(0, 256, 224 * 224 * 3, np.uint8).tobytes()
    position = [0.5 * ((j.min or 0.0) + (j.max or 0.0)) for j in robot.joints]
    begin = time.monotonic()
    tick = 0
    while time.monotonic() - begin < seconds:
        now = time.time_ns()
        state = JointState(name=list(robot.joint_names), position=position)
        state.header.stamp = time_message(now)
        joints.publish(state)
        if tick % 3 == 0:
            image = Image(height=224, width=224, encoding="rgb8", step=672, data=data)
            image.header.stamp = time_message(now)
            for publisher in cameras:
                publisher.publish(image)
            newest = now
        tick += 1
        due = begin + tick / 100
        while (left := due - time.monotonic()) > 0:
            executor.spin_once(timeout_sec=left)
    executor.shutdown()
    rclpy.try_shutdown()
    return heard


def device() -> str:
    """The GPU's name, "cpu" without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Run it, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=10.0, help="inferences per second")
    parser.add_argument("--robot", default="sim_aloha")
    parser.add_argument("--checkpoint", default="", help="a real policy; default: one that answers at once")
    parser.add_argument("--full-size", action="store_true", help="pi0.5 at full size, random weights, on the GPU")
    parser.add_argument("--recipe", default="bf16")
    parser.add_argument("--load-seconds", type=float, default=0.0, help="wait for the policy to load")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/node_overhead.json"))
    args = parser.parse_args()
    os.environ["ROS_DOMAIN_ID"] = str(DOMAIN)
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    robot = RobotFile.load(resolve(args.robot, "config/robots"))
    log = Path(tempfile.mkdtemp(prefix="overhead_")) / "latency.jsonl"
    given = {
        "robot": args.robot,
        "checkpoint": args.checkpoint or "random",
        "recipe": args.recipe,
        "device": args.device,
        "inference_rate": args.rate,
        "latency_log": log,
    }
    arguments = ["--ros-args", *(part for k, v in given.items() for part in ("-p", f"{k}:={v}"))]
    context = multiprocessing.get_context("spawn")
    kind = "full" if args.full_size else "checkpoint" if args.checkpoint else "instant"
    node = context.Process(target=run_node, args=(arguments, kind))
    node.start()
    end = time.monotonic() + args.load_seconds
    while node.is_alive() and time.monotonic() < end and not log.exists():
        time.sleep(0.2)
    if not node.is_alive():
        sys.exit("the node ended before it was configured; see its last lines above")
    drive(robot, args.seconds)
    if node.pid is not None:
        os.kill(node.pid, signal.SIGINT)
    node.join(20)
    lines = [json.loads(line) for line in log.read_text().splitlines()][5:]
    columns = {
        "decode": [x["decode_ms"] for x in lines],
        "infer": [x["infer_ms"] for x in lines],
        **{f"- {name}": [x["stages_ms"].get(name, 0.0) for x in lines] for name in ENGINE_STAGES},
        "plan, guard, publish": [x["publish_ms"] for x in lines],
        "the node adds": [x["total_ms"] - x["infer_ms"] for x in lines],
        "newest image to command": [x["stamp_to_publish_ms"] for x in lines],
        "- without inference": [x["stamp_to_publish_ms"] - x["infer_ms"] for x in lines],
    }
    on = device() if args.full_size or args.checkpoint else "none"
    print(f"{len(lines)} chunks, accepted {sum(x['accepted'] for x in lines)}, device {on}", flush=True)
    rows = {name: np.percentile(values, [50, 99, 100]).round(3).tolist() for name, values in columns.items()}
    for name, (p50, p99, worst) in rows.items():
        print(f"{name:<26} p50 {p50:7.2f}  p99 {p99:7.2f}  max {worst:7.2f} ms")
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        "device": on,
        "date": time.strftime("%Y-%m-%d"),
        "policy": "pi0.5 at full size" if args.full_size else args.checkpoint or "answers at once",
        "recipe": args.recipe,
        "inferences per second": args.rate,
        "chunks": len(lines),
        "chunks accepted": sum(x["accepted"] for x in lines),
        "chunks limited by the guard": sum(x["clipped"] > 0 for x in lines),
        "milliseconds p50, p99, max": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
