"""One inference cycle, without ROS: observation -> policy -> timeline -> guard -> trajectory points.

The node runs it live and a replay runs it over a bag; the only difference is the clock passed in. With
``policy`` anything that has ``spec`` and ``infer`` (``runtime.Engine``, or a test's)::

    cycle = ControlCycle(robot, policy, CycleSettings(chunking="rtc"))
    result = cycle.run(observation, clock)      # clock() -> nanoseconds, asked before and after inference
    if result.trajectory is not None:
        ...                                     # times, positions, velocities: a JointTrajectory's points
    else:
        cycle.hold(now, position)               # refused: result.reason says why

A replay with a deterministic delay passes a clock that gives ``start`` first and ``start + delay`` then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.chunk_timeline import ChunkTimeline, Seam, Trajectory, monotone_velocities
from hybrid_policy.control.ensembling import TemporalEnsemble
from hybrid_policy.control.guard import Guard, GuardReport
from hybrid_policy.control.robot_file import RobotFile, check_fit
from hybrid_policy.control.rtc import DelayEstimator, continuation, delay_steps
from hybrid_policy.models.observation import ActionChunk, Continuation, Observation, Policy

CHUNKING = ("rtc", "ensemble", "off")
#: rad (m): a point that the guard moved by less than this is the one that was planned.
_SAME = 1e-6


@dataclass(frozen=True)
class CycleSettings:
    """How chunks follow each other.

    chunking: ``rtc`` (the engine continues the previous chunk), ``ensemble`` (averages) or ``off``.
    blend: seconds over which a new chunk is faded in from the command in force; 0: not at all.
    ensemble_weight: m of temporal ensembling. delay_window: recent delays that count.
    cold_starts: accepted chunks after a reset whose delay does not enter the estimate (it stands in
        until there is another).
    seed: of the noise that the flow starts from; the n-th inference gets the n-th draw.
    """

    chunking: str = "rtc"
    blend: float = 0.2
    ensemble_weight: float = 0.01
    delay_window: int = 10
    cold_starts: int = 1
    seed: int = 0


@dataclass(frozen=True)
class CycleResult:
    """What one inference gave.

    trajectory: the points to send, or None: refused, and ``reason`` says why.
    started, finished: nanoseconds before and after inference, by the clock passed in.
    first: index of the first action kept. first_due: nanoseconds at which it is due.
    """

    observation: Observation
    chunk: ActionChunk
    started: int
    finished: int
    trajectory: Trajectory | None = None
    reason: str = ""
    first: int = 0
    first_due: int = 0
    previous: Continuation | None = None
    seam: Seam = field(default_factory=Seam)
    guard: GuardReport = field(default_factory=GuardReport)
    noise: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))


class ControlCycle:
    """Runs a policy for a robot; deterministic for the same observations, clock and seed.

    Raises:
        InputError: the checkpoint does not fit the robot file (on construction).
    """

    def __init__(self, robot: RobotFile, policy: Policy, settings: CycleSettings) -> None:
        check_fit(robot, policy.spec)
        if settings.chunking not in CHUNKING:
            raise ValueError(f"chunking {settings.chunking}, expected one of {', '.join(CHUNKING)}")
        self.robot, self.policy, self.settings = robot, policy, settings
        spec = policy.spec
        self.timeline = ChunkTimeline(robot.period, settings.blend)
        self.guard = Guard(robot.limits, spec.horizon, spec.action_dim)
        self.delays = DelayEstimator(settings.delay_window)
        self._ensemble = TemporalEnsemble(robot.period, settings.ensemble_weight)
        self._random = np.random.default_rng(settings.seed)
        self._noise: NDArray[np.float32] | None = None
        self._previous: ActionChunk | None = None
        self._accepted = 0
        self._cold: int | None = None

    def reset(self) -> None:
        """Forget chunks, delays and commands (after a clock jump, a pause or a new episode)."""
        self.timeline.clear()
        self.delays.clear()
        self.forget_chunks()
        self._accepted, self._cold = 0, None

    def forget_chunks(self) -> None:
        """Start the next chunk without regard to earlier ones; delays stay known."""
        self._ensemble.clear()
        self._previous = None

    def hold(self, now: int, position: NDArray[np.float64]) -> Trajectory:
        """Stand still at ``position`` (float64 [commands]); the next chunk starts afresh from there."""
        self.forget_chunks()
        self.timeline.hold(now, position)
        return Trajectory.hold(now, position)

    def draw(self) -> None:
        """Draw the next inference's noise, unless it is drawn: between two inferences it costs no latency."""
        if self._noise is None:
            spec = self.policy.spec
            self._noise = self._random.standard_normal((spec.horizon, spec.max_action_dim), dtype=np.float32)

    def prepare(self, observation: Observation) -> tuple[NDArray[np.float32], Continuation | None]:
        """(noise float32 [horizon, max_action_dim], continuation) for the inference on an observation."""
        self.draw()
        noise, self._noise = self._noise, None
        assert noise is not None
        previous = None
        delay = self.delays.steps(self.robot.period)
        if delay is None and self._cold is not None:
            delay = delay_steps(self._cold, self.robot.period)
        if self.settings.chunking == "rtc" and self._previous is not None and delay is not None:
            previous = continuation(self._previous, observation.stamp, self.robot.period, delay)
        return noise, previous

    def run(self, observation: Observation, clock: Callable[[], int]) -> CycleResult:
        """Infer and plan. What the policy raises is not caught."""
        started = clock()
        noise, previous = self.prepare(observation)
        chunk = self.policy.infer(observation, noise, previous)
        return self.accept(observation, chunk, started, clock(), previous=previous, noise=noise)

    def accept(
        self,
        observation: Observation,
        chunk: ActionChunk,
        started: int,
        now: int,
        *,
        previous: Continuation | None = None,
        noise: NDArray[np.float32] | None = None,
    ) -> CycleResult:
        """Put a chunk in force from ``now`` on, or refuse it; the timeline changes only if accepted."""
        kept = noise if noise is not None else np.empty(0, np.float32)

        def refused(reason: str) -> CycleResult:
            self.forget_chunks()
            return CycleResult(observation, chunk, started, now, reason=reason, previous=previous, noise=kept)

        reason = self.guard.refuse_chunk(chunk.actions)
        if reason:
            return refused(reason)
        commands = self.robot.commands(chunk.actions)
        if self.settings.chunking == "ensemble":
            commands = self._ensemble.add(chunk.stamp, commands)
        plan = self.timeline.plan(chunk.stamp, commands, now, self.measured(observation))
        if plan is None:
            self.guard.counts["late"] += 1
            late = (now - chunk.stamp) * 1e-9
            return refused(
                f"chunk: finished {late:.3f} s after its observation, expected less than its "
                f"{len(commands)} steps of {self.robot.period * 1e-9:g} s"
            )
        reason = self.guard.refuse_jump(plan.jump)
        if reason:
            return refused(reason)
        positions, report = self.guard.limit(plan)
        wanted, fastest = plan.velocities, self.robot.limits.velocity
        if report.clipped:  # where the guard has moved a point, the velocity planned for it means nothing any more
            wanted = np.where(np.abs(positions - plan.positions) < _SAME, wanted, np.nan)
        velocities = monotone_velocities(plan.times, positions, plan.start_position, wanted)
        velocities = np.minimum(np.maximum(velocities, -fastest), fastest)
        trajectory = Trajectory(plan.begin, plan.times, positions, velocities, plan.start_position, plan.start_velocity)
        seam = self.timeline.seam(plan, trajectory)
        self.timeline.commit(trajectory)
        self._previous = chunk
        if self._accepted >= self.settings.cold_starts:
            self.delays.push(now - chunk.stamp)
        else:
            self._cold = now - chunk.stamp
        self._accepted += 1
        return CycleResult(
            observation,
            chunk,
            started,
            now,
            trajectory,
            first=plan.first,
            first_due=chunk.stamp + plan.first * self.robot.period,
            previous=previous,
            seam=seam,
            guard=report,
            noise=kept,
        )

    def measured(self, observation: Observation) -> NDArray[np.float64]:
        """float64 [commands]: where the robot is, in the commands' terms (0 for a twist: standing still)."""
        if self.robot.command.interface == "twist":
            return np.zeros(len(self.robot.command_names))
        return observation.joints[self.robot.command_index]
