"""From the node's parameters to a policy that is ready to infer."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import Observation, Policy
from hybrid_policy.share import share_path

#: Where the policy of the simulated robot ships.
SHIPPED = "checkpoints/sim_pi05"


def find_checkpoint(name: str) -> str:
    """The directory that the parameter ``checkpoint`` means, or ``random``.

    ``shipped`` means ``random`` where no trained policy ships (loading says so).

    Raises:
        InputError: no such directory.
    """
    if name == "shipped":
        try:
            return str(share_path(SHIPPED))
        except InputError:
            return "random"
    if name == "random":
        return name
    if not Path(name).expanduser().is_dir():
        raise InputError.at("parameter", "checkpoint", name, "a checkpoint directory, shipped or random")
    return str(Path(name).expanduser())


def load_policy(values: Mapping[str, Any], robot: RobotFile, recipe: str, say: Callable[[str], None]) -> Policy:
    """Load the checkpoint that the parameters name, quantise it by ``recipe``, capture and warm up.

    Raises:
        InputError: checkpoint, recipe or device cannot be used.
    """
    import torch

    from hybrid_policy.runtime.engine import Engine
    from hybrid_policy.runtime.rtc import RealTimeChunking
    from hybrid_policy.share import resolve

    if values["cpu_threads"] > 0:
        torch.set_num_threads(values["cpu_threads"])
    logging.getLogger("hybrid_policy").setLevel(logging.INFO)
    rtc = RealTimeChunking(
        mode=values["rtc.mode"] if values["chunking"] == "rtc" else "off",
        schedule=values["rtc.schedule"],
        beta=values["rtc.beta"],
        prior_std=values["rtc.prior_std"],
    )
    checkpoint = find_checkpoint(values["checkpoint"])
    recipe_file = resolve(recipe, "config/recipes")

    def load(path: str) -> Engine:
        return Engine.from_checkpoint(path, recipe_file, values["device"], rtc=rtc, seed=values["seed"])

    if checkpoint != "random":
        return load(checkpoint)
    absent = "none ships yet, so " if values["checkpoint"] == "shipped" else ""
    say(
        f"checkpoint '{values['checkpoint']}': {absent}a small pi0.5 with random weights; "
        "the robot moves without purpose"
    )
    with tempfile.TemporaryDirectory(prefix="hybrid_policy_random_") as folder:
        write_random_checkpoint(Path(folder), robot, values["seed"])
        return load(folder)


def write_random_checkpoint(folder: Path, robot: RobotFile, seed: int) -> None:
    """Random weights for a robot file, whose actions lie in the middle half of each joint's range."""
    from hybrid_policy.runtime.random_policy import random_checkpoint

    low = np.array([joint.min if joint.min is not None else -1.0 for joint in robot.joints])
    high = np.array([joint.max if joint.max is not None else 1.0 for joint in robot.joints])
    if robot.command.interface == "twist":
        ends = (np.full(len(robot.action_names), -0.2), np.full(len(robot.action_names), 0.2))
    else:
        middle, reach = 0.5 * (low + high)[robot.command_index], 0.25 * (high - low)[robot.command_index]
        ends = (robot.actions(middle - reach), robot.actions(middle + reach))
    random_checkpoint(
        folder,
        cameras=[camera.name for camera in robot.cameras],
        state_range=_ranges(robot.state(low), robot.state(high)),
        action_range=_ranges(*ends),
        horizon=50,
        seed=seed,
    )


def _ranges(first: NDArray[np.floating], second: NDArray[np.floating]) -> list[tuple[float, float]]:
    return list(zip(np.minimum(first, second).tolist(), np.maximum(first, second).tolist()))


def warm_up(policy: Policy, robot: RobotFile, runs: int = 2) -> None:
    """Run the whole path once or twice on made-up inputs, so that nothing is new at activation.

    Raises:
        InputError: the policy does not run (a missing tokenizer, say).
    """
    spec = policy.spec
    images = {name: np.zeros((224, 224, 3), np.uint8) for name in spec.cameras}
    middle = [0.5 * ((j.min or 0.0) + (j.max or 0.0)) for j in robot.joints]
    observation = Observation(
        images=images,
        state=robot.state(np.array(middle)),
        prompt=robot.prompt or "warm up",
        stamps={"joints": 1},
        joints=np.array(middle),
    )
    noise = np.zeros((spec.horizon, spec.max_action_dim), np.float32)
    for _ in range(runs):
        policy.infer(observation, noise, None)
