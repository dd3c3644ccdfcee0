"""A bag whose joints the robot file does not know: what can be said of it by its own names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hybrid_policy.control.robot_file import Joint, RobotFile
from hybrid_policy.evaluation.bag import BagSource
from hybrid_policy.evaluation.survey import Survey, survey
from hybrid_policy.evaluation.topic_match import TopicMatch


def by_own_names(source: BagSource, robot: RobotFile, known: Survey) -> tuple[Survey, RobotFile] | None:
    """The survey with a robot file made of the bag's joint names, without limits; None where it has none.

    Joint rates, gaps and tracking of the recorded commands need no policy and no robot file. The result
    says nothing of what a policy would do.
    """
    if not known.joint_names or len(known.joints) or not known.match.joints:
        return None
    names = known.joint_names
    stand_in = replace(
        robot,
        joints=tuple(Joint(name) for name in names),
        state_names=names,
        action_names=names,
        conventions={},
        command=replace(robot.command, interface="joint_trajectory", gripper=None),
    )
    match = TopicMatch({}, known.match.joints, "", known.match.command)
    own = survey(source, stand_in, match)
    if not len(own.joints):
        return None
    return own, stand_in


def sketch(robot: RobotFile, own: Survey) -> str:
    """The joints' section of a robot file for this bag; the limits are those that the bag reached."""
    lines = ["joints:  # min and max are what this bag reached: widen them to the robot's own limits"]
    low, high = own.joints.min(axis=0), own.joints.max(axis=0)
    times = own.joint_times * 1e-9
    order = np.argsort(times, kind="stable")
    steps = np.diff(times[order])
    moved = np.abs(np.diff(own.joints[order], axis=0))[steps > 0] / steps[steps > 0][:, None]
    fastest = moved.max(axis=0) if len(moved) else np.zeros(len(low))
    for i, joint in enumerate(robot.joints):
        lines.append(
            f"  - {{name: {joint.name}, min: {low[i] - 0.05:.3f}, max: {high[i] + 0.05:.3f}, "
            f"max_velocity: {max(1.5 * fastest[i], 0.1):.2f}}}"
        )
    return "\n".join(lines) + "\n"
