"""Which command is due when: late actions dropped by time, seams measured and blended.

A released joint_trajectory_controller forgets the old trajectory at once and, with
``interpolate_from_desired_state``, runs a cubic from its present set point through the new points.
:class:`Trajectory` is that curve, so the timeline knows what the robot is being told at any moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: A first point nearer than this share of a period is left to the next one: a segment of a
#: millisecond has no meaning to a controller and makes accelerations of its own.
MINIMUM_LEAD = 0.25


@dataclass(frozen=True)
class Trajectory:
    """Points from ``begin`` on; a cubic Hermite curve through them, at rest at the end after it.

    begin: nanoseconds from which ``times`` count.
    times: float64 [points], seconds, above 0, increasing (``time_from_start``).
    positions, velocities: float64 [points, commands]; the last velocity is 0.
    start_position, start_velocity: float64 [commands], the command at ``begin``.
    """

    begin: int
    times: Array
    positions: Array
    velocities: Array
    start_position: Array
    start_velocity: Array

    @classmethod
    def hold(cls, now: int, position: Array) -> Trajectory:
        """Stay at ``position`` (float64 [commands])."""
        still = np.zeros_like(position)
        return cls(now, np.zeros(1), position[None], still[None], position, still)

    @property
    def end(self) -> int:
        """Nanoseconds at which the last point is due."""
        return self.begin + round(float(self.times[-1]) * 1e9)

    @cached_property
    def _knots(self) -> tuple[Array, Array, Array]:
        return (
            np.concatenate(([0.0], self.times)),
            np.vstack((self.start_position, self.positions)),
            np.vstack((self.start_velocity, self.velocities)),
        )

    def sample(self, now: int) -> tuple[Array, Array]:
        """(position, velocity), float64 [commands] each, at ``now`` (nanoseconds)."""
        seconds = (now - self.begin) * 1e-9
        if seconds >= self.times[-1]:
            return self.positions[-1], np.zeros_like(self.positions[-1])
        times, positions, velocities = self._knots
        if seconds <= 0.0:
            return positions[0], velocities[0]
        k = int(np.searchsorted(times, seconds, side="right")) - 1
        step = times[k + 1] - times[k]
        u = (seconds - times[k]) / step
        p0, p1, v0, v1 = positions[k], positions[k + 1], velocities[k] * step, velocities[k + 1] * step
        rise = p1 - p0
        position = p0 + u * (v0 + u * (3 * rise - 2 * v0 - v1 + u * (v0 + v1 - 2 * rise)))
        velocity = (v0 + u * (2 * (3 * rise - 2 * v0 - v1) + 3 * u * (v0 + v1 - 2 * rise))) / step
        return position, velocity


@dataclass(frozen=True)
class Seam:
    """How far a new chunk and the one in force disagree at the moment of the swap, before blending.

    position: largest distance (rad) between the new action due now and the command now.
    velocity: the same of their velocities (rad/s).
    acceleration: largest acceleration (rad/s^2) asked for by the commands sent, over the blend.
    """

    position: float = 0.0
    velocity: float = 0.0
    acceleration: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A chunk cut to what is still due and blended, before the guard.

    times: float64 [points] s from now; positions: float64 [points, commands]; first: index of the
    first action kept; start_*: the command now; jump: float64 [commands], the disagreement now.
    """

    begin: int
    times: Array
    positions: Array
    first: int
    start_position: Array
    start_velocity: Array
    jump: Array
    velocity_jump: Array


def monotone_velocities(times: Array, positions: Array, start_position: Array) -> Array:
    """Velocities at the points such that no cubic between two points leaves their range.

    Central differences, limited to three times the smaller neighbouring slope and 0 at a turn
    (Fritsch and Carlson 1980, the sufficient condition for a monotone piecewise cubic); the last is 0,
    as controllers demand that end a trajectory at rest.

    times: float64 [points] s; positions: float64 [points, commands]; start_position: [commands], at 0.
    """
    steps = np.diff(times, prepend=0.0)[:, None]
    slopes = np.diff(positions, axis=0, prepend=start_position[None]) / steps
    velocities = np.zeros_like(positions)
    if len(times) > 1:
        before, after = slopes[:-1], slopes[1:]
        central = (before * steps[1:] + after * steps[:-1]) / (steps[1:] + steps[:-1])
        bound = 3.0 * np.minimum(np.abs(before), np.abs(after))
        velocities[:-1] = np.where(before * after > 0.0, np.clip(central, -bound, bound), 0.0)
    return velocities


