"""The robot file: read strictly, converted once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hybrid_policy.control.robot_file import RobotFile, check_fit
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import PolicySpec
from hybrid_policy.share import share_path

from .synthetic import ALOHA, TWO_JOINTS, robot  # isort: skip

TWIST = """
name: eef
cameras: [{name: cam, topic: cam/image_raw, rate: 20}]
joint_states: {topic: joint_states, rate: 50}
joints: [{name: a, min: -1.0, max: 1.0, max_velocity: 1.0}]
policy: {rate: 10, state: [a], action: [x, y, z, roll, pitch, yaw, gripper]}
command:
  interface: twist
  topic: servo_node/delta_twist_cmds
  linear_scale: 0.05
  angular_scale: 0.5
  max_linear: 0.4
  max_angular: 2.0
  gripper: {topic: gripper/commands, open: 0.04, closed: 0.0}
timeouts: {camera: 0.5, joint_states: 0.2, skew: 0.1, action: zero}
"""


def test_every_shipped_file_loads() -> None:
    for path in share_path("config/robots").glob("*.yaml"):
        loaded = RobotFile.load(path)
        assert loaded.limits.lower.shape == (len(loaded.command_names),)


def test_commands_and_actions_are_inverse() -> None:
    aloha = RobotFile.load(ALOHA)
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 14)).astype(np.float32)
    np.testing.assert_allclose(aloha.actions(aloha.commands(actions)), actions, atol=1e-6)


def test_order_and_convention(tmp_path: Path) -> None:
    two = robot(tmp_path)
    assert two.command_names == ("a", "b")
    # state: [b, a]; b's value is (position - 0.02) * 10
    np.testing.assert_allclose(two.state(np.array([0.5, 0.07])), [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(two.commands(np.array([[0.5, -0.25]])), [[-0.25, 0.07]], atol=1e-9)


def test_only_commanded_joints_are_commanded(tmp_path: Path) -> None:
    one = robot(tmp_path, TWO_JOINTS.replace("action: [b, a]", "action: [b]"))
    assert one.command_names == ("b",)
    assert one.command_index.tolist() == [1]
    assert one.limits.upper.tolist() == [0.1]
    assert np.isinf(one.limits.acceleration).all()


def test_twist_is_a_speed(tmp_path: Path) -> None:
    eef = robot(tmp_path, TWIST)
    command = eef.commands(np.array([1.0, 0, 0, 0, 0, -1.0, 1.0]))
    np.testing.assert_allclose(command, [0.5, 0, 0, 0, 0, -5.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(eef.commands(np.array([0, 0, 0, 0, 0, 0, -1.0]))[6], 0.04)
    assert eef.limits.upper.tolist() == [0.4, 0.4, 0.4, 2.0, 2.0, 2.0, 0.04]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("min: -1.0", "min: low", "joints[0].min: 'low' given, expected a number"),
        ("min: -1.0, ", "", "joints[0].min: missing, expected a number"),
        ("max: 1.0", "max: -2.0", "joints[0].max: -2.0 given, expected a number above min (-1)"),
        ("max: 1.0", "max: .nan", "joints[0].max: nan given"),
        (
            "max_velocity: 1.0",
            "max_velocity: 0",
            "joints[0].max_velocity: 0 given, expected a number above 0",
        ),
        ("max_velocity: 1.0", "speed: 1.0", "joints[0].max_velocity: missing"),
        ("{name: b,", "{name: a,", "joints[1].name: 'a' given, expected each joint once"),
        ("rate: 20}]", "rate: true}]", "cameras[0].rate: True given"),
        ("rate: 20}]", "rate: 20, encodings: [yuv]}]", "cameras[0].encodings: 'yuv' given"),
        ("rate: 20}]", "rate: 20, type: raw}]", "cameras[0].type: 'raw' given, expected image or compressed"),
        (
            "rate: 20}]",
            "rate: 20, fov: 90}]",
            "cameras[0].fov: 90 given, expected one of the keys name, topic",
        ),
        (
            "[{name: cam, topic: cam/image_raw, rate: 20}]",
            "[]",
            "cameras: [] given, expected a list of mappings",
        ),
        ("state: [b, a]", "state: [b, c]", "policy.state: 'c' given, expected one of a, b"),
        ("action: [b, a]", "action: [b, b]", "policy.action: 'b' given, expected each name once"),
        ("scale: 10.0", "scale: 0", "policy.conventions.b.scale: 0"),
        ("conventions: {b:", "conventions: {c:", "policy.conventions.c: 'c' given"),
        ("interface: joint_trajectory", "interface: torque", "command.interface: 'torque' given"),
        ("action: hold", "action: zero", "timeouts.action: 'zero' given, expected hold or none"),
        ("skew: 0.1", "skew: -1", "timeouts.skew: -1 given"),
        ("name: two", "name: [two]", "name: ['two'] given, expected text"),
        ("name: two", "name: two\nname: three", "key name given twice"),
        ("prompt: {topic: prompt, default: go}", "prompt: 3", "prompt: 3 given, expected a mapping"),
        ("joint_states: {topic: joint_states, rate: 50}", "", "joint_states: missing"),
        ("timeouts:", "extra: 1\ntimeouts:", "extra: 1 given, expected one of the keys name"),
        ("name: two", "name: {two", "not valid YAML"),
    ],
)
def test_one_clear_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in TWO_JOINTS
    with pytest.raises(InputError) as error:
        robot(tmp_path, TWO_JOINTS.replace(old, new, 1))
    text = str(error.value)
    assert text.startswith(str(tmp_path / "robot.yaml"))
    assert said in text
    assert "\n" not in text


def test_a_twist_needs_its_axes_and_its_gripper(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"policy\.action"):
        robot(tmp_path, TWIST.replace("[x, y, z, roll, pitch, yaw, gripper]", "[x, y, z]"))
    without = TWIST.replace("  gripper: {topic: gripper/commands, open: 0.04, closed: 0.0}\n", "")
    with pytest.raises(InputError, match=r"command\.gripper"):
        robot(tmp_path, without)


def test_missing_files_and_other_documents(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        RobotFile.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="top level"):
        RobotFile.load(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        RobotFile.load(tmp_path / "binary.yaml")


def test_fit_lists_everything_that_does_not_fit(tmp_path: Path) -> None:
    spec = PolicySpec("p", ("cam", "wrist"), 3, 2, 32, 50)
    with pytest.raises(InputError) as error:
        check_fit(robot(tmp_path), spec)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "wrist" in lines[0]
    assert "policy.state: 2 names given, expected 3" in lines[1]
    check_fit(robot(tmp_path), PolicySpec("p", ("cam",), 2, 2, 32, 50))
