"""What a released joint_trajectory_controller (Humble 2.54 to Kilted 5.17) does with trajectories.

A numpy model of https://github.com/ros-controls/ros2_controllers/tree/master/joint_trajectory_controller,
kept small, so that what moves the simulated robot would move a real one:

* an accepted trajectory replaces the running one at once, whatever its stamp;
* stamp 0 starts at the controller's first sample after it; a stamp in the past skips what has elapsed,
  with no bridge; one in the future interpolates from the current state to the first point from now on;
* rejected, with the reason, and the old trajectory goes on: empty, wholly past, unknown or missing
  joints, wrong sizes, times that do not increase, NaN, or a velocity at the end (unless allowed);
* between points: linear with positions only, cubic with velocities, quintic with accelerations too;
* after the last point its position is held.

The clock is passed in, nanoseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TrajectoryPoint:
    """One point. time_from_start: ns. positions: [joints]; velocities, accelerations: [joints] or empty."""

    time_from_start: int
    positions: Sequence[float]
    velocities: Sequence[float] = ()
    accelerations: Sequence[float] = ()


@dataclass(frozen=True)
class Trajectory:
    """``trajectory_msgs/JointTrajectory`` without ROS. stamp: ns of the header, 0 = start at once."""

    joint_names: Sequence[str]
    points: Sequence[TrajectoryPoint]
    stamp: int = 0


@dataclass(frozen=True)
class ControllerOptions:
    """The controller's parameters of the same names, with its defaults since Jazzy but for the first.

    interpolate_from_desired_state: what a stream of trajectories needs; the controller's default is false.
    """

    interpolate_from_desired_state: bool = True
    allow_nonzero_velocity_at_trajectory_end: bool = False
    allow_partial_joints_goal: bool = False


@dataclass(frozen=True)
class _Knot:
    """A state at a time (ns). velocities, accelerations: None where the message had none."""

    time: int
    positions: Array
    velocities: Array | None
    accelerations: Array | None


class TrajectoryController:
    """Follows the trajectory that was accepted last.

    Args:
        joint_names: in the order of every array here.
        positions: float64 [joints], the set-points held until a trajectory arrives.
        options: the controller's parameters.
    """

    def __init__(self, joint_names: Sequence[str], positions: Array, options: ControllerOptions | None = None) -> None:
        self.joint_names = tuple(joint_names)
        self.options = options or ControllerOptions()
        self.accepted = 0
        self.rejected = 0
        self._desired = np.array(positions, np.float64)
        self._velocity = np.zeros(len(self.joint_names))
        self._acceleration = np.zeros(len(self.joint_names))
        self._pending: Trajectory | None = None
        self._knots: list[_Knot] = []

    @property
    def desired(self) -> Array:
        """float64 [joints]: the set-points of the last sample."""
        return self._desired.copy()

    @property
    def busy(self) -> bool:
        """Whether points lie ahead of the last sample."""
        return self._pending is not None or bool(self._knots)

    def receive(self, trajectory: Trajectory, now: int) -> str | None:
        """Take a trajectory at ``now`` (ns). None when it is accepted, else the reason of the rejection."""
        reason = self._refuse(trajectory, now)
        if reason is None:
            self._pending = trajectory
            self.accepted += 1
        else:
            self.rejected += 1
        return reason

    def sample(self, now: int, positions: Array, velocities: Array) -> Array:
        """The set-points at ``now`` (ns), float64 [joints].

        positions, velocities: the measured state; used where a new trajectory starts from it
        (``interpolate_from_desired_state`` false).
        """
        if self._pending is not None:
            self._start(self._pending, now, positions, velocities)
            self._pending = None
        if self._knots:
            self._follow(now)
        return self.desired

    def _refuse(self, trajectory: Trajectory, now: int) -> str | None:
        names, points = tuple(trajectory.joint_names), trajectory.points
        unknown = [name for name in names if name not in self.joint_names]
        missing = [name for name in self.joint_names if name not in names]
        if unknown:
            return f"joint_names: {', '.join(unknown)} unknown, expected {', '.join(self.joint_names)}"
        if len(set(names)) != len(names):
            return "joint_names: a name is given twice"
        if missing and not self.options.allow_partial_joints_goal:
            return f"joint_names: {', '.join(missing)} missing, and allow_partial_joints_goal is false"
        if not points or not names:
            return "points: empty, expected at least one point"
        reason = self._refuse_points(points, len(names))
        if reason is not None:
            return reason
        end = trajectory.stamp + points[-1].time_from_start
        if trajectory.stamp != 0 and end < now:
            return f"header.stamp: the last point was due {(now - end) * 1e-9:.3f} s ago"
        return None

    def _refuse_points(self, points: Sequence[TrajectoryPoint], joints: int) -> str | None:
        before = -1
        for index, point in enumerate(points):
            if point.time_from_start <= before:
                return f"points[{index}].time_from_start: {point.time_from_start} ns, expected > {before}"
            before = point.time_from_start
            for field in ("positions", "velocities", "accelerations"):
                values = np.asarray(getattr(point, field), np.float64)
                if len(values) != joints and (field == "positions" or len(values)):
                    return f"points[{index}].{field}: {len(values)} values, expected {joints}"
                if not np.isfinite(values).all():
                    return f"points[{index}].{field}: not finite"
        last = np.asarray(points[-1].velocities, np.float64)
        if not self.options.allow_nonzero_velocity_at_trajectory_end and np.abs(last).max(initial=0.0) > 1e-9:
            return "points[-1].velocities: not zero, and allow_nonzero_velocity_at_trajectory_end is false"
        return None

    def _start(self, trajectory: Trajectory, now: int, positions: Array, velocities: Array) -> None:
        start = trajectory.stamp or now
        order = np.array([self.joint_names.index(name) for name in trajectory.joint_names])
        if self.options.interpolate_from_desired_state:
            origin = _Knot(now, self.desired, self._velocity.copy(), self._acceleration.copy())
        else:
            origin = _Knot(now, np.array(positions), np.array(velocities), np.zeros_like(self._desired))
        self._knots = [origin]
        for point in trajectory.points:
            held = self._desired.copy()
            held[order] = point.positions
            self._knots.append(
                _Knot(
                    start + point.time_from_start,
                    held,
                    self._spread(order, point.velocities),
                    self._spread(order, point.accelerations),
                )
            )

    def _spread(self, order: NDArray[np.int_], values: Sequence[float]) -> Array | None:
        if not len(values):
            return None
        spread = np.zeros(len(self.joint_names))
        spread[order] = values
        return spread

    def _follow(self, now: int) -> None:
        origin, knots = self._knots[0], self._knots[1:]
        if now >= knots[-1].time:
            self._desired = knots[-1].positions.copy()
            self._velocity = np.zeros_like(self._desired)
            self._acceleration = np.zeros_like(self._desired)
            self._knots = []
            return
        after = next(i for i, knot in enumerate(knots) if knot.time > now)
        # The state at the arrival counts only before the first point: a past stamp has no bridge.
        left = origin if after == 0 else knots[after - 1]
        self._desired, self._velocity, self._acceleration = interpolate(left, knots[after], now)


def interpolate(left: _Knot, right: _Knot, now: int) -> tuple[Array, Array, Array]:
    """Positions, velocities and accelerations at ``now`` (ns) on the segment between two knots.

    The polynomial of the highest degree that both ends give boundary values for: 1, 3 or 5.
    """
    duration = (right.time - left.time) * 1e-9
    t = min(max((now - left.time) * 1e-9, 0.0), duration)  # a clock that was set back extrapolates nothing
    change = right.positions - left.positions
    if left.velocities is None or right.velocities is None:
        rate = change / duration
        return left.positions + rate * t, rate, np.zeros_like(rate)
    v0, v1 = left.velocities, right.velocities
    if left.accelerations is None or right.accelerations is None:
        coefficients = [
            left.positions,
            v0,
            (3 * change / duration - 2 * v0 - v1) / duration,
            (-2 * change / duration + v0 + v1) / duration**2,
        ]
    else:
        a0, a1 = left.accelerations, right.accelerations
        coefficients = [
            left.positions,
            v0,
            a0 / 2,
            (20 * change - (8 * v1 + 12 * v0) * duration - (3 * a0 - a1) * duration**2) / (2 * duration**3),
            (-30 * change + (14 * v1 + 16 * v0) * duration + (3 * a0 - 2 * a1) * duration**2) / (2 * duration**4),
            (12 * change - 6 * (v1 + v0) * duration + (a1 - a0) * duration**2) / (2 * duration**5),
        ]
    powers = range(len(coefficients))
    position = sum((c * t**k for k, c in zip(powers, coefficients)), np.zeros_like(change))
    velocity = sum((k * c * t ** (k - 1) for k, c in zip(powers, coefficients) if k > 0), np.zeros_like(change))
    acceleration = sum(
        (k * (k - 1) * c * t ** (k - 2) for k, c in zip(powers, coefficients) if k > 1), np.zeros_like(change)
    )
    return position, velocity, acceleration