class ChunkTimeline:
    """The command in force, and how a new chunk takes over from it.

    period: nanoseconds between two actions. blend: seconds over which a new chunk is faded in.
    """

    def __init__(self, period: int, blend: float) -> None:
        self._period, self._blend = period, blend
        self._current: Trajectory | None = None

    @property
    def current(self) -> Trajectory | None:
        """The trajectory in force; None before the first."""
        return self._current

    def sample(self, now: int) -> tuple[Array, Array] | None:
        """(position, velocity) commanded at ``now``; None before the first trajectory."""
        return None if self._current is None else self._current.sample(now)

    def plan(self, stamp: int, positions: Array, now: int, measured: Array) -> Plan | None:
        """Cut, re-base and blend a chunk that came from an observation of time ``stamp``.

        Action ``k`` is due at ``stamp + k * period``; those due before now are dropped, by time. What
        is left is faded in from the command in force over the blend, so that position and velocity
        are continuous.

        positions: float64 [horizon, commands]; measured: float64 [commands], where the robot is: the
        start where nothing has been commanded yet. None: every action is late.
        """
        horizon = len(positions)
        lead = round(MINIMUM_LEAD * self._period)
        first = max(0, -((stamp - now - lead) // self._period))
        if first >= horizon:
            return None
        due = stamp + self._period * np.arange(first, horizon, dtype=np.int64)
        times: Array = ((due - now) * 1e-9).astype(np.float64)
        in_force = self.sample(now)
        start, speed = (measured, np.zeros_like(measured)) if in_force is None else in_force
        kept = positions[first:]

        grid = (now - stamp) / self._period
        at = int(np.clip(np.floor(grid), 0, horizon - 1))
        after = min(at + 1, horizon - 1)
        share = float(np.clip(grid - at, 0.0, 1.0))
        now_due = positions[at] + share * (positions[after] - positions[at])
        new_speed = (positions[after] - positions[at]) / (self._period * 1e-9)

        blended = kept.copy()
        if self._blend > 0.0:
            for k in range(len(times)):
                u = times[k] / self._blend
                if u >= 1.0:
                    break
                weight = u * u * (3.0 - 2.0 * u)
                old = start if self._current is None else self._current.sample(int(due[k]))[0]
                blended[k] = old + weight * (kept[k] - old)
        return Plan(now, times, blended, first, start, speed, now_due - start, new_speed - speed)

    def commit(self, trajectory: Trajectory) -> None:
        """Put a trajectory in force."""
        self._current = trajectory

    def hold(self, now: int, position: Array) -> None:
        """Put standing still at ``position`` (float64 [commands]) in force."""
        self._current = Trajectory.hold(now, position)

    def clear(self) -> None:
        """Forget everything commanded."""
        self._current = None

    def seam(self, plan: Plan, trajectory: Trajectory) -> Seam:
        """How the swap from the command in force to this trajectory looks."""
        points = max(2, int(np.searchsorted(trajectory.times, self._blend, side="right")))
        times = np.concatenate(([0.0], trajectory.times[:points]))
        path = np.vstack((trajectory.start_position, trajectory.positions[:points]))
        slopes = np.diff(path, axis=0) / np.diff(times)[:, None]
        slopes = np.vstack((trajectory.start_velocity, slopes))
        steps = np.diff(times)[:, None]
        acceleration = np.abs(np.diff(slopes, axis=0) / steps).max(initial=0.0)
        return Seam(float(np.abs(plan.jump).max()), float(np.abs(plan.velocity_jump).max()), float(acceleration))
