"""The node with the policy that ships and the simulated robot, as two processes: the whole way through."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("rclpy") is None:
    pytest.skip("rclpy is not installed", allow_module_level=True)
if importlib.util.find_spec("mujoco") is None:
    pytest.skip("mujoco is not installed", allow_module_level=True)

import rclpy
from hybrid_policy.control.latency import ENGINE_STAGES, ChunkRecord
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.ros import bringup
from hybrid_policy.ros.processes import NodeProcess, ros_environment
from hybrid_policy.share import share_path
from trajectory_msgs.msg import JointTrajectory

from .rig import claim_domain  # isort: skip

pytestmark = pytest.mark.ros
CHUNKS = 40


def test_chunks_from_cameras_to_commands(tmp_path: Path) -> None:
    domain, claim = claim_domain()
    environment = ros_environment() | {"ROS_DOMAIN_ID": str(domain)}
    values = {a.name: a.default for a in bringup.ARGUMENTS} | {"sim": "true"}
    described = bringup.nodes(values)
    described[1].parameters.update(
        latency_log=str(tmp_path / "latency.jsonl"), summary_json=str(tmp_path / "summary.json")
    )
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain)
    node = rclpy.create_node("listener", context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)
    robot = RobotFile.load(share_path("config/robots/sim_aloha.yaml"))
    heard: list[Any] = []
    node.create_subscription(JointTrajectory, robot.command.topic, heard.append, 20)
    nodes = [NodeProcess.start(n, tmp_path / f"{n.name}.log", environment) for n in described]
    try:
        end = time.monotonic() + 120
        while len(heard) < CHUNKS and time.monotonic() < end:
            executor.spin_once(timeout_sec=0.1)
            assert all(one.running() for one in nodes), nodes[1].tail(30)
        policy_code, sim_code = nodes[1].stop(), nodes[0].stop()
        executor.spin_once(timeout_sec=0.5)
    finally:
        for one in nodes:
            one.stop()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
        claim.close()
    text = nodes[1].tail(60)
    assert (policy_code, sim_code) == (0, 0), text
    assert "Traceback" not in text
    assert len(heard) >= CHUNKS, text

    limits = robot.limits
    for message in heard:
        path = np.array([p.positions for p in message.points])
        assert tuple(message.joint_names) == robot.command_names
        assert (message.header.stamp.sec, message.header.stamp.nanosec) == (0, 0)  # at once
        assert (path >= limits.lower - 1e-9).all()
        assert (path <= limits.upper + 1e-9).all()
        assert (np.abs([p.velocities for p in message.points]) <= limits.velocity + 1e-6).all()
        assert not any(message.points[-1].velocities)
    assert len(heard[-1].points) == 1  # the hold at the end

    records = [ChunkRecord(**json.loads(x)) for x in (tmp_path / "latency.jsonl").read_text().splitlines()]
    assert [record.chunk for record in records] == list(range(len(records)))
    for record in records:
        assert set(record.stamps) == {"base_0_rgb", "right_wrist_0_rgb", "joints"}
        assert set(record.stages_ms) >= set(ENGINE_STAGES)
        assert record.total_ms >= record.infer_ms >= sum(record.stages_ms[s] for s in ENGINE_STAGES) * 0.9
        assert record.stamp_to_publish_ms > 0
        assert record.skew_ms <= 100
        if record.accepted:
            assert record.first_due >= max(record.stamps.values())
            assert record.age_at_due_ms >= 0
    assert sum(r.accepted for r in records) >= CHUNKS - 2
    assert any(r.delay > 0 for r in records)  # real-time chunking was at work
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["chunks"] == len(records)
    assert summary["misses"] == sum(not r.deadline_met for r in records)
    assert "summary" in text
