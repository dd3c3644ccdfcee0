"""A bag through the live node's own code: buffer, cycle, timeline, guard; only the clock is the bag's.

Inference starts on a fixed grid of the bag's time, sees what had arrived by then, and takes a delay that
the settings determine. So the same bag, settings and engine give the same bytes each time.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from hybrid_policy.control.observation_buffer import Snapshot
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.control.watchdog import Watchdog
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import BagMessage, BagSource
from hybrid_policy.evaluation.message_types import Decoder
from hybrid_policy.evaluation.policy_pass import PolicyPass
from hybrid_policy.evaluation.replay_record import ReplaySettings, Running, Score
from hybrid_policy.evaluation.survey import RESET, Survey, kind_of, stamp_or_zero
from hybrid_policy.models.observation import Policy


class Replay(PolicyPass):
    """Inference on a fixed grid of the bag's time. ``robot`` has the bag's cameras (``fit_robot``)."""

    def __init__(
        self,
        robot: RobotFile,
        policy: Policy,
        known: Survey,
        *,
        settings: ReplaySettings,
        recipe: str,
        score: Score,
    ) -> None:
        """Set up.

        Raises:
            InputError: the checkpoint does not fit the robot file.
        """
        super().__init__(robot, policy, known, node=settings.node, recipe=recipe, score=score)
        self._settings = settings
        self._watchdog = Watchdog(robot.timeouts, settings.node.output_timeout, settings.node.future_tolerance)
        self._delays: Iterator[int] = settings.delay.draws()
        self._step = round(1e9 / settings.node.inference_rate)
        self._resets: Counter[str] = Counter()
        self._newest: dict[str, int] = {}
        self._now = 0
        self._first: int | None = None
        self._next_start: int | None = None
        self._next_tick = 0
        self._running: Running | None = None
        self._held = False
        self._snapshot = Snapshot(missing=("everything",))
        self._last_stamp = 0

    def run(self, source: BagSource) -> Iterator[float]:
        """Replay; yields the seconds of the bag done so far. The outcome is in ``run_record``."""
        decoder = Decoder(source.topics)
        limit = self._settings.duration
        done = 0.0
        for message in source.messages(self._topics):
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
            done = max(done, (self._now - self._first) * 1e-9)
            yield done
        self._advance(self._now)
        self._finish()
        self._close(self._now)

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
        self._snapshot = Snapshot(missing=("everything",))
        self._next_start, self._now, self._held, self._last_stamp = None, 0, False, 0

    def _deliver(self, message: BagMessage, decoded: Any) -> None:
        match = self._known.match
        try:
            if message.topic == match.prompt:
                self._buffer.receive_prompt(decoded)
                return
            if stamp_or_zero(decoded) == 0:
                decoded = stamped(decoded, message.t_ns)
            if message.topic == match.joints:
                self._buffer.receive_joints(decoded)
            else:
                self._buffer.receive_image(self._roles[message.topic], decoded)
        except InputError as error:
            key = message.topic, kind_of(error)
            count, first = self.run_record.refused.get(key, (0, str(error)))
            self.run_record.refused[key] = count + 1, first
        except (AttributeError, TypeError):
            pass  # not the type that it says; the survey has said so
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
        if self._cycle.timeline.current is not None and not self._held:
            self._check(now)
        self._sample(now)

    def _check(self, now: int) -> bool:
        """Whether the inputs may be used; if not, the robot is held."""
        faults = self._watchdog.inputs(self._buffer.status(now))
        if not self._snapshot.missing:
            faults += self._watchdog.skew(self._snapshot.stamps)
        if not faults:
            self._held = False
            return True
        if not self._held:
            self._hold(now, "; ".join(str(fault) for fault in faults))
        self._held = True
        return False

    def _start(self, now: int) -> None:
        assert self._next_start is not None
        self._next_start += self._step
        if self._running is not None:
            self.run_record.missed += 1
            return
        snapshot = self._snapshot = self._buffer.snapshot()
        if snapshot.missing or not self._check(now):
            return
        if snapshot.stamps["joints"] == self._last_stamp:
            return  # as the node: nothing new to infer from
        try:
            observation = self._buffer.observe(snapshot)
        except InputError as error:
            self.run_record.damaged[str(error)] += 1
            return
        self._last_stamp = snapshot.stamps["joints"]
        noise, previous = self._cycle.prepare(observation)
        ages = {name: (now - stamp) * 1e-9 for name, stamp in snapshot.stamps.items()}
        finished = now + next(self._delays)
        self._running = Running(observation, noise, previous, now, finished, snapshot.skew, ages)

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        discard = "discarded: the robot was held during inference" if self._held else ""
        result = self._complete(running, discard)
        if result.trajectory is None and not discard:
            self._hold(running.finished, result.reason)


def stamped(message: Any, t_ns: int) -> Any:
    """The message with ``t_ns`` as its stamp."""
    header = message.header
    stamp = dataclasses.replace(header.stamp, sec=t_ns // 1_000_000_000, nanosec=t_ns % 1_000_000_000)
    return dataclasses.replace(message, header=dataclasses.replace(header, stamp=stamp))
