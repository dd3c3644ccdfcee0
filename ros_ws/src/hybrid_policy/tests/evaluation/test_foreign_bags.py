"""Bags of other people's robots: each is evaluated, or one line says what it lacks and how to map it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hybrid_policy.cli import main
from hybrid_policy.evaluation.bag_writer import BagWriter
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

T0 = 1_700_000_000_000_000_000
STATE, IMAGE = "sensor_msgs/msg/JointState", "sensor_msgs/msg/Image"
CAMERAS = ("/camera_overhead/image_raw", "/camera_right_wrist/image_raw")
COMMAND = "/joint_trajectory_controller/joint_trajectory"


class Arm:
    """Writes two seconds of a robot: 20 Hz images, 50 Hz joint states, 20 Hz commands, and what a test changes."""

    def __init__(self, path, robot) -> None:
        self.path, self.names = path, list(robot.joint_names)
        self.middle = 0.5 * (robot.limits.lower + robot.limits.upper)

    def write(self, *, cameras=CAMERAS, joints="/joint_states", state=None, command=COMMAND, extra=None, types=()):
        """``state(writer, t, k)`` gives the joint states' message; ``extra(writer, t)`` writes more at 20 Hz."""
        with BagWriter(self.path) as writer:
            for name, definition in types:
                writer.types.register(get_types_from_msg(definition, name))
            for k in range(100):
                t = T0 + k * 20_000_000
                if joints:
                    message = writer.joint_state(t, self.names, self.middle) if state is None else state(writer, t, k)
                    writer.write(joints, STATE, message, t + 1)
                if k % 5 in (0, 2):
                    for camera in cameras:
                        pixels = np.full((48, 64, 3), k, np.uint8)
                        writer.write(camera, IMAGE, writer.image(t, pixels), t + 2)
                    if command:
                        told = writer.trajectory(0, self.names, self.middle[None], np.array([50_000_000]))
                        writer.write(command, "trajectory_msgs/msg/JointTrajectory", told, t + 3)
                    if extra is not None:
                        extra(writer, t)
        return self.path


@pytest.fixture
def arm(tmp_path, robot) -> Arm:
    return Arm(tmp_path / "bag", robot)


@pytest.fixture
def replayed(tmp_path, stub, capsys):
    """The bag's entry in report.json, and the exit code."""

    def make(path, *more: str):
        given = ["replay", str(path), "--robot", "sim_aloha", "--policy", stub, "--checkpoint", "none"]
        given += ["--recipe", "exact", "--no-html", "--no-predictions", "--json", "-o", str(tmp_path / "out"), *more]
        code = main(given)
        (bag,) = json.loads(capsys.readouterr().out)["bags"]
        return bag, code

    return make


def test_the_plain_one_is_replayed(arm, replayed):
    bag, code = replayed(arm.write())
    assert (code, bag["status"], bag["lacks"], bag["notes"]) == (0, "replayed", [], [])
    assert bag["recipes"]["exact"]["chunks"] > 5


def test_one_joint_state_topic_of_another_name_is_taken(arm, replayed):
    bag, code = replayed(arm.write(joints="/robot/state"))
    assert code == 0
    assert "joint states: taken from /robot/state, the robot file says /joint_states" in bag["notes"]


def test_a_leader_s_joints_are_commands_and_the_follower_s_are_the_robot_s(arm, replayed):
    def leader(writer, t):
        writer.write("/leader/joint_states", STATE, writer.joint_state(t, arm.names, arm.middle), t)

    bag, code = replayed(arm.write(joints="/follower/joint_states", command="", extra=leader))
    assert code == 0
    assert bag["recorded"]["source"] == "/leader/joint_states"


def test_two_joint_state_topics_want_a_word(arm, replayed):
    def other(writer, t):
        writer.write("/right/joint_states", STATE, writer.joint_state(t, arm.names, arm.middle), t)

    path = arm.write(joints="/left/joint_states", extra=other)
    bag, code = replayed(path)
    assert code == 2
    assert "/left/joint_states, /right/joint_states; say which with --remap joint_states:=TOPIC" in bag["lacks"][0]
    assert replayed(path, "--remap", "joint_states:=/right/joint_states")[1] == 0


