"""The simulated robot: names, units, cameras, and that it obeys."""

import importlib.util

import numpy as np
import pytest
import yaml
from hybrid_policy.errors import InputError
from hybrid_policy.share import share_path
from hybrid_policy.sim.kinematics import arm_to, tip_of
from hybrid_policy.sim.robot import SimRobot, asset_folder
from hybrid_policy.sim.scene import HOME, JOINT_NAMES, Cube, Scene

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="the simulator is not installed")
SCENE = Scene((Cube("red", 0.05, 0.5), Cube("blue", 0.18, 0.58)), "red", "pick up the red cube")


@pytest.fixture(scope="module")
def robot():
    robot = SimRobot(SCENE)
    yield robot
    robot.close()


def test_joints_and_cameras_are_those_of_the_robot_file(robot: SimRobot) -> None:
    described = yaml.safe_load(share_path("config/robots/sim_aloha.yaml").read_text())
    assert [joint["name"] for joint in described["joints"]] == list(JOINT_NAMES)
    limits = np.array([[joint["min"], joint["max"]] for joint in described["joints"]])
    np.testing.assert_allclose(robot.limits, limits, atol=1e-5)
    for camera in described["cameras"]:
        image = robot.render(camera["name"])
        assert image.shape == (224, 224, 3)
        assert image.dtype == np.uint8
        assert image.std() > 5


def test_the_work_camera_sees_each_cube_in_its_colour(robot: SimRobot) -> None:
    robot.reset(SCENE)
    image = robot.render("base_0_rgb").astype(int)
    red = (image[..., 0] > image[..., 1:].max(-1) + 80).sum()
    blue = (image[..., 2] > image[..., :2].max(-1) + 80).sum()
    assert red > 150
    assert blue > 150


def test_it_goes_where_it_is_told_with_both_fingers(robot: SimRobot) -> None:
    robot.reset(SCENE)
    goal = np.asarray(HOME)
    goal[7:13] = [0.2, -0.7, 0.9, 0.0, 0.2, 0.0]
    goal[[6, 13]] = [0.05, 0.04]
    robot.command(goal)
    robot.step(750)
    np.testing.assert_allclose(robot.positions, goal, atol=0.012)
    np.testing.assert_allclose(robot.velocities, 0.0, atol=0.02)
    assert robot.time_ns == 1_500_000_000


def test_set_points_are_clipped_and_bad_ones_refused(robot: SimRobot) -> None:
    robot.reset(SCENE)
    robot.command(np.full(14, 9.0))
    np.testing.assert_allclose(robot.set_points, robot.limits[:, 1])
    with pytest.raises(InputError, match="14 finite numbers"):
        robot.command(np.full(14, np.nan))
    with pytest.raises(InputError, match="base_0_rgb"):
        robot.render("nose")


def test_the_same_scene_gives_the_same_episode(robot: SimRobot) -> None:
    ends = []
    for _ in range(2):
        robot.reset(SCENE)
        robot.command(np.asarray(HOME) + 0.02)
        robot.step(100)
        ends.append(robot.positions)
    np.testing.assert_array_equal(*ends)


def test_closed_form_kinematics_agree_with_the_model(robot: SimRobot) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        goal = np.array([random.uniform(-0.02, 0.2), random.uniform(0.4, 0.6), random.uniform(0.05, 0.2)])
        joints = np.asarray(HOME)
        joints[7:13] = arm_to(goal, 1.4)
        robot.place(joints)
        np.testing.assert_allclose(robot.tip, goal, atol=2e-5)
        np.testing.assert_allclose(tip_of(joints[7:13]), goal, atol=1e-9)


def test_a_missing_model_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gym-aloha==0\.1\.5"):
        asset_folder()
