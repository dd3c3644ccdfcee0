"""What a bag holds for a robot, and precise words on what it lacks."""

from __future__ import annotations

import numpy as np
import pytest
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation import metrics
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.own_joints import by_own_names, sketch
from hybrid_policy.evaluation.survey import Survey, survey
from hybrid_policy.evaluation.topic_match import match_topics

T0 = 10**18
FILE = """
name: toy
cameras: [{name: base_0_rgb, topic: cam, type: image, rate: 10.0}]
joint_states: {topic: joint_states, rate: 20.0}
prompt: {topic: prompt, default: go}
joints:
  - {name: a, min: -3.0, max: 3.0, max_velocity: 2.0}
  - {name: b, min: -3.0, max: 3.0, max_velocity: 2.0}
policy: {rate: 10.0, state: [a, b], action: [a, b]}
command: {interface: joint_trajectory, topic: controller/joint_trajectory}
timeouts: {camera: 0.5, joint_states: 0.2, skew: 0.1, action: hold}
"""


@pytest.fixture
def toy(tmp_path) -> RobotFile:
    (tmp_path / "toy.yaml").write_text(FILE)
    return RobotFile.load(tmp_path / "toy.yaml")


def write(path, seconds=3.0, *, stamp=lambda t: t, names=("a", "b"), camera="/cam", joints="/joint_states",
          skip=(), joint_value=lambda k: (0.1 * k, 0.0), encoding="rgb8"):  # fmt: skip
    """10 Hz images and 20 Hz joint states; ``skip``: image numbers left out."""
    with BagWriter(path) as writer:
        for k in range(round(seconds * 20)):
            t = T0 + k * 50_000_000
            if joints:
                state = writer.joint_state(stamp(t), list(names), np.array(joint_value(k), float))
                writer.write(joints, "sensor_msgs/msg/JointState", state, t)
            if camera and k % 2 == 0 and k // 2 not in skip:
                image = writer.image(stamp(t), np.full((8, 8, 3), k, np.uint8))
                image.encoding = encoding
                writer.write(camera, "sensor_msgs/msg/Image", image, t)
        writer.write("/other", "std_msgs/msg/String", writer.text("x"), T0)
    return path


def look(path, robot, remap=None, command="") -> Survey:
    bag = open_bag(path)
    return survey(bag, robot, match_topics(robot, bag.topics, remap or {}, command))


def test_a_good_bag_lacks_nothing(tmp_path, toy):
    known = look(write(tmp_path / "bag"), toy)
    assert known.lacks == []
    assert known.clock == "record"
    assert known.seconds == pytest.approx(2.95)
    assert known.topics["/cam"].rate() == pytest.approx(10.0)
    assert known.topics["/joint_states"].gaps() == []
    assert "the positions that the joints reached stand in" in known.notes[0]


def test_a_gap_is_found_where_it_is(tmp_path, toy):
    known = look(write(tmp_path / "bag", skip=range(10, 16)), toy)
    ((at, seconds),) = known.topics["/cam"].gaps()
    assert (at - T0) * 1e-9 == pytest.approx(0.9)
    assert seconds == pytest.approx(0.7)


def test_absent_topics_are_named_with_what_is_there(tmp_path, toy):
    known = look(write(tmp_path / "bag", camera="/front/image", joints=""), toy)
    assert known.lacks == [
        "camera base_0_rgb: no topic /cam; image topics in the bag: /front/image; "
        "say which with --remap cam:=/front/image",
        "joint states: no topic /joint_states of type sensor_msgs/msg/JointState; such topics in the bag: none; "
        "the bag has /front/image (sensor_msgs/msg/Image), /other (std_msgs/msg/String)",
    ]


def test_a_remap_finds_the_topic(tmp_path, toy):
    assert look(write(tmp_path / "bag", camera="/front/image"), toy, {"cam": "/front/image"}).lacks == []
    assert look(tmp_path / "bag", toy, {"/cam": "/front/image"}).lacks == []  # as people write it
    with pytest.raises(InputError, match="/rear: no such topic in the bag, expected one of /cam"):
        look(write(tmp_path / "bag2"), toy, {"cam": "/rear"})
    with pytest.raises(InputError, match="/camera given, expected a topic of the robot file: cam, joint_states"):
        look(tmp_path / "bag2", toy, {"/camera": "/cam"})


