"""The other outputs (ticks of positions, twists, a preview), limits from a URDF, the shadow check."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("rclpy") is None:
    pytest.skip("rclpy is not installed", allow_module_level=True)

from geometry_msgs.msg import TwistStamped
from hybrid_policy.control.robot_file import Joint
from hybrid_policy.errors import InputError
from hybrid_policy.ros import parameters
from hybrid_policy.ros.inputs import urdf_limits
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from .rig import HOME, ROBOT, NodeUnderTest, Rig  # isort: skip

pytestmark = pytest.mark.ros
COMMAND = "command: {interface: joint_trajectory, topic: controller/joint_trajectory}"
FORWARD = """command:
  interface: forward_position
  topic: forward/commands
  rate: 40
  gripper: {topic: hand/commands, joints: [gripper]}"""
TWIST = """command:
  interface: twist
  topic: servo/delta_twist_cmds
  frame: tool0
  linear_scale: 0.05
  angular_scale: 0.2
  max_linear: 0.25
  max_angular: 1.0
  gripper: {topic: hand/commands, open: 0.1, closed: 0.0}"""
URDF = """<robot name="r">
  <joint name="shoulder" type="revolute"><limit lower="-1" upper="1" effort="1" velocity="2"/></joint>
  <joint name="elbow" type="revolute"><limit lower="-0.5" upper="1.5" effort="1" velocity="2"/></joint>
