"""Scenes, the judge and the expert."""

import importlib.util

import numpy as np
import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.sim.expert import ExpertState, next_set_points, plan
from hybrid_policy.sim.kinematics import arm_to
from hybrid_policy.sim.robot import SimRobot
from hybrid_policy.sim.scene import AREA_X, AREA_Y, HOME, Cube, Scene
from hybrid_policy.sim.tasks import SceneSettings, colour_in, expert_state, judge, run_expert, sample_scene

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="the simulator is not installed")


def solve(count: int, seed: int, motor_noise: float = 0.0) -> tuple[int, int]:
    random = np.random.default_rng(seed)
    settings = SceneSettings(distractor=0.3)
    robot = SimRobot(sample_scene(random, settings), seed=seed, motor_noise=motor_noise)
    verdicts = []
    for _ in range(count):
        robot.reset(sample_scene(random, settings))
        verdicts.append(run_expert(robot)[0])
    return sum(v.success for v in verdicts), sum(v.wrong for v in verdicts)


def test_the_expert_lifts_the_named_cube() -> None:
    assert solve(12, seed=5) == (12, 0)


def test_asked_for_the_other_cube_it_puts_the_first_down_and_lifts_the_other() -> None:
    random = np.random.default_rng(8)
    robot = SimRobot(sample_scene(random))
    for _ in range(4):
        scene = sample_scene(random)
        robot.reset(scene)
        assert run_expert(robot)[0].success
        other = "blue" if scene.target == "red" else "red"
        highest = 0.0
        for _ in range(140):
            robot.command(next_set_points(expert_state(robot, other))[0])
            robot.step(25)
            if judge(robot, other).success:
                break
            highest = max(highest, judge(robot).heights[scene.target])
        assert judge(robot, other).success
        assert highest < 0.1  # put down, not carried about
    robot.close()


@pytest.mark.slow
@pytest.mark.parametrize("motor_noise", [0.0, 0.02])
def test_the_expert_solves_95_of_100(motor_noise: float) -> None:
    solved, wrong = solve(100, seed=6, motor_noise=motor_noise)
    assert solved >= 95
    assert wrong == 0


def test_scenes_keep_to_the_area_and_apart_and_repeat_by_seed() -> None:
    settings = SceneSettings(distractor=0.5)
    random = np.random.default_rng(3)
    scenes = [sample_scene(random, settings) for _ in range(200)]
    for scene in scenes:
        places = np.array([[cube.x, cube.y] for cube in scene.cubes])
        assert (places >= [AREA_X[0], AREA_Y[0]]).all()
        assert (places <= [AREA_X[1], AREA_Y[1]]).all()
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(len(places))
        assert gaps.min() >= 0.075
        assert colour_in(scene.prompt) == scene.target
    assert {len(scene.cubes) for scene in scenes} == {2, 3}
    assert {scene.target for scene in scenes} == {"red", "blue"}
    again = np.random.default_rng(3)
    assert [sample_scene(again, settings) for _ in range(200)] == scenes


def test_the_judge_knows_success_wrong_both_and_thrown() -> None:
    scene = Scene((Cube("red", 0.0, 0.45), Cube("blue", 0.15, 0.55)), "red", "lift the red cube")
    robot = SimRobot(scene)
    in_hand = np.asarray(HOME)
    in_hand[7:13] = arm_to(np.array([0.1, 0.5, 0.1]), 1.4)
    assert (judge(robot).success, judge(robot).wrong) == (False, False)

    def lift(*indices: int) -> None:
        robot.reset(scene)
        robot.place(in_hand)
        for index in indices:
            address = robot._cube_qpos[index]
            robot.data.qpos[address : address + 3] = (0.1, 0.5 + 0.04 * index, 0.1)

    for indices, expected in (((0,), (True, False)), ((1,), (False, True)), ((0, 1), (False, True))):
        lift(*indices)
        assert (judge(robot).success, judge(robot).wrong) == expected
    lift(1)
    assert judge(robot, target="blue").success
    assert not judge(robot, target="green").success  # not on the table
    lift(0)
    robot.place(np.asarray(HOME))  # up, but the hand is elsewhere
    assert not judge(robot).success
    robot.close()


@pytest.mark.parametrize("prompt", ["pick it up", "lift the red and the blue cube", ""])
def test_a_prompt_must_name_one_colour(prompt: str) -> None:
    with pytest.raises(InputError, match="one colour"):
        colour_in(prompt)


def test_a_plan_ends_with_the_cube_lifted_and_keeps_the_speed_limit() -> None:
    cubes = np.array([[0.0, 0.42, 0.02], [0.18, 0.58, 0.02]])
    home = np.tile(np.asarray(HOME), (2, 1))
    scene = Scene((Cube("red", 0.0, 0.42),), "red", "lift the red cube")
    robot = SimRobot(scene)
    tip = np.tile(robot.tip, (2, 1))
    plans = plan(ExpertState(home, home, tip, cubes, np.full(2, 0.02), np.zeros(2)), 100)
    assert plans.shape == (2, 100, 14)
    assert np.abs(np.diff(plans, axis=1)).max() <= 0.7 * 0.05 + 1e-9
    assert (plans[:, -1, 13] < 0.035).all()  # closed
    np.testing.assert_array_equal(plans[:, 0], home)
    # one at a time gives the same
    alone = plan(expert_state(robot), 100)
    np.testing.assert_allclose(alone[0], plans[0], atol=1e-6)
    robot.close()
