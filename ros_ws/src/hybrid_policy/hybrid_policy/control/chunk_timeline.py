"""Which command is due when: late actions dropped by time, seams measured and faded.

A released joint_trajectory_controller forgets the old trajectory at once and, with
``interpolate_from_desired_state``, runs a cubic from its present set point through the new points.
:class:`Trajectory` is that curve, so the timeline knows what the robot is being told at any moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
            np.concatenate((self.start_position[None], self.positions)),
            np.concatenate((self.start_velocity[None], self.velocities)),
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
        return _hermite(
            times[k], times[k + 1], positions[k], positions[k + 1], velocities[k], velocities[k + 1], seconds
        )

    def sample_at(self, moments: NDArray[np.int64]) -> tuple[Array, Array]:
        """(positions, velocities), float64 [moments, commands] each, as :meth:`sample` gives them."""
        last = np.broadcast_to(self.positions[-1], (len(moments), self.positions.shape[1]))
        if self.times[-1] <= 0.0:  # standing still: no curve
            return last, np.zeros_like(last)
        seconds = ((moments - self.begin) * 1e-9)[:, None]
        over = seconds >= self.times[-1]
        times, positions, velocities = self._knots
        k = np.clip(np.searchsorted(times, seconds[:, 0], side="right") - 1, 0, len(times) - 2)
        t0, t1 = times[k][:, None], times[k + 1][:, None]
        clipped = np.maximum(seconds, 0.0)
        curve, speed = _hermite(t0, t1, positions[k], positions[k + 1], velocities[k], velocities[k + 1], clipped)
        return np.where(over, last, curve), np.where(over, 0.0, speed)


def _hermite(t0: Any, t1: Any, p0: Array, p1: Array, v0: Array, v1: Array, t: Any) -> tuple[Array, Array]:
    """Position and velocity at ``t`` of the cubic that has p0, v0 at t0 and p1, v1 at t1."""
    step = t1 - t0
    u, rise = (t - t0) / step, p1 - p0
    v0, v1 = v0 * step, v1 * step
    square, cube = 3 * rise - 2 * v0 - v1, v0 + v1 - 2 * rise
    return p0 + u * (v0 + u * (square + u * cube)), (v0 + u * (2 * square + 3 * u * cube)) / step


@dataclass(frozen=True)
class Seam:
    """How far a new chunk and the command in force disagree at the moment of the swap, before the fade.

    Both are the curve that a controller makes of them, taken at the same moment.

    position: largest distance (rad). velocity: the same of their velocities (rad/s).
    acceleration: largest acceleration (rad/s^2) asked for by the commands sent, over the blend.
    """

    position: float = 0.0
    velocity: float = 0.0
    acceleration: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A chunk cut to what is still due and faded in, before the guard.

    times: float64 [points] s from now; positions, velocities: float64 [points, commands]; first: index
    of the first action kept; start_*: the command now; jump, velocity_jump: float64 [commands], the
    disagreement now.
    """

    begin: int
    times: Array
    positions: Array
    velocities: Array
    first: int
    start_position: Array
    start_velocity: Array
    jump: Array
    velocity_jump: Array


def monotone_velocities(times: Array, positions: Array, start_position: Array, wanted: Array | None = None) -> Array:
    """Velocities at the points such that no cubic between two points leaves their range.

    The wanted ones, or central differences, limited to three times the smaller neighbouring slope and 0
    at a turn (Fritsch and Carlson 1980, the sufficient condition for a monotone piecewise cubic); the last
    is 0, as controllers demand that end a trajectory at rest.

    times: float64 [points] s; positions, wanted: float64 [points, commands], NaN in ``wanted`` where a
    central difference is to be taken; start_position: [commands], at 0.
    """
    knots, path = np.concatenate(([0.0], times)), np.concatenate((start_position[None], positions))
    steps = (knots[1:] - knots[:-1])[:, None]
    slopes = (path[1:] - path[:-1]) / steps
    velocities = np.zeros_like(positions)
    if len(times) > 1:
        before, after = slopes[:-1], slopes[1:]
        central = (before * steps[1:] + after * steps[:-1]) / (steps[1:] + steps[:-1])
        if wanted is not None:
            central = np.where(np.isnan(wanted[:-1]), central, wanted[:-1])
        bound = np.where(before * after > 0.0, 3.0 * np.minimum(np.abs(before), np.abs(after)), 0.0)
        direction = np.sign(before)
        velocities[:-1] = direction * np.minimum(np.maximum(direction * central, 0.0), bound)
    return velocities


def chunk_curve(stamp: int, positions: Array, period: int) -> Trajectory:
    """The curve through the actions of a chunk, as a controller that got all of them would run it.

    positions: float64 [horizon, commands]; action ``k`` is due at ``stamp + k * period``, nanoseconds.
    """
    if len(positions) == 1:
        return Trajectory.hold(stamp, positions[0])
    times: Array = np.arange(1, len(positions), dtype=np.float64) * (period * 1e-9)
    velocities = monotone_velocities(times, positions[1:], positions[0])
    return Trajectory(stamp, times, positions[1:], velocities, positions[0], (positions[1] - positions[0]) / times[0])


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
        """Cut, re-base and fade in a chunk that came from an observation of time ``stamp``.

        Action ``k`` is due at ``stamp + k * period``; those due before now are dropped, by time. What
        is left is faded in from the command in force over the blend: positions, and the velocities
        that belong to them. So both are continuous, and are the chunk's own after the blend and where
        it agrees with what is in force (real-time chunking). The old command goes on meanwhile:
        fading out the distance at the swap alone would be as continuous, but loses half of the
        simulator's tasks where chunks disagree much (the scripted expert, 0.4 s of delay).

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
        still = np.zeros_like(measured)
        start, speed = (measured, still) if in_force is None else in_force
        kept = positions[first:]

        curve = chunk_curve(stamp, positions, self._period)
        new_position, new_speed = curve.sample(now)
        jump, velocity_jump = new_position - start, new_speed - speed
        speeds = np.concatenate((curve.start_velocity[None], curve.velocities))[first:horizon]
        if self._blend > 0.0:
            fading = int(np.searchsorted(times, self._blend))
            u = (times[:fading] / self._blend)[:, None]
            old = (start, still) if self._current is None else self._current.sample_at(due[:fading])
            apart, speeds_apart = kept[:fading] - old[0], speeds[:fading] - old[1]
            left = 1.0 - u * u * (3.0 - 2.0 * u)
            kept, speeds = kept.copy(), speeds.copy()
            kept[:fading] -= left * apart
            speeds[:fading] += 6.0 * u * (1.0 - u) / self._blend * apart - left * speeds_apart
        return Plan(now, times, kept, speeds, first, start, speed, jump, velocity_jump)

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
        path = np.concatenate((trajectory.start_position[None], trajectory.positions[:points]))
        steps = (times[1:] - times[:-1])[:, None]
        slopes = np.concatenate((trajectory.start_velocity[None], (path[1:] - path[:-1]) / steps))
        acceleration = np.abs((slopes[1:] - slopes[:-1]) / steps).max(initial=0.0)
        return Seam(float(np.abs(plan.jump).max()), float(np.abs(plan.velocity_jump).max()), float(acceleration))
