"""The task: lift the cube that the prompt names. Scenes at random, judged by the simulator."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError
from hybrid_policy.sim.expert import PERIOD, ExpertState, next_set_points
from hybrid_policy.sim.robot import TIME_STEP, SimRobot
from hybrid_policy.sim.scene import AREA_X, AREA_Y, COLOURS, CUBE_HALF, HOME, Cube, Look, Scene

#: Success: the centre of the named cube above this, every other cube below OTHER_HEIGHT (m).
LIFTED_HEIGHT = 0.08
OTHER_HEIGHT = 0.05

PROMPTS = (
    "pick up the {} cube",
    "lift the {} cube",
    "grab the {} cube",
    "pick up the {} block",
    "lift the {} block",
    "take the {} block",
    "raise the {} cube",
    "pick the {} one up",
)
TASK_COLOURS = ("red", "blue")
DISTRACTORS = ("green", "yellow")

#: A lifted cube is in the hand: a cube that was thrown up does not count (m, tip to centre).
IN_HAND = 0.06

_IN_FINGERS = 0.025  # from the tip to the centre of a cube that the fingers enclose (m)
_STEPS = round(PERIOD / TIME_STEP)
_APART = 0.075  # between two cubes' centres: room for an open gripper (m)


@dataclass(frozen=True)
class SceneSettings:
    """What is drawn at random besides the cubes' places.

    randomise: light, shades, table, size and yaw of the cubes, start pose.
    distractor: chance of a third cube. start_noise: standard deviation of the start pose (rad).
    """

    randomise: bool = True
    distractor: float = 0.0
    start_noise: float = 0.05
    phrasings: bool = True


def colour_in(prompt: str) -> str:
    """The colour that a prompt names.

    Raises:
        InputError: it names none that can lie on the table, or more than one.
    """
    named = [c for c in COLOURS if re.search(rf"\b{c}\b", prompt.lower())]
    if len(named) != 1:
        raise InputError.at("task", "prompt", prompt, f"one colour of {', '.join(COLOURS)}")
    return named[0]


def sample_scene(
    random: np.random.Generator, settings: SceneSettings | None = None, target: str | None = None
) -> Scene:
    """Cubes at random places at least 7.5 cm apart; the prompt names the red or the blue one."""
    settings = SceneSettings() if settings is None else settings
    colours = list(TASK_COLOURS)
    third = DISTRACTORS[int(random.integers(len(DISTRACTORS)))]
    if random.random() < settings.distractor:
        colours.append(third)
    target = TASK_COLOURS[int(random.integers(2))] if target is None else target
    if target not in colours:
        raise InputError.at("task", "target", target, f"one of {', '.join(colours)}")
    phrase = PROMPTS[int(random.integers(len(PROMPTS)))] if settings.phrasings else PROMPTS[0]
    start = np.asarray(HOME)
    look = Look()
    if settings.randomise:
        start[[*range(6), *range(7, 13)]] += settings.start_noise * random.standard_normal(12)
        start[[6, 13]] = random.uniform(0.022, 0.056, 2)
        look = Look(
            ambient=float(random.uniform(0.6, 1.4)),
            diffuse=float(random.uniform(0.6, 1.5)),
            table=tuple((random.uniform(0.12, 0.35) + random.uniform(-0.03, 0.03, 3)).tolist()),
        )
    cubes = tuple(
        _sample_cube(random, colour, place, settings) for colour, place in zip(colours, _places(random, len(colours)))
    )
    return Scene(cubes, target, phrase.format(target), tuple(start.tolist()), look)


def _places(random: np.random.Generator, count: int) -> list[NDArray[np.float64]]:
    low, high = np.array([AREA_X[0], AREA_Y[0]]), np.array([AREA_X[1], AREA_Y[1]])
    while True:
        places = [random.uniform(low, high) for _ in range(count)]
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]]
        if min(gaps, default=np.inf) >= _APART:
            return places


def _sample_cube(random: np.random.Generator, colour: str, place: NDArray[np.float64], settings: SceneSettings) -> Cube:
    x, y = float(place[0]), float(place[1])
    if not settings.randomise:
        return Cube(colour, x, y)
    shade = np.clip(np.asarray(COLOURS[colour]) * random.uniform(0.65, 1.0) + random.uniform(0, 0.15, 3), 0, 1)
    half = CUBE_HALF * float(random.uniform(0.9, 1.1))
    return Cube(colour, x, y, float(random.uniform(-0.25, 0.25)), half, tuple(shade.tolist()))


@dataclass(frozen=True)
class Verdict:
    """success: the named cube is up, in the hand, and no other. wrong: another cube is up. heights: m."""

    success: bool
    wrong: bool
    heights: dict[str, float]


def judge(robot: SimRobot, target: str | None = None) -> Verdict:
    """Judge the scene as it is now; ``target`` (a colour) replaces the scene's own."""
    target = robot.scene.target if target is None else target
    places = {cube.colour: robot.cube_position(i) for i, cube in enumerate(robot.scene.cubes)}
    heights = {colour: float(place[2]) for colour, place in places.items()}
    others = [height for colour, height in heights.items() if colour != target]
    in_hand = target in places and bool(np.linalg.norm(places[target] - robot.tip) < IN_HAND)
    lifted = in_hand and heights[target] > LIFTED_HEIGHT
    return Verdict(
        success=lifted and all(height < OTHER_HEIGHT for height in others),
        wrong=any(height > LIFTED_HEIGHT for height in others),
        heights=heights,
    )


def expert_state(robot: SimRobot, target: str | None = None) -> ExpertState:
    """The robot's state as the expert asks for it (one row), for the scene's cube of colour ``target``."""
    target = robot.scene.target if target is None else target
    index = next(i for i, cube in enumerate(robot.scene.cubes) if cube.colour == target)
    tip = robot.tip
    other = 0.0
    for i in range(len(robot.scene.cubes)):
        if i != index and np.linalg.norm(robot.cube_position(i) - tip) < _IN_FINGERS:
            other = _extent(robot, i)
    return ExpertState(
        set_points=robot.set_points[None],
        joints=robot.positions[None],
        tip=tip[None],
        cube=robot.cube_position(index)[None],
        half=np.array([_extent(robot, index)]),
        other=np.array([other]),
    )


def _extent(robot: SimRobot, index: int) -> float:
    """Half a cube's extent between the fingers (m): more than half an edge where it is turned."""
    turned = robot.cube_yaw(index) - robot.positions[7]
    return float(robot.scene.cubes[index].half * (abs(np.cos(turned)) + abs(np.sin(turned))))


def run_expert(robot: SimRobot, limit: float = 8.0) -> tuple[Verdict, float]:
    """Let the expert solve the robot's scene; the verdict and the seconds it took (``limit`` at most)."""
    while True:
        robot.command(next_set_points(expert_state(robot))[0])
        robot.step(_STEPS)
        verdict = judge(robot)
        seconds = robot.time_ns * 1e-9
        if verdict.success or seconds >= limit:
            return verdict, seconds
