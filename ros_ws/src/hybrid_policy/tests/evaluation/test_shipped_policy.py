"""The policy that ships: it localises the named cube and lifts it; the command that says so."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hybrid_policy.cli import main
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.closed_loop import LoopSettings, run_episode
from hybrid_policy.evaluation.evaluate_command import CHECKPOINT, draw
from hybrid_policy.models.observation import Observation
from hybrid_policy.runtime.engine import Engine
from hybrid_policy.share import share_path
from hybrid_policy.sim.expert import plan
from hybrid_policy.sim.kinematics import tip_of
from hybrid_policy.sim.robot import SimRobot
from hybrid_policy.sim.tasks import SceneSettings, expert_state, sample_scene

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="the simulator is not installed")
STREAM = 77  # scenes of these tests alone


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_checkpoint(share_path(CHECKPOINT), "bf16", "cpu")


@pytest.fixture(scope="module")
def robot_file() -> RobotFile:
    return RobotFile.load(share_path("config/robots/sim_aloha.yaml"))


def test_it_is_small(engine: Engine) -> None:
    files = list(share_path(CHECKPOINT).iterdir())
    assert sum(file.stat().st_size for file in files) < 40e6
    assert engine.spec.horizon * 0.05 >= 1.2  # room for a period, a delay and a margin


def test_from_home_it_aims_at_the_cube_that_the_prompt_names(engine: Engine, robot_file: RobotFile) -> None:
    robot = SimRobot(sample_scene(np.random.default_rng((STREAM, 0))))
    errors = []
    for seed in range(8):
        robot.reset(sample_scene(np.random.default_rng((STREAM, seed)), SceneSettings(distractor=0.5)))
        joints = robot.positions
        images = {name: robot.render(name) for name in engine.spec.cameras}
        noise = np.random.default_rng(seed).standard_normal((engine.spec.horizon, 14), dtype=np.float32)
        for colour in ("red", "blue"):
            seen = Observation(images, robot_file.state(joints), f"pick up the {colour} cube", joints=joints)
            last = robot_file.commands(engine.infer(seen, noise).actions)[-1, 7:13]
            wanted = plan(expert_state(robot, colour), engine.spec.horizon)[0, -1, 7:13]
            errors.append(np.linalg.norm(tip_of(last) - tip_of(wanted)))
    robot.close()
    assert np.median(errors) < 0.01
    assert max(errors) < 0.05


def test_it_lifts_the_named_cube_and_then_the_other(engine: Engine, robot_file: RobotFile) -> None:
    scene = sample_scene(np.random.default_rng((STREAM, 1)))
    robot = SimRobot(scene)
    settings = LoopSettings(delay=0.1, switch=True, chunking="rtc")
    result = run_episode(engine, robot, scene, robot_file, settings=settings)
    robot.close()
    assert result.success
    assert not result.wrong


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "seed"])
def test_it_succeeds_on_new_scenes(robot_file: RobotFile, recipe: str) -> None:
    engine = Engine.from_checkpoint(share_path(CHECKPOINT), recipe, "cpu")
    robot = SimRobot(sample_scene(np.random.default_rng(0)))
    won = 0
    for seed in range(12):
        scene = sample_scene(np.random.default_rng((STREAM, seed)), SceneSettings(distractor=0.3))
        won += run_episode(engine, robot, scene, robot_file, settings=LoopSettings(), seed=seed).success
    robot.close()
    assert won >= 11


@pytest.mark.slow
def test_the_command_reports_and_is_the_same_for_any_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for jobs in ("1", "2"):
        given = ["evaluate", "--episodes", "2", "--limit", "1", "--device", "cpu", "--jobs", jobs, "--json"]
        assert main([*given, "-", "--chart", str(tmp_path / "chart.png")]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
    result = reports[0]["results"][0]
    assert result["episodes"] == 2
    assert result["success"] == 0.0  # one second is not enough
    assert result["interval"][1] > 0.5
    assert (tmp_path / "chart.png").stat().st_size > 2000
    assert main([*given, "-", "--expect", "0.9"]) == 1


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["--recipe", "bf61"], "bf61"),
        (["--episodes", "0"], "--episodes"),
        (["--delay", "-1"], "--delay"),
        (["no/such/checkpoint"], "no/such/checkpoint"),
        (["--robot", "hal"], "hal"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(given: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--jobs", "1", "--episodes", "1", *given]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error
    assert "\n" not in error


def test_several_delays_are_drawn_as_lines(tmp_path: Path) -> None:
    rows = [
        {"recipe": recipe, "delay": delay, "success": 0.9, "interval": [0.8, 0.95], "wrong_cube": 0.0}
        for recipe in ("bf16", "seed")
        for delay in (0.0, 0.4)
    ]
    draw({"results": rows, "episodes": 10}, tmp_path / "deep" / "lines.png")
    assert (tmp_path / "deep" / "lines.png").stat().st_size > 2000