def test_a_namespace_is_found_by_itself(tmp_path, toy):
    path = write(tmp_path / "bag", camera="/arm_1/cam", joints="/arm_1/joint_states")
    known = look(path, toy)
    assert known.lacks == []
    assert "joint states: found as /arm_1/joint_states, the robot file says /joint_states" in known.notes


def test_a_camera_without_messages_says_so(tmp_path, toy):
    with BagWriter(tmp_path / "bag") as writer:
        writer.write("/joint_states", "sensor_msgs/msg/JointState", writer.joint_state(T0, ["a", "b"], np.ones(2)), T0)
        writer._writer.add_connection("/cam", "sensor_msgs/msg/Image", typestore=writer.types)
    assert "camera base_0_rgb: /cam has no message" in look(tmp_path / "bag", toy).lacks[0]


def test_images_that_no_node_would_take_are_a_lack(tmp_path, toy):
    known = look(write(tmp_path / "bag", encoding="16UC1"), toy)
    assert "none of 30 messages on /cam can be used: base_0_rgb: encoding: '16UC1' given" in known.lacks[0]


def test_other_joint_names_are_a_lack_that_names_both(tmp_path, toy):
    path = write(tmp_path / "bag", names=("shoulder", "elbow"))
    known = look(path, toy)
    assert "expected a, b too" in known.lacks[0]
    assert "the bag's joints are shoulder, elbow" in known.lacks[0]


def test_joints_of_other_names_are_evaluated_by_them(tmp_path, toy):
    path = write(tmp_path / "bag", names=("shoulder", "elbow"), joint_value=lambda k: (np.sin(k / 9), 0.5))
    bag = open_bag(path)
    known = survey(bag, toy, match_topics(toy, bag.topics, {}))
    own, stand_in = by_own_names(bag, toy, known)
    assert stand_in.joint_names == ("shoulder", "elbow")
    assert len(own.joints) == 60
    text = sketch(stand_in, own)
    assert "name: shoulder, min: -1.0" in text
    assert "name: elbow, min: 0.450, max: 0.550, max_velocity: 0.10" in text
    assert by_own_names(bag, toy, look(write(tmp_path / "good"), toy)) is None


def test_some_bad_messages_are_counted_and_the_rest_used(tmp_path, toy):
    path = write(tmp_path / "bag", joint_value=lambda k: (float("nan"), 0.0) if k % 3 == 0 else (0.0, 0.0))
    known = look(path, toy)
    assert known.lacks == []
    assert len(known.joints) == 40
    assert any("20 of 60 messages left out: joint state: a: nan given" in line for line in known.notes)


def test_stamps_of_zero_fall_back_on_record_times_and_are_said(tmp_path, toy):
    known = look(write(tmp_path / "bag", stamp=lambda t: 0), toy)
    assert known.lacks == []
    assert known.joint_times[0] == T0
    assert any("60 of 60 messages have a stamp of 0" in line for line in known.notes)


def test_sim_time_in_a_wall_time_bag_is_followed(tmp_path, toy):
    known = look(write(tmp_path / "bag", stamp=lambda t: t - T0 + 5_000_000_000), toy)
    assert known.clock == "stamp"
    assert known.start == 5_000_000_000
    assert any("another clock, such as sim time" in line for line in known.notes)


def test_a_clock_that_is_set_back_is_found(tmp_path, toy):
    def stamp(t: int) -> int:
        seconds = (t - T0) * 1e-9
        return t if seconds < 1.5 else t - 1_200_000_000

    known = look(write(tmp_path / "bag", stamp=stamp), toy)
    assert known.clock == "stamp"
    assert known.topics["/joint_states"].resets == 1
    assert any("set back 1 times" in line for line in known.notes)
    first, second = known.actions.segment(0), known.actions.segment(1)
    assert len(first) == 30
    assert len(second) == 30
    at = np.array([T0 + 400_000_000], dtype=np.int64)  # both parts have this moment, with different positions
    assert first.sample(at)[0, 0] == pytest.approx(0.8)
    assert second.sample(at)[0, 0] == pytest.approx(3.2, abs=0.01)


