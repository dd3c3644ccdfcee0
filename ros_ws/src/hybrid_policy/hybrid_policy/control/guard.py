"""The last check before a command leaves: what cannot be trusted is refused, the rest is limited."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.chunk_timeline import Plan
from hybrid_policy.control.robot_file import Limits

Array = NDArray[np.float64]
_TOLERANCE = 1e-6
#: Stands for no acceleration limit: finite, so that differences of it are numbers.
_UNLIMITED = 1e12


@dataclass(frozen=True)
class GuardReport:
    """What one chunk needed: numbers of values (points x joints) that were limited, and of which joints."""

    position: int = 0
    velocity: int = 0
    acceleration: int = 0
    joints: tuple[str, ...] = ()

    @property
    def clipped(self) -> bool:
        """Whether anything was limited."""
        return bool(self.position or self.velocity or self.acceleration)

    def __str__(self) -> str:
        return (
            f"limited {self.position} positions, {self.velocity} velocities, "
            f"{self.acceleration} accelerations of {', '.join(self.joints)}"
        )


class Guard:
    """Holds every chunk against the robot's limits; ``counts`` sums up what it did.

    limits: of the commanded values. horizon, action_dim: the shape that a chunk must have.
    """

    def __init__(self, limits: Limits, horizon: int, action_dim: int) -> None:
        self._limits = limits
        self._shape = (horizon, action_dim)
        self.counts: Counter[str] = Counter()

    def refuse_chunk(self, actions: NDArray[np.floating]) -> str:
        """Why these actions ([horizon, action_dim]) must not be used at all; empty: they may."""
        reason = ""
        if tuple(actions.shape) != self._shape:
            reason = f"chunk: shape {tuple(actions.shape)} given, expected {self._shape}"
        elif not np.isfinite(actions).all():
            step, value = np.argwhere(~np.isfinite(actions))[0]
            reason = f"chunk: {actions[step, value]} given in step {step}, value {value}, expected finite numbers"
        if reason:
            self.counts["refused"] += 1
        return reason

    def refuse_jump(self, jump: Array) -> str:
        """Why a chunk may not take over: its distance (float64 [commands]) from the command now."""
        beyond = np.abs(jump) > self._limits.jump
        if not beyond.any():
            return ""
        self.counts["refused"] += 1
        worst = int(np.argmax(np.where(beyond, np.abs(jump), 0.0)))
        return (
            f"chunk: {self._limits.names[worst]} {jump[worst]:+.3f} from the command now, "
            f"expected within {self._limits.jump[worst]:g} (max_jump)"
        )

    def limit(self, plan: Plan) -> tuple[Array, GuardReport]:
        """Positions float64 [points, commands] that keep position, velocity and acceleration limits.

        Step by step from the command now: each step aims at the planned point, with a velocity
        within the limit, changed by no more than the acceleration allows, and never one that could
        not be braked before the position limit. Positions come before accelerations: a robot that
        cannot do both (limits that contradict each other) keeps the position limit. A joint that
        stands outside its limits is only led back in.
        """
        limits = self._limits
        clipped = np.minimum(np.maximum(plan.positions, limits.lower), limits.upper)
        out_of_range = np.abs(clipped - plan.positions) > _TOLERANCE
        steps = plan.times - np.concatenate(([0.0], plan.times[:-1]))
        before = np.concatenate((plan.start_position[None], clipped[:-1]))
        speeds = (clipped - before) / steps[:, None]
        rates = (speeds - np.concatenate((plan.start_velocity[None], speeds[:-1]))) / steps[:, None]
        too_fast = np.abs(speeds) > limits.velocity + _TOLERANCE
        too_sharp = np.abs(rates) > limits.acceleration + _TOLERANCE
        if too_fast.any() or too_sharp.any():
            clipped, too_fast, too_sharp = self._follow(plan, clipped, steps)
        report = self._report(out_of_range, too_fast, too_sharp)
        return clipped, report

    def _follow(self, plan: Plan, target: Array, steps: Array) -> tuple[Array, NDArray[np.bool_], NDArray[np.bool_]]:
        limits, least, most = self._limits, np.minimum, np.maximum
        acceleration = least(limits.acceleration, _UNLIMITED)
        position, speed = plan.start_position, plan.start_velocity
        lower, upper = least(limits.lower, position), most(limits.upper, position)
        shape = target.shape
        out, wanted, within, reachable = (np.empty(shape) for _ in range(4))
        for k, step in enumerate(steps.tolist()):
            room = acceleration * step
            half = 0.5 * room
            np.divide(target[k] - position, step, out=wanted[k])
            least(most(wanted[k], -limits.velocity), limits.velocity, out=within[k])
            least(most(within[k], speed - room), speed + room, out=reachable[k])
            # Steps of constant speed v brake within d if v^2 / 2a + v dt / 2 <= d.
            ahead = np.sqrt(half * half + 2.0 * acceleration * (upper - position)) - half
            behind = np.sqrt(half * half + 2.0 * acceleration * (position - lower)) - half
            moved = position + step * least(most(reachable[k], -behind), ahead)
            least(most(moved, lower), upper, out=out[k])
            speed = (out[k] - position) / step
            position = out[k]
        return out, np.abs(within - wanted) > _TOLERANCE, np.abs(reachable - within) > _TOLERANCE

    def _report(
        self,
        out_of_range: NDArray[np.bool_],
        too_fast: NDArray[np.bool_],
        too_sharp: NDArray[np.bool_],
    ) -> GuardReport:
        touched = np.logical_or.reduce(out_of_range | too_fast | too_sharp, axis=0).tolist()
        if not any(touched):
            return GuardReport()
        report = GuardReport(
            int(out_of_range.sum()),
            int(too_fast.sum()),
            int(too_sharp.sum()),
            tuple(name for name, hit in zip(self._limits.names, touched) if hit),
        )
        self.counts["position"] += report.position
        self.counts["velocity"] += report.velocity
        self.counts["acceleration"] += report.acceleration
        self.counts["chunks_limited"] += 1
        return report
