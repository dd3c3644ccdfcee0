"""A bag through the live node's own code: buffer, cycle, timeline, guard; only the clock is the bag's.

Inference starts on a fixed grid of the bag's time, sees what had arrived by then, and takes a delay that
the settings determine. So the same bag, settings and engine give the same bytes each time.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.cycle import ControlCycle, CycleResult, CycleSettings
from hybrid_policy.control.observation_buffer import ObservationBuffer
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.control.watchdog import Watchdog
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import BagMessage, BagSource
from hybrid_policy.evaluation.delays import DelayModel
from hybrid_policy.evaluation.message_types import Decoder
from hybrid_policy.evaluation.survey import RESET, Survey, stamp_or_zero
from hybrid_policy.models.observation import Continuation, Observation, Policy

_WORST = 4
_THUMBNAIL = 240


@dataclass(frozen=True)
class ReplaySettings:
    """What determines a replay.

    rate: inferences per second of the bag's time; one that takes longer than a period misses the next
        starts, as in the node. delay: of each inference. cycle: chunking, blend, seed.
    duration: seconds to replay at most; 0: all.
    """

    rate: float = 5.0
    delay: DelayModel = field(default_factory=DelayModel)
    cycle: CycleSettings = field(default_factory=CycleSettings)
    duration: float = 0.0


@dataclass(frozen=True)
class ReplayedChunk:
    """One inference. Times are nanoseconds on the bag's clock.

    actions: float32 [horizon, action_dim]. commands: float64 [horizon, commands].
    joints: float64 [joints], where the robot was. ages: input -> seconds since its stamp at the start.
    timings: seconds by stage on this machine, ``infer`` the whole call; they differ between runs.
    segment: resets of the clock before it.
    """

    number: int
    stamp: int
    started: int
    finished: int
    segment: int
    actions: NDArray[np.float32]
    commands: NDArray[np.float64]
    joints: NDArray[np.float64]
    accepted: bool
    reason: str
    seam: tuple[float, float, float]
    clipped: tuple[int, int, int]
    clipped_joints: tuple[str, ...]
    skew: float
    ages: dict[str, float]
    prompt: str
    continued: bool
    timings: dict[str, float]


@dataclass(frozen=True)
class Moment:
    """A chunk worth looking at: its number, how bad it was, small pictures by camera name."""

    score: float
    number: int
    pictures: dict[str, NDArray[np.uint8]]


@dataclass
class RecipeRun:
    """One recipe's pass over one bag.

    executed_times, executed: int64 [ticks], float64 [ticks, commands]: what the robot would have been
        told, at the policy's rate. holds: (time, reason) of each time the robot would have been held.
    """

    recipe: str
    chunks: list[ReplayedChunk] = field(default_factory=list)
    executed_times: list[int] = field(default_factory=list)
    executed: list[NDArray[np.float64]] = field(default_factory=list)
    executed_segments: list[int] = field(default_factory=list)
    holds: list[tuple[int, str]] = field(default_factory=list)
    damaged: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    drops: dict[str, dict[str, int]] = field(default_factory=dict)
    worst: list[Moment] = field(default_factory=list)


#: (chunk) -> how bad it was; larger is worse, NaN where unknown.
Score = Callable[[ReplayedChunk], float]


@dataclass(frozen=True)
class _Running:
    """An inference between its start and its end."""

    observation: Observation
    noise: NDArray[np.float32]
    previous: Continuation | None
    started: int
    finished: int
    skew: float
    ages: dict[str, float]


class Replay:
    """One pass. ``robot`` has the cameras that the bag has (see :func:`fit_robot`)."""

    def __init__(
        self, robot: RobotFile, policy: Policy, known: Survey, settings: ReplaySettings, recipe: str, score: Score
    ) -> None:
        """Set up cycle and buffer.

        Raises:
            InputError: the checkpoint does not fit the robot file, or the rate is not positive.
        """
        if settings.rate <= 0.0:
            raise InputError(f"--rate: {settings.rate} given, expected inferences per second above 0")
        self._robot, self._policy, self._known, self._settings = robot, policy, known, settings
        self._cycle = ControlCycle(robot, policy, settings.cycle)
        self._buffer = ObservationBuffer(robot, robot.policy_cameras(policy.spec))
        self._watchdog = Watchdog(robot.timeouts, output_timeout=0.0)
        self._delays: Iterator[int] = settings.delay.draws()
        self._step = round(1e9 / settings.rate)
        self._score = score
        self._roles = {
            topic: name for name, (topic, _) in known.match.cameras.items() if name in policy.spec.cameras
        }
        self._resets: Counter[str] = Counter()
        self._newest: dict[str, int] = {}
        self._segment = 0
        self._now = 0
        self._first: int | None = None
        self._next_start: int | None = None
        self._next_tick = 0
        self._running: _Running | None = None
        self._held = False
        self._heap: list[tuple[float, int, Moment]] = []
        self.run_record = RecipeRun(recipe)

    def run(self, source: BagSource) -> Iterator[float]:
        """Replay; yields the seconds of the bag done so far. The outcome is in ``run_record``."""
        decoder = Decoder(source.topics)
        match = self._known.match
        wanted = {*self._roles, match.joints, match.prompt} - {""}
        limit = self._settings.duration
        for message in source.messages(wanted):
            try:
                decoded = decoder.decode(message)
            except InputError:
                continue  # the survey has said so
            arrival = self._arrival(message, decoded)
            self._first = arrival if self._first is None else self._first
            if limit and (arrival - self._first) * 1e-9 > limit:
                break
            self._advance(arrival - 1)
            self._now = max(self._now, arrival)
            self._deliver(message, decoded)
            yield (self._now - self._first) * 1e-9
        self._advance(self._now)
        self._finish()
        record = self.run_record
        status = self._buffer.status(self._now)
        record.drops = {name: dict(one.drops) for name, one in status.items() if one.drops}
        record.worst = [moment for _, _, moment in sorted(self._heap, reverse=True)]

    def _arrival(self, message: BagMessage, decoded: Any) -> int:
        """When this message arrives by the replay's clock; a clock that was set back starts afresh."""
        stamp = stamp_or_zero(decoded)
        newest = self._newest.get(message.topic, 0)
        if stamp and stamp < newest - RESET:
            self._resets[message.topic] += 1
            if self._resets[message.topic] > self._segment:
                self._restart(self._resets[message.topic])
        if stamp:
            self._newest[message.topic] = stamp
        if self._known.clock == "record":
            return message.t_ns
        return max(stamp, self._now)

    def _restart(self, segment: int) -> None:
        self._advance(self._now)
        self._finish()
        self._segment = segment
        self._buffer.clear()
        self._cycle.reset()
        self._next_start, self._now, self._held = None, 0, False

    def _deliver(self, message: BagMessage, decoded: Any) -> None:
        match = self._known.match
        try:
            if message.topic == match.prompt:
                self._buffer.receive_prompt(decoded)
                return
            if stamp_or_zero(decoded) == 0:
                decoded = _stamped(decoded, message.t_ns)
            if message.topic == match.joints:
                self._buffer.receive_joints(decoded)
            else:
                self._buffer.receive_image(self._roles[message.topic], decoded)
        except InputError:
            pass  # the buffer counts what it drops, and the report shows the counts
        if self._next_start is None and not self._buffer.snapshot().missing:
            self._next_start = self._next_tick = self._now

    def _advance(self, until: int) -> None:
        """Everything that happens up to and including ``until``, in order."""
        while self._next_start is not None:
            done = self._running.finished if self._running is not None else None
            due = min(t for t in (self._next_start, self._next_tick, done) if t is not None)
            if due > until:
                return
            if due == done:
                self._finish()
            elif due == self._next_tick:
                self._tick(due)
                self._next_tick += self._robot.period
            else:
                self._start(due)

    def _tick(self, now: int) -> None:
        """What the robot is told now; the watchdog looks at each tick, as in the node."""
        sample = self._cycle.timeline.sample(now)
        if sample is None:
            return
        if not self._held:
            self._check(now)
            sample = self._cycle.timeline.sample(now) or sample
        record = self.run_record
        record.executed_times.append(now)
        record.executed.append(sample[0])
        record.executed_segments.append(self._segment)

    def _check(self, now: int) -> bool:
        """Whether the inputs may be used; if not, the robot is held."""
        faults = self._watchdog.inputs(self._buffer.status(now))
        snapshot = self._buffer.snapshot()
        if not snapshot.missing:
            faults += self._watchdog.skew(snapshot.skew)
        if not faults:
            self._held = False
            return True
        newest = self._buffer.newest_joints()
        if not self._held and newest is not None:
            self.run_record.holds.append((now, "; ".join(str(fault) for fault in faults)))
            if self._robot.timeouts.action == "hold":
                index = self._robot.command_index
                self._cycle.hold(now, newest[1][index] if len(index) else np.zeros(len(self._robot.command_names)))
        self._held = True
        return False

    def _start(self, now: int) -> None:
        assert self._next_start is not None
        self._next_start += self._step
        if self._running is not None:
            self.run_record.missed += 1
            return
        if not self._check(now):
            return
        snapshot = self._buffer.snapshot()
        try:
            observation = self._buffer.observe(snapshot)
        except InputError as error:
            self.run_record.damaged[str(error)] += 1
            return
        noise, previous = self._cycle.prepare(observation)
        ages = {name: (now - stamp) * 1e-9 for name, stamp in snapshot.stamps.items()}
        self._running = _Running(
            observation, noise, previous, now, now + next(self._delays), snapshot.skew, ages
        )

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        began = time.perf_counter()
        chunk = self._policy.infer(running.observation, running.noise, running.previous)
        spent = time.perf_counter() - began
        result = self._cycle.accept(
            running.observation, chunk, running.started, running.finished,
            previous=running.previous, noise=running.noise,
        )  # fmt: skip
        record = self.run_record
        replayed = self._record(result, running, spent, len(record.chunks))
        record.chunks.append(replayed)
        if not result.trajectory:
            record.holds.append((running.finished, result.reason))
            newest = self._buffer.newest_joints()
            if newest is not None and len(self._robot.command_index):
                self._cycle.hold(running.finished, newest[1][self._robot.command_index])
        self._remember(replayed, running.observation)

    def _record(self, result: CycleResult, running: _Running, spent: float, number: int) -> ReplayedChunk:
        chunk, seam, guard = result.chunk, result.seam, result.guard
        return ReplayedChunk(
            number=number,
            stamp=chunk.stamp,
            started=running.started,
            finished=running.finished,
            segment=self._segment,
            actions=chunk.actions,
            commands=self._robot.commands(chunk.actions),
            joints=running.observation.joints,
            accepted=result.trajectory is not None,
            reason=result.reason,
            seam=(seam.position, seam.velocity, seam.acceleration),
            clipped=(guard.position, guard.velocity, guard.acceleration),
            clipped_joints=guard.joints,
            skew=running.skew,
            ages=running.ages,
            prompt=running.observation.prompt,
            continued=running.previous is not None,
            timings={**{k: float(v) for k, v in chunk.timings.items()}, "infer": spent},
        )

    def _remember(self, chunk: ReplayedChunk, observation: Observation) -> None:
        """Keep small pictures of the worst moments: which they are is known only at the end."""
        score = self._score(chunk)
        if not np.isfinite(score):
            return
        if len(self._heap) == _WORST and score <= self._heap[0][0]:
            return
        pictures = {name: thumbnail(pixels) for name, pixels in observation.images.items()}
        entry = (score, -chunk.number, Moment(score, chunk.number, pictures))
        if len(self._heap) < _WORST:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heapreplace(self._heap, entry)


def thumbnail(pixels: NDArray[np.uint8], width: int = _THUMBNAIL) -> NDArray[np.uint8]:
    """uint8 [h, width, 3] of a larger picture."""
    import cv2

    height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def fit_robot(robot: RobotFile, known: Survey) -> RobotFile:
    """The robot file with its cameras as the bag has them: raw or compressed."""
    found = {name: camera for name, (_, camera) in known.match.cameras.items()}
    return dataclasses.replace(robot, cameras=tuple(found.get(c.name, c) for c in robot.cameras))


def _stamped(message: Any, t_ns: int) -> Any:
    """The message with ``t_ns`` as its stamp."""
    header = message.header
    stamp = dataclasses.replace(header.stamp, sec=t_ns // 1_000_000_000, nanosec=t_ns % 1_000_000_000)
    return dataclasses.replace(message, header=dataclasses.replace(header, stamp=stamp))