@pytest.mark.parametrize("kind", ["nameless", "effort", "halves", "degrees", "nan"])
def test_joint_states_that_no_policy_can_use_say_why(arm, replayed, kind):
    def state(writer, t, k):
        message = writer.joint_state(t, arm.names, arm.middle)
        if kind == "nameless":
            message.name = []
        elif kind == "effort":
            message.position, message.effort = np.empty(0), np.ones(14)
        elif kind == "halves":
            half = slice(0, 7) if k % 2 else slice(7, 14)
            message = writer.joint_state(t, arm.names[half], arm.middle[half])
        else:
            message.position = np.full(14, 90.0 if kind == "degrees" else np.nan)
        return message

    expected = {
        "nameless": "the messages do not name their joints",
        "effort": "the messages carry no positions",
        "halves": "in different messages: the node needs them in one",
        "degrees": "joint state: left_waist: 90 given, expected a position from -6.283 to 6.283",
        "nan": "joint state: left_waist: nan given, expected a finite position",
    }[kind]
    bag, code = replayed(arm.write(state=state))
    assert (code, bag["status"], len(bag["lacks"])) == (2, "inputs only", 1)
    assert expected in bag["lacks"][0]
    assert bag["recorded"]["source"] == COMMAND


def test_a_few_readings_beyond_the_limits_are_a_note(arm, replayed):
    def state(writer, t, k):
        return writer.joint_state(t, arm.names, arm.middle + (90.0 if k % 25 == 7 else 0.0))

    bag, code = replayed(arm.write(state=state))
    assert code == 0
    assert any("4 of 100 messages dropped by the node: joint state: left_waist: 90" in line for line in bag["notes"])


def test_commands_of_a_type_that_is_not_read_are_named(arm, replayed):
    group = "interbotix_xs_msgs/msg/JointGroupCommand"

    def told(writer, t):
        message = writer.types.types[group](name="arm", cmd=np.zeros(6, np.float32))
        writer.write("/commands/joint_group", group, message, t)

    bag, code = replayed(arm.write(command="", extra=told, types=[(group, "string name\nfloat32[] cmd\n")]))
    assert code == 0
    assert any(f"/commands/joint_group ({group}) cannot be read as commands" in line for line in bag["notes"])
    assert bag["recorded"]["source"] == "measured joint positions"


def test_joint_states_of_another_type_are_named_and_are_no_commands(arm, replayed):
    def floats(writer, t):
        writer.write("/joint_states", "std_msgs/msg/Float64MultiArray", writer.floats(np.zeros(14)), t)

    bag, code = replayed(arm.write(joints="", command="", extra=floats))
    assert code == 2
    assert bag["lacks"][0].startswith("joint states: /joint_states is std_msgs/msg/Float64MultiArray, expected")
    assert bag["recorded"]["source"] == ""


def test_depth_images_are_not_offered_as_cameras(arm, replayed):
    def depth(writer, t):
        image = writer.image(t, np.zeros((8, 8, 3), np.uint8))
        writer.write("/camera/depth/image_raw", IMAGE, image, t)

    bag, code = replayed(arm.write(cameras=(), extra=depth))
    assert code == 2
    assert bag["lacks"][0] == (
        "camera base_0_rgb: no topic /camera_overhead/image_raw; image topics in the bag: /camera/depth/image_raw"
    )


def test_the_one_camera_that_is_left_is_offered(arm, replayed):
    bag, code = replayed(arm.write(cameras=(CAMERAS[1], "/front/image")))
    assert code == 2
    assert bag["lacks"][0].endswith("; say which with --remap camera_overhead/image_raw:=/front/image")
    assert replayed(arm.path, "--remap", "camera_overhead/image_raw:=/front/image")[1] == 0


def test_big_endian_messages_are_read(arm, replayed, tmp_path):
    from rosbags.rosbag2 import Reader, StoragePlugin, Writer

    types = get_typestore(Stores.ROS2_JAZZY)
    source, target = arm.write(), tmp_path / "big"
    with Reader(source) as reader, Writer(target, version=9, storage_plugin=StoragePlugin.SQLITE3) as writer:
        topics = {c.id: writer.add_connection(c.topic, c.msgtype, typestore=types) for c in reader.connections}
        for connection, t, raw in reader.messages():
            message = types.deserialize_cdr(raw, connection.msgtype)
            swapped = types.serialize_cdr(message, connection.msgtype, little_endian=False)
            writer.write(topics[connection.id], t, swapped)
    little, big = replayed(source)[0], replayed(target, "--fresh")[0]
    assert big["status"] == "replayed"
    assert big["recipes"] == little["recipes"]


def test_ros_1_is_said_whatever_the_file_is_called(tmp_path, replayed, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.bag").write_bytes(b"#ROSBAG V2.0\n" + bytes(100))
    assert main(["replay", str(tmp_path / "old"), "--robot", "sim_aloha", "--inputs-only", "--no-html"]) == 2
    assert "run.bag: a ROS 1 bag, expected a ROS 2 one; `rosbags-convert --src run.bag" in capsys.readouterr().err
    (tmp_path / "run.mcap").write_bytes(b"#ROSBAG V2.0\n" + bytes(100))
    bag, code = replayed(tmp_path / "run.mcap")
    assert (code, bag["status"], len(bag["lacks"])) == (2, "failed", 1)
    assert "a ROS 1 bag" in bag["lacks"][0]
