"""What the robot was told, from every kind of command stream."""

from __future__ import annotations

import numpy as np
import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.message_types import _CONTROLLER_STATES, CONTROLLER_STATE, Decoder
from hybrid_policy.evaluation.recorded_actions import RecordedActions
from hybrid_policy.evaluation.topic_match import FLOATS, JOINT_STATE, TRAJECTORY, TWIST

MS = 1_000_000
NAMES = ["a", "b"]


@pytest.fixture
def messages(tmp_path):
    with BagWriter(tmp_path / "bag") as writer:
        yield writer
        writer.write("/t", "std_msgs/msg/String", writer.text("."), 0)


def times(*milliseconds: float) -> np.ndarray:
    return np.array([round(m * MS) for m in milliseconds], dtype=np.int64)


def test_set_points_are_met_at_their_times_and_mixed_between(messages):
    told = RecordedActions(NAMES)
    for k, value in enumerate((0.0, 1.0, 3.0)):
        told.add(FLOATS, messages.floats(np.array([value, -value])), k * 100 * MS)
    at = told.sample(times(0, 50, 100, 150, 200))
    np.testing.assert_allclose(at[:, 0], [0.0, 0.5, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(at[:, 1], -at[:, 0])


def test_nothing_is_known_before_the_first_nor_long_after_the_last(messages):
    told = RecordedActions(NAMES)
    told.add(FLOATS, messages.floats(np.ones(2)), 100 * MS)
    at = told.sample(times(99, 100, 599, 601))
    assert np.isnan(at[[0, 3]]).all()
    assert (at[[1, 2]] == 1.0).all()


def test_nothing_is_mixed_over_a_long_silence(messages):
    told = RecordedActions(NAMES)
    told.add(FLOATS, messages.floats(np.zeros(2)), 0)
    told.add(FLOATS, messages.floats(np.ones(2)), 5000 * MS)
    at = told.sample(times(400, 2000, 5000))
    assert (at[0] == 0.0).all()
    assert np.isnan(at[1]).all()
    assert (at[2] == 1.0).all()


def test_joints_are_found_by_name_and_those_not_commanded_are_unknown(messages):
    told = RecordedActions(NAMES)
    told.add(JOINT_STATE, messages.joint_state(1, ["x", "b"], np.array([9.0, 2.0])), 0)
    np.testing.assert_array_equal(told.sample(times(0)), [[np.nan, 2.0]])


def test_a_trajectory_is_in_force_until_the_next_and_is_led_in(messages):
    told = RecordedActions(NAMES)
    ahead = np.array([100, 200, 300]) * MS
    rows = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    told.add(TRAJECTORY, messages.trajectory(0, NAMES, rows, ahead), 0)
    told.add(TRAJECTORY, messages.trajectory(0, NAMES, rows + 9.0, ahead), 150 * MS)
    at = told.sample(times(100, 125, 149, 150, 200, 250, 450, 900, 951))[:, 0]
    # until 150 ms the first; there it stands at 1.5 and is led to the second's 10 at 250 ms
    np.testing.assert_allclose(at[:6], [1.0, 1.25, 1.49, 1.5, 5.75, 10.0])
    np.testing.assert_allclose(at[6:8], [12.0, 12.0])
    assert np.isnan(at[8])


def test_a_stamped_trajectory_counts_from_its_stamp(messages):
    told = RecordedActions(NAMES)
    rows = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    told.add(TRAJECTORY, messages.trajectory(1000 * MS, NAMES, rows, np.array([0, 100, 200]) * MS), 1050 * MS)
    np.testing.assert_allclose(told.sample(times(1100, 1150))[:, 0], [1.0, 1.5])


def test_a_twist_is_taken_in_the_robot_files_order(messages):
    told = RecordedActions(["x", "y", "z", "roll", "pitch", "yaw", "gripper"])
    told.add(TWIST, messages.twist(1, np.arange(6.0)), 0)
    np.testing.assert_array_equal(told.sample(times(0)), [[0, 1, 2, 3, 4, 5, np.nan]])


@pytest.mark.parametrize("definition", _CONTROLLER_STATES)
def test_every_form_of_the_controllers_state_is_read_without_a_definition(tmp_path, definition):
    """Written with one release's definition into a bag that carries none, as Humble's do."""
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.LATEST)
    store.register(get_types_from_msg(definition, CONTROLLER_STATE))
    kinds = store.types
    empty = np.empty(0)
    duration = kinds["builtin_interfaces/msg/Duration"](sec=0, nanosec=0)

    def point(value: float):
        return kinds["trajectory_msgs/msg/JointTrajectoryPoint"](
            positions=np.array([value, -value]), velocities=empty, accelerations=empty, effort=empty,
            time_from_start=duration,
        )  # fmt: skip

    fields = [line.split() for line in definition.strip().splitlines()]
    values = {}
    for kind, name in fields:
        if kind == "trajectory_msgs/JointTrajectoryPoint":
            values[name] = point(3.0 if name in ("reference", "desired") else 7.0)
        elif kind == "trajectory_msgs/MultiDOFJointTrajectoryPoint":
            values[name] = kinds["trajectory_msgs/msg/MultiDOFJointTrajectoryPoint"](
                transforms=[], velocities=[], accelerations=[], time_from_start=duration
            )
    stamp = kinds["builtin_interfaces/msg/Time"](sec=1, nanosec=0)
    values["header"] = kinds["std_msgs/msg/Header"](stamp=stamp, frame_id="")
    values["joint_names"] = NAMES
    if any(name == "multi_dof_joint_names" for _, name in fields):
        values["multi_dof_joint_names"] = []
    data = store.serialize_cdr(kinds[CONTROLLER_STATE](**values), CONTROLLER_STATE)

    from hybrid_policy.evaluation.bag import BagMessage, BagTopic

    decoder = Decoder({"/c": BagTopic("/c", CONTROLLER_STATE, 1)})
    decoded = decoder.decode(BagMessage("/c", CONTROLLER_STATE, 5, memoryview(data)))
    told = RecordedActions(NAMES)
    told.add(CONTROLLER_STATE, decoded, 0)
    np.testing.assert_array_equal(told.sample(times(0)), [[3.0, -3.0]])


@pytest.mark.parametrize(
    ("kind", "make", "expected"),
    [
        (FLOATS, lambda w: w.floats(np.ones(3)), "3 values given, expected 2"),
        (JOINT_STATE, lambda w: w.joint_state(1, ["x", "y"], np.ones(2)), "joints x, y ... given, expected a, b"),
        (JOINT_STATE, lambda w: w.joint_state(1, ["a", "b"], np.ones(1)), "1 positions given, expected 2"),
        (TRAJECTORY, lambda w: w.trajectory(0, NAMES, np.empty((0, 2)), np.empty(0)), "without points"),
        ("std_msgs/msg/String", lambda w: w.text("go"), "type std_msgs/msg/String given"),
    ],
)
def test_a_command_that_cannot_be_used_says_so(messages, kind, make, expected):
    with pytest.raises(InputError, match=expected):
        RecordedActions(NAMES).add(kind, make(messages), 0)


def test_an_unknown_type_says_so(tmp_path):
    from hybrid_policy.evaluation.bag import BagMessage, BagTopic

    decoder = Decoder({"/x": BagTopic("/x", "my_msgs/msg/Thing", 1)})
    assert not decoder.knows("my_msgs/msg/Thing")
    with pytest.raises(InputError, match="my_msgs/msg/Thing: the bag carries no definition"):
        decoder.decode(BagMessage("/x", "my_msgs/msg/Thing", 5, memoryview(b"\0\1\0\0")))


def test_a_definition_in_the_bag_is_used(tmp_path):
    with BagWriter(tmp_path / "bag") as writer:
        writer.write("/t", "std_msgs/msg/String", writer.text("hello"), 1)
    bag = open_bag(tmp_path / "bag")
    assert "string data" in bag.topics["/t"].definition
    (message,) = bag.messages()
    assert Decoder(bag.topics).decode(message).data == "hello"