</robot>"""


class Topic:
    """Everything that was heard on a topic, with the time."""

    def __init__(self, rig: Rig, kind: Any, name: str) -> None:
        self.heard: list[tuple[float, Any]] = []
        rig.node.create_subscription(kind, name, lambda m: self.heard.append((time.monotonic(), m)), 10)

    def since(self, began: float) -> list[Any]:
        return [message for at, message in list(self.heard) if at >= began]


def test_positions_tick_by_tick(tmp_path: Path) -> None:
    rig = Rig(tmp_path, robot=ROBOT.replace(COMMAND, FORWARD))
    arm, hand = (
        Topic(rig, Float64MultiArray, "forward/commands"),
        Topic(rig, Float64MultiArray, "hand/commands"),
    )
    rig.controller._desired = HOME.copy()
    try:
        node = NodeUnderTest(rig, tracking_tolerance=0.0, hold_tolerance=10.0)
        rig.wait(lambda: len(arm.heard) > 100 and len(hand.heard) > 100, "ticks")
        path = np.array([list(m.data) for _, m in arm.heard])
        assert path.shape[1] == 2
        assert all(len(m.data) == 1 for _, m in hand.heard)
        assert np.abs(np.diff(path, axis=0)).max() < 2.0 / 40 * 4  # the velocity limit, with ticks lost
        assert np.ptp(path[:, 0]) > 0.2
        began = time.monotonic()
        rig.prompt.publish(String(data="nan"))
        rig.wait(lambda: rig.heard.status.startswith("holding"), "holding")
        time.sleep(0.3)
        held = np.array([list(m.data) for m in arm.since(time.monotonic() - 0.25)])
        assert len(held) > 2  # a forward controller is told its position again and again
        assert np.ptp(held, axis=0).max() == 0.0
        assert arm.since(began)
        assert node.end() == 0
    finally:
        rig.close()


def test_twists_and_a_gripper(tmp_path: Path) -> None:
    text = ROBOT.replace(COMMAND, TWIST).replace("action: hold", "action: zero")
    text = text.replace("action: [shoulder, elbow, gripper]", "action: [x, y, z, roll, pitch, yaw, gripper]")
    text = text.replace("  conventions: {gripper: {offset: 0.0, scale: 10.0}}\n", "")
    rig = Rig(tmp_path, robot=text)
    twists, hand = (
        Topic(rig, TwistStamped, "servo/delta_twist_cmds"),
        Topic(rig, Float64MultiArray, "hand/commands"),
    )
    try:
        node = NodeUnderTest(rig)
        rig.wait(lambda: len(twists.heard) > 60, "twists")
        speeds = np.array([[m.twist.linear.x, m.twist.linear.y, m.twist.angular.z] for _, m in twists.heard])
        # the policy's 0.3 sin is 0.3 x 0.05 m x 20 Hz = 0.3 m/s, limited to 0.25
        assert np.abs(speeds[:, 0]).max() == pytest.approx(0.25)
        assert np.abs(speeds[:, 2]).max() == pytest.approx(1.0)
        assert twists.heard[0][1].header.frame_id == "tool0"
        assert twists.heard[-1][1].header.stamp.sec > 0
        assert 0.0 <= hand.heard[-1][1].data[0] <= 0.1
        rig.prompt.publish(String(data="stall"))
        rig.wait(lambda: rig.heard.status.startswith("holding"), "holding")
        last = twists.heard[-1][1].twist
        assert (last.linear.x, last.linear.y, last.angular.z) == (0.0, 0.0, 0.0)
        rig.prompt.publish(String(data="go"))
        rig.wait(lambda: rig.heard.status.startswith("running"), "running")
        assert node.end() == 0
        last = twists.heard[-1][1].twist
        assert (last.linear.x, last.linear.y, last.angular.z) == (0.0, 0.0, 0.0)
    finally:
        rig.close()


def test_dry_run_limits_from_a_urdf_and_a_latched_prompt(tmp_path: Path) -> None:
    text = ROBOT.replace("joint_states: {", "robot_description: {topic: robot_description}\njoint_states: {")
    for name in ("shoulder, min: -1.0, max: 1.0, ", "elbow, min: -0.5, max: 1.5, "):
        text = text.replace(name + "max_velocity: 2.0, ", name.split(",")[0] + ", ")
    assert "min: -1.0" not in text
    rig = Rig(tmp_path, robot=text)
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    urdf = rig.node.create_publisher(String, "robot_description", latched)
    urdf.publish(String(data=URDF))
    rig.node.destroy_publisher(rig.prompt)
    prompt = rig.node.create_publisher(String, "prompt", latched)
    prompt.publish(String(data="a latched task"))
    preview = Topic(rig, JointTrajectory, "policy_node/preview")
    try:
        node = NodeUnderTest(rig, dry_run=True, tracking_tolerance=0.0, **{"rt.fifo_priority": 99, "rt.mlockall": True})
        rig.wait(lambda: len(preview.heard) > 5, "previews")
        assert rig.heard.trajectories == []  # the robot itself was told nothing
        path = np.vstack([[p.positions for p in m.points] for _, m in preview.heard])
        assert (path[:, 0] >= -1).all()
        assert (path[:, 1] <= 1.5).all()
        rig.wait(lambda: rig.diagnostic("synchronisation")[2].get("prompt") == "a latched task", "the prompt")
        assert node.end() == 0
        assert rig.heard.trajectories == []
    finally:
        rig.close()


def test_shadow_check_warns_and_switches(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    shadow = {"shadow.every": 3, "shadow.recipe": "bf16", "shadow.switch": True, "shadow.threshold": 0.9}
    try:
        node = NodeUnderTest(rig, recipe="seed", **shadow)
        rig.wait(lambda: int(rig.diagnostic("shadow check")[2].get("checks", "0")) > 2, "checks")
        level, message, values = rig.diagnostic("shadow check")
        assert level == 0, message
        assert float(values["smallest"]) > 0.999
        assert rig.diagnostic("inference")[2]["recipe"] == "seed"
        rig.prompt.publish(String(data="differ"))
        rig.wait(lambda: rig.diagnostic("inference")[2]["recipe"] == "bf16", "the switch")
        rig.wait(lambda: rig.diagnostic("shadow check")[0] == 1, "a warning")
        assert "shadow check: action cosine" in node.text()
        rig.wait_running()
        assert node.end() == 0
    finally:
        rig.close()


def test_every_transition(tmp_path: Path) -> None:
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState, GetState

    rig = Rig(tmp_path)
    clients = {
        kind: rig.node.create_client(kind, f"/policy_node/{name}")
        for kind, name in ((ChangeState, "change_state"), (GetState, "get_state"))
    }

    def ask(kind: Any, request: Any) -> Any:
        assert clients[kind].wait_for_service(timeout_sec=20.0)
        future = clients[kind].call_async(request)
        rig.wait(future.done, "an answer")
        return future.result()

    def go(transition: int) -> bool:
        return bool(ask(ChangeState, ChangeState.Request(transition=Transition(id=transition))).success)

    def state() -> str:
        return str(ask(GetState, GetState.Request()).current_state.label)

    try:
        node = NodeUnderTest(rig, autostart=False)
        assert state() == "unconfigured"
        for _ in range(2):  # the second time from the start again
            assert go(Transition.TRANSITION_CONFIGURE)
            assert state() == "inactive"
            assert go(Transition.TRANSITION_ACTIVATE)
            rig.wait_running()
            began = time.monotonic()
            assert go(Transition.TRANSITION_DEACTIVATE)
            hold_time, _ = rig.wait(lambda began=began: rig.holds(began), "a hold")[0]
            time.sleep(0.3)
            assert rig.chunks(hold_time + 0.05) == []
            assert go(Transition.TRANSITION_CLEANUP)
            assert state() == "unconfigured"
        rig.file.write_text(rig.file.read_text().replace("max: 1.0", "max: up"))
        assert not go(Transition.TRANSITION_CONFIGURE)
        assert state() == "unconfigured"
        rig.wait(lambda: "joints[0].max: 'up' given" in rig.heard.status, "what is wrong, in the status")
        assert node.end() == 0
        assert "Traceback" not in node.text()
    finally:
        rig.close()


def test_urdf_limits() -> None:
    joints = (Joint("shoulder"), Joint("elbow", min=0.0, max_velocity=1.0))
    filled = urdf_limits(URDF, joints)
    assert filled == (Joint("shoulder", -1, 1, 2), Joint("elbow", 0.0, 1.5, 1.0))
    with pytest.raises(InputError, match="wrist: no lower limit"):
        urdf_limits(URDF, (Joint("wrist"),))
    with pytest.raises(InputError, match="not XML"):
        urdf_limits("<robot>", joints)


def test_parameter_file_and_page_are_those_of_the_table() -> None:
    import yaml
    from hybrid_policy.share import share_path

    path = share_path("config/policy_node.yaml")
    assert path.read_text() == parameters.parameter_file(), "run python -m hybrid_policy.ros.parameters"
    loaded = yaml.safe_load(path.read_text())["/**"]["ros__parameters"]
    flat: dict[str, object] = {}
    for key, value in loaded.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    assert flat == {one.name: one.default for one in parameters.PARAMETERS}
    page = Path(__file__).resolve().parents[5] / "docs" / "parameters.md"
    if page.exists():  # not where only the package is installed
        assert page.read_text() == parameters.document()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("inference_rate", 5, "inference_rate: 5 given, expected a number from 0.1 to 200"),
        ("inference_rate", 0.0, "inference_rate: 0.0 given"),
        ("chunking", "both", "chunking: 'both' given, expected rtc or ensemble or off"),
        ("rt.cpu_affinity", ["a"], "expected a list of integers"),
        ("autostart", 1, "autostart: 1 given, expected true or false"),
    ],
)
def test_parameters_are_checked(name: str, value: object, said: str) -> None:
    with pytest.raises(InputError) as error:
        parameters.check(name, value)
    assert said in str(error.value)
