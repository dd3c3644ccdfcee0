"""The scripted expert: what to command next, from where the arm, the gripper and the cube are.

It is Markov: no clock and no memory besides the set-points themselves, so that it can be asked in any
state, also in one that a policy got into, and its answer is a function of what a camera sees. The phases
follow from the tip and the gripper:

* another cube in the hand: put it down where it is, open;
* away from the cube: open the gripper, go to the cube along a funnel (the height that is allowed grows
  with the horizontal distance, so that the hand arrives from above), straight up first where it is low;
* at the cube, gripper open: close;
* at the cube, gripper closed on it: lift straight up.

All functions take any number of states at once (leading dimension), so that one code drives a simulator
and labels tens of thousands of drawn states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.sim.kinematics import arm_to, tip_of
from hybrid_policy.sim.scene import HOME

#: Seconds between two set-points, as the robot file's ``policy.rate``.
PERIOD = 0.05

#: Measured while the expert works: how far each joint of an arm (and its gripper) stays behind its
#: set-point, in steps of the set-point (the joints' friction makes them creep).
LAG = np.array([2.3, 0.6, 0.2, 0.1, 0.15, 0.1, 1.1])

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ExpertSettings:
    """Lengths in m, angles in rad, times in s.

    travel: height of the tip above the grasp while it travels. slope: metres of height that each metre
    of horizontal distance beyond ``aligned`` allows. aside, clearance: further than this from the cube, the
    tip rises to this above the grasp before it goes sideways.
    """

    pitch: float = 1.4
    travel: float = 0.10
    slope: float = 3.0
    aligned: float = 0.008
    at_cube_xy: float = 0.012
    at_cube_z: float = 0.012
    grasp_height: float = 0.024
    lift: float = 0.16
    open: float = 0.055
    closed: float = 0.030
    finger_offset: float = 0.0224
    grip_slack: float = 0.0035
    speed: float = 0.7
    lift_speed: float = 0.12
    gain: float = 0.25
    gripper_rate: float = 0.1
    aside: float = 0.04
    clearance: float = 0.03
    put_down_speed: float = 0.2


@dataclass(frozen=True)
class ExpertState:
    """B states. set_points, joints: float64 [B, 14]; tip: [B, 3]; cube: [B, 3] centre; half: [B].

    half: half the cube's extent between the fingers, more than half an edge where it is turned (m).
    other: the same of another cube that is between the fingers, 0 where there is none.
    """

    set_points: Array
    joints: Array
    tip: Array
    cube: Array
    half: Array
    other: Array


SETTINGS = ExpertSettings()


def held(state: ExpertState, settings: ExpertSettings = SETTINGS) -> NDArray[np.bool_]:
    """Whether the gripper has closed on the cube, bool [B]."""
    closed_on = state.half + settings.finger_offset + settings.grip_slack
    return at_cube(state, settings) & (state.joints[:, 13] < closed_on)


def holds_other(state: ExpertState, settings: ExpertSettings = SETTINGS) -> NDArray[np.bool_]:
    """Whether the gripper has closed on another cube than the one asked for, bool [B]."""
    closed_on = state.other + settings.finger_offset + settings.grip_slack
    return (state.other > 0) & (state.joints[:, 13] < closed_on) & ~at_cube(state, settings)


def at_cube(state: ExpertState, settings: ExpertSettings = SETTINGS) -> NDArray[np.bool_]:
    """Whether the cube is between the fingers, bool [B]."""
    away = np.hypot(*(state.tip[:, :2] - state.cube[:, :2]).T)
    grasp = np.maximum(state.cube[:, 2], settings.grasp_height)
    # A hand that is already closing keeps on a little further out: no chatter at the edge.
    closing = state.joints[:, 13] < state.half + settings.finger_offset + 0.010
    slack = np.where(closing, 1.6, 1.0)
    near = away < settings.at_cube_xy * slack
    return near & (np.abs(state.tip[:, 2] - grasp) < settings.at_cube_z * slack)


def next_set_points(state: ExpertState, settings: ExpertSettings = SETTINGS) -> Array:
    """The set-points one period later, float64 [B, 14]."""
    arm = state.set_points[:, 7:13]
    commanded_tip = tip_of(arm)
    at, has = at_cube(state, settings), held(state, settings)

    away = np.hypot(*(state.tip[:, :2] - state.cube[:, :2]).T)
    grasp = np.maximum(state.cube[:, 2], settings.grasp_height)
    allowed = np.clip((away - settings.aligned) * settings.slope, 0.0, settings.travel)
    goal = np.concatenate([state.cube[:, :2], (grasp + allowed)[:, None]], axis=1)
    goal[at, 2] = grasp[at]
    up = np.minimum(commanded_tip[:, 2] + settings.lift_speed * PERIOD / settings.gain, settings.lift)
    lifted = np.concatenate([commanded_tip[:, :2], up[:, None]], axis=1)
    goal = np.where(has[:, None], lifted, goal)
    # Low beside another place: rise before going sideways, or the fingers would sweep the table.
    low = (away > settings.aside) & (state.tip[:, 2] < settings.grasp_height + settings.clearance)
    risen = np.concatenate([commanded_tip[:, :2], (commanded_tip[:, 2] + settings.clearance)[:, None]], axis=1)
    goal = np.where((low & ~at)[:, None], risen, goal)
    burdened = holds_other(state, settings)
    down = np.maximum(commanded_tip[:, 2] - settings.put_down_speed * PERIOD / settings.gain, settings.grasp_height)
    put_down = np.concatenate([commanded_tip[:, :2], down[:, None]], axis=1)
    goal = np.where(burdened[:, None], put_down, goal)
    at = at | (burdened & (state.tip[:, 2] > settings.grasp_height + settings.at_cube_z))

    following = state.set_points.copy()
    following[:, 7:13] = arm + _bounded(arm_to(goal, settings.pitch) - arm, settings)
    left = state.set_points[:, :6]
    following[:, :6] = left + _bounded(np.asarray(HOME[:6]) - left, settings)
    following[:, 6] = HOME[6]
    grip = np.where(at, settings.closed, settings.open) - state.set_points[:, 13]
    reach = settings.gripper_rate * PERIOD
    following[:, 13] = state.set_points[:, 13] + np.clip(grip, -reach, reach)
    return following


def _bounded(error: Array, settings: ExpertSettings) -> Array:
    """A step towards the goal: a part of the error, no joint faster than ``speed``."""
    largest = np.abs(error).max(axis=-1, keepdims=True)
    return error * np.minimum(settings.gain, settings.speed * PERIOD / np.maximum(largest, 1e-9))


def plan(state: ExpertState, horizon: int, settings: ExpertSettings = SETTINGS) -> Array:
    """The set-points now and at the periods that follow, float64 [B, horizon, 14].

    Action 0 is the state's own set-points; the rest is the expert's law on a kinematic model of the arm
    (each joint stays ``LAG`` steps behind its set-point, the gripper stops at the cube, a held cube moves
    with the tip).
    """
    plans = np.empty((len(state.half), horizon, 14))
    plans[:, 0] = state.set_points
    for k in range(1, horizon):
        plans[:, k] = next_set_points(state, settings)
        state = _advance(state, plans[:, k], settings)
    return plans


def _advance(state: ExpertState, set_points: Array, settings: ExpertSettings) -> ExpertState:
    joints = state.joints + (set_points - state.joints) / (1.0 + np.tile(LAG, 2))
    blocked = np.maximum(joints[:, 13], state.half + settings.finger_offset)
    joints[:, 13] = np.where(at_cube(state, settings), blocked, joints[:, 13])
    blocked = np.maximum(joints[:, 13], state.other + settings.finger_offset)
    joints[:, 13] = np.where(state.other > 0, blocked, joints[:, 13])
    # The measured tip differs from the joints' own where the rolls are not zero: carry the difference.
    tip = state.tip + tip_of(joints[:, 7:13]) - tip_of(state.joints[:, 7:13])
    has = held(state, settings)
    cube = np.where(has[:, None], state.cube + tip - state.tip, state.cube)
    # Another cube leaves the hand when the fingers have let it go and the hand has moved on.
    stays = holds_other(state, settings) | (np.abs(tip - state.tip).max(axis=-1) < 1e-3)
    return ExpertState(set_points, joints, tip, cube, state.half, np.where(stays, state.other, 0.0))
