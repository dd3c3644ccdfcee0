"""Where a robot that must stop is to stand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.robot_file import RobotFile

Array = NDArray[np.float64]
_GRIPPER = 6


def hold_position(robot: RobotFile, commanded: Array | None, measured: Array | None, tolerance: float) -> Array | None:
    """The command (float64 [commands]) that stops the robot, within its limits; None: not known.

    Positions: the command in force, which the robot is near and which does not sag under load; where
    the robot stands if it is further than ``tolerance`` (rad, m) from the command (blocked, stopped from
    outside). A twist: 0, the gripper as it was commanded.

    commanded, measured: float64 [commands], None where not known or not fresh.
    """
    limits = robot.limits
    if robot.command.interface == "twist":
        still = np.zeros(len(limits.names))
        if len(still) > _GRIPPER:
            if commanded is None:
                return None
            still[_GRIPPER] = commanded[_GRIPPER]
        return still
    position = commanded
    if commanded is None or (measured is not None and np.abs(measured - commanded).max() > tolerance):
        position = measured
    return None if position is None else np.clip(position, limits.lower, limits.upper)
