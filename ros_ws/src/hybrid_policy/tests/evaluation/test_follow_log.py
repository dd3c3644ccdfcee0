"""A run again, inference by inference, from its latency log: the same trajectories to the bit."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hybrid_policy.cli import main
from hybrid_policy.control.chunk_record import chunk_record
from hybrid_policy.control.cycle import ControlCycle, CycleSettings
from hybrid_policy.control.observation_buffer import ObservationBuffer
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.message_types import Decoder
from hybrid_policy.evaluation.policy_pass import fit_robot
from hybrid_policy.evaluation.survey import survey
from hybrid_policy.evaluation.topic_match import match_topics
from stub_policy import StubPolicy

MS = 1_000_000


def run_live(source: Path, target: Path, log: Path, robot, *, hold_at: int = 0, discard: int = -1) -> int:
    """A run as the node makes one, without ROS: irregular starts and delays; writes its bag and its log."""
    bag = open_bag(source)
    fitted = fit_robot(robot, survey(bag, robot, match_topics(robot, bag.topics, {})))
    policy = StubPolicy(0.01, ("base_0_rgb", "right_wrist_0_rgb"), 14)
    cycle = ControlCycle(fitted, policy, CycleSettings())
    buffer = ObservationBuffer(fitted, fitted.policy_cameras(policy.spec))
    decoder = Decoder(bag.topics)
    random = np.random.default_rng(5)
    cameras = {f"/{c.topic}/compressed": c.name for c in robot.cameras}
    topic, sent, lines, due, number = "/" + robot.command.topic, [], [], 0, 0

    def publish(trajectory, at):
        sent.append((at + 3 * MS, trajectory))

    messages = [m for m in bag.messages() if m.topic != topic]
    for message in messages:
        decoded = decoder.decode(message)
        if message.topic in cameras:
            buffer.receive_image(cameras[message.topic], decoded)
        elif message.topic == "/joint_states":
            buffer.receive_joints(decoded)
        else:
            buffer.receive_prompt(decoded)
        snapshot = buffer.snapshot()
        if snapshot.missing or message.t_ns < due:
            continue
        started = message.t_ns + 12_345
        finished = started + int(random.integers(60, 180)) * MS + 77
        observation = buffer.observe(snapshot)
        noise, previous = cycle.prepare(observation)
        chunk = policy.infer(observation, noise, previous)
        if number == hold_at and number:
            held = cycle.hold(started + 5 * MS, observation.joints[fitted.command_index])
            publish(held, started + 5 * MS)
        if number == discard:
            from hybrid_policy.control.cycle import CycleResult

            result = CycleResult(observation, chunk, started, finished, reason="discarded: paused")
        else:
            result = cycle.accept(observation, chunk, started, finished, previous=previous, noise=noise)
            publish(result.trajectory, finished)
        record = chunk_record(result, chunk, snapshot, (0, 1 * MS, 90 * MS, 91 * MS), number=number,
                              sent=finished, period=200 * MS, deadline=finished)  # fmt: skip
        lines.append(record.to_json())
        due = finished + int(random.integers(10, 120)) * MS
        number += 1
    log.write_text("\n".join(lines))
    with BagWriter(target) as writer:
        entries = [(m.t_ns, 0, m) for m in messages] + [(at, 1, t) for at, t in sent]
        for at, kind, entry in sorted(entries, key=lambda e: e[:2]):
            if kind == 0:
                writer.write_raw(entry.topic, entry.type, entry.data, at)
            else:
                times = np.round(entry.times * 1e9).astype(np.int64)
                told = writer.trajectory(0, list(robot.command_names), entry.positions, times)
                writer.write(topic, "trajectory_msgs/msg/JointTrajectory", told, at)
    return sum(json.loads(line)["accepted"] for line in lines)


def follow(bag, log, out, stub, *more) -> dict:
    given = ["replay", str(bag), "--robot", "sim_aloha", "--policy", stub, "--recipe", "noise", "-o", str(out)]
    code = main([*given, "--follow-log", str(log), "--no-html", *more])
    assert code == 0
    return json.loads((out / "report.json").read_text())["bags"][0]


@pytest.fixture
def noisy(monkeypatch):
    import stub_policy

    monkeypatch.setitem(stub_policy.NOISE, "noise", 0.01)


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize(("hold_at", "discard"), [(0, -1), (6, -1), (0, 4), (9, 3)])
def test_a_followed_run_gives_the_published_trajectories(sim_expert, robot, stub, tmp_path, hold_at, discard):
    accepted = run_live(sim_expert, tmp_path / "run", tmp_path / "log.jsonl", robot, hold_at=hold_at, discard=discard)
    found = follow(tmp_path / "run", tmp_path / "log.jsonl", tmp_path / "out", stub)
    assert found["recipes"]["noise"]["parity"] == {
        "replayed": accepted, "matched": accepted, "largest_difference": 0.0, "beyond_1e-6": 0,
    }  # fmt: skip
    assert accepted > 25


@pytest.mark.usefixtures("noisy")
def test_another_seed_is_another_run(sim_expert, robot, stub, tmp_path):
    run_live(sim_expert, tmp_path / "run", tmp_path / "log.jsonl", robot)
    found = follow(tmp_path / "run", tmp_path / "log.jsonl", tmp_path / "out", stub, "--seed", "1")
    assert found["recipes"]["noise"]["parity"]["largest_difference"] > 1e-4


@pytest.mark.usefixtures("noisy")
def test_inputs_that_the_bag_lacks_are_said(sim_expert, robot, stub, tmp_path):
    run_live(sim_expert, tmp_path / "run", tmp_path / "log.jsonl", robot)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    record = json.loads(lines[3])
    record["stamps"]["joints"] += 1
    (tmp_path / "log.jsonl").write_text("\n".join([*lines[:3], json.dumps(record), *lines[4:]]))
    found = follow(tmp_path / "run", tmp_path / "log.jsonl", tmp_path / "out", stub)
    assert any("1 chunks of the log have inputs that the bag lacks (the first is 3)" in n for n in found["notes"])


def test_an_old_log_is_refused(sim_expert, stub, tmp_path, capsys):
    line = json.dumps({"chunk": 0, "stamps": {}, "started": 1, "infer_ms": 1.0})
    (tmp_path / "log.jsonl").write_text(line)
    given = ["replay", str(sim_expert), "--robot", "sim_aloha", "--policy", stub, "--recipe", "exact"]
    assert main([*given, "-o", str(tmp_path / "out"), "--follow-log", str(tmp_path / "log.jsonl"), "--no-html"]) == 2
    assert "chunks without finished" in capsys.readouterr().err


@pytest.mark.ros
@pytest.mark.slow
def test_what_the_real_node_published_is_replayed_to_the_bit(tmp_path, robot):
    """Simulated robot, policy node and recorder as processes over DDS; then the same run from the bag."""
    pytest.importorskip("rclpy", reason="rclpy is not installed")
    if importlib.util.find_spec("mujoco") is None:  # not importorskip: whoever imports it first chooses its OpenGL
        pytest.skip("the simulator is not installed")
    from hybrid_policy.ros.bringup import NodeDescription
    from hybrid_policy.ros.policy_loading import write_random_checkpoint
    from hybrid_policy.ros.processes import NodeProcess, ros_environment

    write_random_checkpoint(tmp_path / "checkpoint", robot, 0)
    environment = {**ros_environment(), "ROS_DOMAIN_ID": "51", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "latency.jsonl"
    simulator = NodeProcess.start(
        NodeDescription("sim_robot_node", "sim_robot", {"seed": 3}), tmp_path / "sim.log", environment
    )
    recorder = subprocess.Popen(
        [sys.executable, "-m", "hybrid_policy.cli", "record", str(tmp_path / "run"), "--robot", "sim_aloha"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    values = {"robot": "sim_aloha", "checkpoint": str(tmp_path / "checkpoint"), "recipe": "float32", "device": "cpu"}
    policy = None
    try:
        _wait(lambda: (tmp_path / "run" / "run.mcap").exists() and _size(tmp_path / "run/run.mcap") > 4_000_000, 60)
        policy = NodeProcess.start(
            NodeDescription("policy_node", "policy_node", {**values, "latency_log": str(log)}),
            tmp_path / "policy.log", environment,
        )  # fmt: skip
        _wait(lambda: log.exists() and len(log.read_text().splitlines()) >= 12, 120)
    finally:
        if policy is not None:
            policy.stop()
        time.sleep(0.5)
        recorder.send_signal(signal.SIGINT)
        _, said = recorder.communicate(timeout=30)
        simulator.stop()
    assert recorder.returncode == 0, said.decode()
    code = main([
        "replay", str(tmp_path / "run"), "--robot", "sim_aloha", "--checkpoint", str(tmp_path / "checkpoint"),
        "--recipe", "float32", "--device", "cpu", "--follow-log", str(log), "-o", str(tmp_path / "out"), "--no-html",
    ])  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "out/report.json").read_text())["bags"][0]["recipes"]["float32"]["parity"]
    assert found["matched"] >= 10
    assert found["matched"] >= found["replayed"] - 1
    assert found["largest_difference"] <= 1e-6


def _size(path: Path) -> int:
    return os.stat(path).st_size


def _wait(ready, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "nothing came in time"
        time.sleep(0.2)
