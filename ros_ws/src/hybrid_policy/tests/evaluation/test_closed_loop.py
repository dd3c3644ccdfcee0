"""Episodes in the simulator: time, delay, and the figures drawn from them."""

import importlib.util

import numpy as np
import pytest
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.closed_loop import Episode, EpisodeResult, LoopSettings
from hybrid_policy.evaluation.success import summarise, wilson_interval
from hybrid_policy.models.observation import ActionChunk, PolicySpec
from hybrid_policy.share import share_path
from hybrid_policy.sim.expert import plan
from hybrid_policy.sim.robot import CAMERAS, SimRobot
from hybrid_policy.sim.tasks import SceneSettings, expert_state, sample_scene

needs_simulator = pytest.mark.skipif(
    importlib.util.find_spec("mujoco") is None, reason="the simulator is not installed"
)
SPEC = PolicySpec("expert", CAMERAS, 14, 14, 14, 32)


@pytest.fixture(scope="module")
def robot_file() -> RobotFile:
    return RobotFile.load(share_path("config/robots/sim_aloha.yaml"))


def run(robot_file: RobotFile, settings: LoopSettings, scenes: int, blind: bool = True) -> list[EpisodeResult]:
    """Episodes of a policy that knows the state and answers with the expert's plan."""
    random = np.random.default_rng(11)
    robot = SimRobot(sample_scene(random))
    # it is blind: nothing is rendered
    robot.render = lambda camera, size=224: np.zeros((4, 4, 3), np.uint8)  # type: ignore[method-assign]
    results = []
    for seed in range(scenes):
        scene = sample_scene(random, SceneSettings(distractor=0.3))
        episode = Episode(robot, scene, robot_file, SPEC, settings=settings, seed=seed)
        while (asked := episode.observe()) is not None:
            observation = asked[0]
            actions = robot_file.actions(plan(expert_state(robot), SPEC.horizon)[0])
            episode.act(ActionChunk(actions, actions, observation.stamp, {}))
        results.append(episode.result)
    robot.close()
    return results


@needs_simulator
@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_the_experts_plans_succeed_through_the_controller(robot_file: RobotFile, delay: float) -> None:
    results = run(robot_file, LoopSettings(delay=delay), 8)
    assert sum(result.success for result in results) >= 7
    assert not any(result.wrong or result.refused for result in results)
    # 5 Hz, or as fast as the delay allows
    for result in results:
        assert result.steps <= result.seconds / max(0.2, delay) + 1


@needs_simulator
def test_observations_carry_the_stamps_and_ages(robot_file: RobotFile) -> None:
    robot = SimRobot(sample_scene(np.random.default_rng(0)))
    settings = LoopSettings(rate=5.0, delay=0.3, image_age=0.02, limit=1.5)
    episode = Episode(robot, robot.scene, robot_file, SPEC, settings=settings)
    stamps = []
    while (asked := episode.observe()) is not None:
        observation, noise, previous = asked
        assert noise.shape == (32, 14)
        assert previous is None
        assert set(observation.images) == set(CAMERAS)
        if stamps:
            assert observation.stamp - observation.stamps["base_0_rgb"] == 20_000_000
        stamps.append(observation.stamp)
        actions = np.tile(observation.state, (32, 1))
        episode.act(ActionChunk(actions, actions, observation.stamp, {}))
    # each inference takes longer than the period, so the next one starts when it ends
    assert np.diff(stamps).tolist() == [300_000_000] * (len(stamps) - 1)
    assert len(stamps) == 5
    assert not episode.result.success
    assert episode.result.seconds == 1.5
    robot.close()


def test_wilson_interval_agrees_with_published_values() -> None:
    # Newcombe (1998), table of method 3: 81 of 263, 15 of 148
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson_interval(15, 148)
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10)[1] == 1.0


def test_figures_of_a_few_episodes() -> None:
    results = [
        EpisodeResult(0, "red", True, False, 2.0, 10, 0),
        EpisodeResult(1, "red", False, True, 6.0, 30, 2),
        EpisodeResult(2, "blue", True, False, 4.0, 20, 0),
    ]
    figures = summarise(results)
    assert figures["success"] == pytest.approx(2 / 3)
    assert figures["by_colour"]["red"]["success"] == 0.5
    assert figures["by_colour"]["blue"]["episodes"] == 1
    assert figures["wrong_cube"] == pytest.approx(1 / 3)
    assert figures["steps_to_success"]["median"] == 15
    assert figures["seconds_to_success"]["median"] == 3.0
    assert figures["refused_chunks"] == 2
    assert summarise([])["seconds_to_success"] is None
