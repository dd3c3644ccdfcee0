"""Recording over DDS, and what replay.launch.py plays."""

from __future__ import annotations

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
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.message_types import Decoder
from hybrid_policy.ros import bringup, replay_bringup

PUBLISHER = """
import sys, time
import numpy as np, rclpy
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
rclpy.init(); node = rclpy.create_node("robot")
latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
prompt = node.create_publisher(String, "prompt", latched); prompt.publish(String(data="latched words"))
joints = node.create_publisher(JointState, "joint_states", 10)
cameras = [node.create_publisher(Image, t, qos_profile_sensor_data) for t in sys.argv[1:]]
k = 0
while True:
    now = node.get_clock().now().to_msg()
    state = JointState(name=["a"], position=[float(k)]); state.header.stamp = now
    joints.publish(state)
    if k % 2 == 0:
        for camera in cameras:
            image = Image(height=4, width=4, step=12, encoding="rgb8", data=bytes([k % 256]) * 48)
            image.header.stamp = now
            camera.publish(image)
    k += 1; time.sleep(0.02)
"""


def record(folder: Path, cameras: list[str], seconds: float) -> tuple[int, dict, str]:
    """(exit code, what it printed, stderr) of a recording beside a publisher of its own."""
    from hybrid_policy.ros.processes import ros_environment

    environment = {**ros_environment(), "ROS_DOMAIN_ID": "53"}
    publisher = subprocess.Popen([sys.executable, "-c", PUBLISHER, *cameras], env=environment)
    recorder = subprocess.Popen(
        [sys.executable, "-m", "hybrid_policy.cli", "record", str(folder), "--robot", "sim_aloha", "--json"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        end = time.monotonic() + 30.0
        while not (folder / f"{folder.name}.mcap").exists() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(seconds)
        recorder.send_signal(signal.SIGINT)
        out, err = recorder.communicate(timeout=20)
    finally:
        for process in (publisher, recorder):
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
    return recorder.returncode, json.loads(out), err.decode()


@pytest.mark.ros
class TestRecord:
    def test_what_is_published_is_in_the_bag(self, tmp_path):
        pytest.importorskip("rclpy", reason="rclpy is not installed")
        cameras = ["camera_overhead/image_raw", "camera_right_wrist/image_raw"]
        code, told, err = record(tmp_path / "bag", cameras, 4.0)
        assert code == 0, err
        bag = open_bag(tmp_path / "bag")
        assert bag.problems == []
        decoder = Decoder(bag.topics)
        messages = [(m, decoder.decode(m)) for m in bag.messages()]
        numbers = [int(d.position[0]) for m, d in messages if m.topic == "/joint_states"]
        assert len(numbers) >= 50
        np.testing.assert_array_equal(np.diff(numbers), 1)  # none is lost
        assert [d.data for m, d in messages if m.topic == "/prompt"] == ["latched words"]
        for message, decoded in messages:
            if message.topic.startswith("/camera"):
                assert decoded.data.tolist() == [decoded.data[0]] * 48
                lag = message.t_ns - (decoded.header.stamp.sec * 10**9 + decoded.header.stamp.nanosec)
                assert 0 <= lag < 2 * 10**9
        assert told["messages"]["/joint_states"] == len(numbers)
        assert told["missing"] == []

    def test_a_camera_that_says_nothing_is_named(self, tmp_path):
        pytest.importorskip("rclpy", reason="rclpy is not installed")
        code, told, err = record(tmp_path / "bag", ["camera_overhead/image_raw"], 2.0)
        assert code == 1
        assert told["missing"] == ["/camera_right_wrist/image_raw"]
        assert "/camera_right_wrist/image_raw: nothing received" in err


def test_a_folder_that_is_there_is_not_written_to(tmp_path, capsys):
    pytest.importorskip("rclpy", reason="rclpy is not installed")
    assert main(["record", str(tmp_path), "--robot", "sim_aloha"]) == 2
    assert "exists already" in capsys.readouterr().err


class TestReplayLaunch:
    def values(self, **given: str) -> dict[str, str]:
        return {**{a.name: a.default for a in replay_bringup.ARGUMENTS}, "bag": "run1", **given}

    def test_inputs_are_played_and_recorded_commands_are_not(self):
        command = replay_bringup.player(self.values(rate="0.5"))
        assert command[:4] == ["ros2", "bag", "play", "run1"]
        assert "--clock" in command
        played = command[command.index("--topics") + 1 :]
        assert played == [
            "/camera_overhead/image_raw", "/camera_right_wrist/image_raw", "/joint_states", "/prompt",
        ]  # fmt: skip

    def test_the_node_follows_the_bags_clock_and_moves_nothing(self):
        node = replay_bringup.node(self.values())
        assert node.executable == "policy_node"
        assert node.parameters["use_sim_time"] is True
        assert node.parameters["dry_run"] is True
        assert replay_bringup.node(self.values(dry_run="false")).parameters["dry_run"] is False

    def test_every_argument_says_what_it_is(self):
        for argument in replay_bringup.ARGUMENTS:
            assert argument.description
            assert not argument.choices or argument.default in argument.choices
        shared = {a.name: a for a in bringup.ARGUMENTS}
        for argument in replay_bringup.ARGUMENTS:
            assert argument.name not in shared or shared[argument.name] is argument

    def test_the_launch_file_declares_these_arguments(self, monkeypatch):
        """With a stand-in for launch: what is held is that the file runs and declares what it uses."""
        import importlib.util
        import types

        from hybrid_policy.share import share_path

        declared: list[str] = []
        started: list[tuple[str, dict]] = []

        def module(name: str, **content) -> None:
            made = types.ModuleType(name)
            made.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, made)

        class Configuration:
            def __init__(self, name):
                self.name = name

            def perform(self, context):
                return context[self.name]

        def note(kind):
            return lambda *args, **kwargs: started.append((kind, kwargs)) or kind

        module("launch", LaunchDescription=list)
        module(
            "launch.actions",
            DeclareLaunchArgument=lambda name, **kwargs: declared.append(name),
            OpaqueFunction=lambda function: function,
            EmitEvent=note("emit"), ExecuteProcess=note("process"), RegisterEventHandler=note("handler"),
        )  # fmt: skip
        module("launch.event_handlers", OnProcessExit=note("exit"))
        module("launch.events", Shutdown=note("shutdown"))
        module("launch.substitutions", LaunchConfiguration=Configuration)
        module("launch_ros", actions=None)
        module("launch_ros.actions", Node=note("node"))
        spec = importlib.util.spec_from_file_location("replay_launch", share_path("launch/replay.launch.py"))
        file = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(file)
        description = file.generate_launch_description()
        assert declared == [a.name for a in replay_bringup.ARGUMENTS]
        description[-1](self.values())
        kinds = [kind for kind, _ in started]
        assert {"node", "process", "handler"} <= set(kinds)
        node = dict(started)["node"]
        assert (node["package"], node["executable"]) == ("hybrid_policy", "policy_node")
        with pytest.raises(RuntimeError, match="bag: nothing given"):
            description[-1](self.values(bag=""))