def test_commands_in_degrees_are_noticed(tmp_path, toy):
    with BagWriter(tmp_path / "bag") as writer:
        for k in range(60):
            t = T0 + k * 50_000_000
            state = writer.joint_state(t, ["a", "b"], np.zeros(2))
            writer.write("/joint_states", "sensor_msgs/msg/JointState", state, t)
            told = writer.trajectory(0, ["a", "b"], np.array([[90.0 if k < 30 else 0.0, 0.0]]), np.array([1]))
            writer.write("/controller/joint_trajectory", "trajectory_msgs/msg/JointTrajectory", told, t)
    found = metrics.beyond_limits(look(tmp_path / "bag", toy), toy)
    assert set(found) == {"a"}
    assert found["a"]["position"] == pytest.approx(0.5, abs=0.05)
    assert 0.0 < found["a"]["velocity"] < 0.1


def test_an_mcap_of_other_encodings_says_so(tmp_path, toy):
    """As Foxglove's own tools write them: no ROS 2 profile, JSON in the messages."""
    import struct

    def text(value: str) -> bytes:
        return struct.pack("<I", len(value)) + value.encode()

    def record(kind: int, body: bytes) -> bytes:
        return struct.pack("<BQ", kind, len(body)) + body

    raw = b"\x89MCAP0\r\n" + record(1, text("") + text("x"))
    raw += record(3, struct.pack("<H", 1) + text("Thing") + text("jsonschema") + text("{}"))
    raw += record(4, struct.pack("<HH", 0, 1) + text("/thing") + text("json") + text(""))
    raw += record(5, struct.pack("<HIQQ", 0, 0, T0, T0) + b"{}")
    (tmp_path / "x.mcap").write_bytes(raw + record(15, b"\0\0\0\0"))
    with pytest.raises(InputError, match="topic /thing is encoded as 'json', expected cdr"):
        look(tmp_path / "x.mcap", toy)


def test_an_empty_bag_says_so(tmp_path, toy):
    with BagWriter(tmp_path / "bag") as writer:
        writer._writer.add_connection("/cam", "sensor_msgs/msg/Image", typestore=writer.types)
    with pytest.raises(InputError, match="no message"):
        look(tmp_path / "bag", toy)


@pytest.mark.parametrize("kind", ["std_msgs/msg/Float64MultiArray", "sensor_msgs/msg/JointState"])
def test_commands_on_another_topic_are_found_and_said(tmp_path, toy, kind):
    with BagWriter(tmp_path / "bag") as writer:
        for k in range(20):
            t = T0 + k * 50_000_000
            values = np.array([k, -k], float)
            state = writer.joint_state(t, ["a", "b"], 0.0 * values)
            writer.write("/joint_states", "sensor_msgs/msg/JointState", state, t)
            told = writer.floats(values) if "Float64" in kind else writer.joint_state(t, ["b", "a"], values[::-1])
            writer.write("/arm/command", kind, told, t)
    known = look(tmp_path / "bag", toy)
    assert known.actions.source == "/arm/command"
    assert any("taken from /arm/command" in line for line in known.notes)
    assert known.actions.sample(np.array([T0 + 5 * 50_000_000]))[0].tolist() == [5.0, -5.0]


def test_two_candidates_for_commands_are_named_and_neither_taken(tmp_path, toy):
    with BagWriter(tmp_path / "bag") as writer:
        for name in ("/left/goal", "/right/goal"):
            writer.write(name, "std_msgs/msg/Float64MultiArray", writer.floats(np.ones(2)), T0)
        state = writer.joint_state(T0, ["a", "b"], np.zeros(2))
        writer.write("/joint_states", "sensor_msgs/msg/JointState", state, T0)
    known = look(tmp_path / "bag", toy)
    assert known.actions.source == "measured joint positions"
    assert any("/left/goal, /right/goal might hold them" in line for line in known.notes)
    assert look(tmp_path / "bag", toy, command="/left/goal").actions.source == "/left/goal"
