"""The robot files of openpi's published checkpoints fit those checkpoints, in their numbers too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hybrid_policy.control.robot_file import RobotFile, check_fit
from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import open_checkpoint
from hybrid_policy.models.checkpoint_writer import save_checkpoint
from hybrid_policy.models.config import OPENPI_CAMERAS
from hybrid_policy.models.observation import Observation
from hybrid_policy.models.pi05 import Pi05
from hybrid_policy.share import share_path

from .conftest import make_config

PUBLISHED = {"aloha": "trossen", "droid": "droid", "libero": "physical-intelligence/libero"}


def published(folder: Path, asset: str, statistics: dict) -> Path:
    """An openpi directory with small weights, the published asset id and 32-wide statistics."""
    config = make_config(cameras=OPENPI_CAMERAS, max_action_dim=32, max_state_dim=32)
    save_checkpoint(folder, Pi05(config), config, statistics)
    for name in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        (folder / name).unlink()
    dims = json.loads((folder / "dims.json").read_text())
    keep = {k: v for k, v in dims.items() if k in ("vlm", "expert", "vision", "vocab", "image")}
    (folder / "dims.json").write_text(json.dumps(keep))
    stats = {"mean": [0.0] * 32, "std": [1.0] * 32, "q01": [-1.0] * 32, "q99": [1.0] * 32}
    (folder / "assets" / asset).mkdir(parents=True)
    text = json.dumps({"norm_stats": {"state": stats, "actions": stats}})
    (folder / "assets" / asset / "norm_stats.json").write_text(text)
    return folder


def robot(name: str) -> RobotFile:
    return RobotFile.load(share_path(f"config/robots/{name}.yaml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_fits_its_checkpoint_and_no_other(tmp_path, statistics, name) -> None:
    spec = open_checkpoint(published(tmp_path, PUBLISHED[name], statistics)).spec
    check_fit(robot(name), spec)
    assert spec.horizon / robot(name).rate in (1.0, 0.5)
    for other in PUBLISHED.keys() - {name}:
        with pytest.raises(InputError, match=f"{other}.yaml"):
            check_fit(robot(other), spec)


def openpi_aloha_state(qpos: np.ndarray) -> np.ndarray:
    """openpi's aloha_policy on a runtime's qpos: signs, and the finger's travel back to the motor's angle."""
    state = qpos * np.array([1, -1, -1, 1, 1, 1, 1] * 2)
    travel = state[[6, 13]] * (0.058 - 0.01844) + 0.01844
    angle = np.arcsin((0.022**2 + travel**2 - 0.036**2) / (2 * 0.022 * travel))
    state[[6, 13]] = (angle - 0.5476) / (1.6296 - 0.5476)
    return state


def test_aloha_signs_and_grippers_are_openpis() -> None:
    file = robot("aloha")
    angle = np.array([0.3, 1.2])
    joints = np.linspace(-0.5, 0.7, 14)
    joints[[6, 13]] = angle
    opened = 0.022 * np.sin(angle)  # Interbotix: the motor's angle to the finger's travel
    travel = opened + np.sqrt(0.036**2 - (0.022**2 - opened**2))
    qpos = joints.copy()
    qpos[[6, 13]] = (travel - 0.01844) / (0.058 - 0.01844)
    np.testing.assert_allclose(file.state(joints), openpi_aloha_state(qpos), atol=2e-5)
    action = np.linspace(-0.4, 0.6, 14)
    command = file.commands(action[None])[0]
    theirs = action * np.array([1, -1, -1, 1, 1, 1, 1] * 2)
    normalized = (theirs[[6, 13]] + 0.5476 + 0.6213) / (1.4910 + 0.6213)  # _gripper_from_angular
    theirs[[6, 13]] = normalized * (1.4910 + 0.6213) - 0.6213  # real_env: back to the motor's angle
    np.testing.assert_allclose(command, theirs, atol=1e-6)
    np.testing.assert_allclose(file.actions(command[None])[0], action, atol=1e-6)


def test_droid_velocities_become_positions(tmp_path, statistics) -> None:
    built = open_checkpoint(published(tmp_path, "droid", statistics)).processors
    state = np.linspace(-0.3, 0.4, 8).astype(np.float32)
    seen = Observation({}, state, "")
    normalized = np.zeros((15, 32), np.float32)
    normalized[:, 0], normalized[:, 1], normalized[:, 7] = 0.5, 3.0, 0.25
    actions = built.finish(normalized, seen)
    steps = np.arange(1, 16)
    np.testing.assert_allclose(actions[:, 0], state[0] + 0.1 * steps, atol=1e-5)
    np.testing.assert_allclose(actions[:, 1], state[1] + 0.2 * steps, atol=1e-5)  # clipped to 1
    np.testing.assert_allclose(actions[:, 2], state[2], atol=1e-5)
    np.testing.assert_allclose(actions[:, 7], 0.25, atol=1e-5)
    again = built.normalized_actions(actions, state)
    np.testing.assert_allclose(again[:, [0, 2, 7]], normalized[:, [0, 2, 7]], atol=1e-4)


def test_aloha_actions_are_relative_but_the_grippers(tmp_path, statistics) -> None:
    built = open_checkpoint(published(tmp_path, "trossen", statistics)).processors
    state = np.linspace(-0.3, 0.4, 14).astype(np.float32)
    actions = built.finish(np.zeros((50, 32), np.float32), Observation({}, state, ""))
    expected = state.copy()
    expected[[6, 13]] = 0.0
    np.testing.assert_allclose(actions[49], expected, atol=1e-5)


def test_libero_sees_no_state_in_its_prompt(tmp_path, statistics) -> None:
    built = open_checkpoint(published(tmp_path, PUBLISHED["libero"], statistics)).processors
    assert built.prompt_style == "openpi_plain"
    commands = robot("libero").commands(np.array([[1.0, 0, 0, 0, 0, -1.0, -1.0], [0, 0, 0, 0, 0, 0, 1.0]]))
    np.testing.assert_allclose(commands[0], [1.0, 0, 0, 0, 0, -10.0, 0.04], atol=1e-9)
    np.testing.assert_allclose(commands[1, 6], 0.0, atol=1e-9)


def test_an_openpi_directory_without_statistics_says_so(tmp_path, statistics) -> None:
    folder = published(tmp_path, "droid", statistics)
    (folder / "dims.json").write_text(
        json.dumps(json.loads((folder / "dims.json").read_text()) | {"asset_id": "mine", "horizon": 15})
    )
    checkpoint = open_checkpoint(folder)
    assert any("norm_stats.json" in line for line in checkpoint.processors.missing)
    assert checkpoint.processors.integrated == ()
