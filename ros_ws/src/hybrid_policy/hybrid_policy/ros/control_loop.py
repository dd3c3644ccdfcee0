"""The two threads of a running policy: one infers, one watches and commands.

On absolute deadlines the inference thread takes the newest matching inputs, runs the cycle and hands its
trajectory to the output. The control thread ticks at the robot's command rate: it looks at the clock, the
inputs and the output's age, holds the robot within one tick of a fault, and sends the ticks of outputs
that work by ticks. Whatever sends a command does so under one lock, so a hold is never overtaken by a
chunk that was inferred before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from hybrid_policy.control.chunk_record import chunk_record
from hybrid_policy.control.chunk_timeline import Seam
from hybrid_policy.control.cycle import ControlCycle, CycleResult
from hybrid_policy.control.latency import LatencyRecorder
from hybrid_policy.control.observation_buffer import ObservationBuffer, Snapshot
from hybrid_policy.control.watchdog import ClockMonitor, Fault, Tracking, Watchdog
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import ActionChunk
from hybrid_policy.ros import real_time
from hybrid_policy.ros.log import ThrottledLog
from hybrid_policy.ros.loop_state import (
    FAILED,
    FRESH,
    HOLDING,
    PATIENCE,
    PAUSED,
    RUNNING,
    STOPPED,
    WAITING,
    LoopSettings,
    LoopStatus,
)
from hybrid_policy.ros.outputs import Output
from hybrid_policy.ros.robot_hold import RobotHold


class ControlLoop:
    """Runs a :class:`ControlCycle` live.

    clock: nanoseconds of the clock that stamps are held against. on_chunk: called after each chunk with
    the result (from the inference thread). on_failed: called once when inference keeps failing.
    """

    def __init__(
        self,
        cycle: ControlCycle,
        buffer: ObservationBuffer,
        output: Output,
        watchdog: Watchdog,
        settings: LoopSettings,
        *,
        clock: Callable[[], int],
        clock_monitor: ClockMonitor,
        recorder: LatencyRecorder,
        reports: ThrottledLog,
        on_chunk: Callable[[CycleResult], None] = lambda result: None,
        on_failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.cycle, self.buffer, self.output, self.watchdog = cycle, buffer, output, watchdog
        self.settings, self.clock, self.recorder, self.reports = settings, clock, recorder, reports
        self.status = LoopStatus()
        self.contended = ""
        self.inferring_since = 0
        self.inference_deadline = real_time.PeriodicDeadline(settings.inference_period)
        self.control_deadline = real_time.PeriodicDeadline(settings.tick_period)
        self._on_chunk, self._on_failed = on_chunk, on_failed
        self.clock_monitor = clock_monitor
        self._lock = threading.RLock()
        self._stop, self._chunk_left = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._paused = False
        self._errors_in_row = 0
        self._last_stamp = 0
        self._epoch = 0
        self._last_accept: int | None = None
        self._tracking = Tracking(settings.tracking_tolerance)
        self._hold = RobotHold(cycle, buffer, output, settings.hold_tolerance, reports)
        self._snapshot = Snapshot(missing=("everything",))
        self._waited, self._patience = 0, 0.0
        if settings.wait_for_images:
            self._patience = min(PATIENCE * buffer.camera_period, settings.inference_period * 1e-9)

    # Called by the node

    def start(self) -> None:
        """Start both threads."""
        loops = {"inference": self._infer_loop, "control": self._control_loop}
        self._threads += [threading.Thread(target=target, name=name, daemon=True) for name, target in loops.items()]
        for thread in self._threads:
            thread.start()

    def stop(self, reason: str, timeout: float = 2.0) -> bool:
        """Hold, then end both threads; False when inference did not come back in time."""
        with self._lock:
            self._stop.set()
            if self.status.state != FAILED:
                self._enter_hold(reason, STOPPED)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def pause(self, paused: bool) -> None:
        """Hold until called again with False."""
        with self._lock:
            self._paused = paused
            if paused:
                self._enter_hold("paused", PAUSED)
            elif self.status.state == PAUSED:
                self._set_state(HOLDING if self.status.holds else WAITING, "resumed, waiting for a chunk")

    @property
    def skew(self) -> float:
        """Seconds between the oldest and newest of the inputs taken last."""
        return self._snapshot.skew

    def yield_to_chunk(self, seconds: float) -> None:
        """Return when the next chunk has left, ``seconds`` later at most: what can wait does not delay it then."""
        self._chunk_left.clear()
        if self.status.state == RUNNING:
            self._chunk_left.wait(seconds)

    def inferring_seconds(self) -> float:
        """For how long the present inference has been running; 0 between inferences."""
        since = self.inferring_since
        return (time.monotonic_ns() - since) * 1e-9 if since else 0.0

    def reset(self) -> None:
        """Hold, forget observations and chunks, and start afresh (also after a frozen camera)."""
        with self._lock:
            self._enter_hold("reset", HOLDING if self._last_accept is not None else WAITING)
            self._forget(before=self.clock())
            self._errors_in_row = 0

    def _forget(self, before: int) -> None:
        """Forget observations (of stamps below ``before``, also those to come) and chunks, one in flight too."""
        self._epoch += 1
        self.buffer.clear(before)
        self.cycle.reset()
        self._snapshot = Snapshot(missing=("everything",))
        self._last_stamp, self._last_accept = 0, None
        self._tracking.reset()

    # The inference thread

    def _infer_loop(self) -> None:
        slack = round(self._patience * 1e9)
        while self.inference_deadline.wait(self._stop, slack):
            try:
                self._await_images()
                self._infer_once()
            except Exception as error:
                self._failed_inference(error)

    def _await_images(self) -> None:
        """A deadline falls anywhere between two images: the next ones are newer by more than they are late."""
        begin, fresh = time.monotonic_ns(), FRESH * self.buffer.camera_period
        if self._patience > 0.0 and not self._snapshot.missing:
            self.buffer.wait_for_images(self._snapshot.stamps, fresh, self._patience)
        self._waited = time.monotonic_ns() - begin

    def _infer_once(self) -> None:
        began = time.monotonic_ns()
        with self._lock:
            epoch, snapshot = self._epoch, self.buffer.snapshot()
            self._snapshot = snapshot
        if snapshot.missing or self._paused or self.status.state == FAILED or not self.buffer.prompt:
            return
        try:
            observation = self.buffer.observe(snapshot)
        except InputError as error:
            self.reports.warn(f"decode {str(error)[:40]}", f"dropped: {error}")
            return
        if self._blocking(self._faults(self.clock())) or observation.stamp == self._last_stamp:
            return
        self._last_stamp = observation.stamp
        started = self.clock()
        noise, previous = self.cycle.prepare(observation)
        before = self.inferring_since = time.monotonic_ns()
        try:
            chunk = self.cycle.policy.infer(observation, noise, previous)
        finally:
            self.inferring_since = 0
        after = time.monotonic_ns()
        with self._lock:
            finished = self.clock()
            discard = self._why_discard(epoch)
            if discard:
                self.status.discarded += 1
                self.reports.warn("discard", f"chunk discarded: {discard}")
                result = CycleResult(observation, chunk, started, finished, reason=f"discarded: {discard}")
            else:
                if self.status.state != RUNNING:
                    self._hold.follow_robot(finished)
                result = self.cycle.accept(observation, chunk, started, finished, previous=previous, noise=noise)
                self._take(result, finished)
        done = time.monotonic_ns()
        self._errors_in_row = 0
        self._record(result, chunk, snapshot, (began, before, after, done))
        self._on_chunk(result)
        self.cycle.draw()
        self._chunk_left.set()

    def _why_discard(self, epoch: int) -> str:
        """Why a finished chunk must not be used any more; it was inferred without the lock."""
        if self._stop.is_set() or self._paused or self.status.state == FAILED:
            return "the node stopped or paused during inference"
        if self._epoch != epoch:
            return "the clock or the node was reset during inference"
        blocking = self._blocking(self._faults(self.clock()))
        return str(blocking[0]) if blocking else ""

    def _take(self, result: CycleResult, now: int) -> None:
        if result.trajectory is None:
            self._enter_hold(result.reason, HOLDING)
            self.reports.warn("refused", f"refused: {result.reason}")
            return
        self.output.chunk(result.trajectory)
        if self.output.listeners() == 0:
            # Nobody has heard it, so the robot has not moved: the next chunk starts from where it is.
            self.cycle.timeline.clear()
            self.status.unheard += 1
            self.reports.warn("unheard", f"{self.output.topic}: no subscriber (is the controller active?)")
        if result.guard.clipped:
            self.reports.warn("guard", f"guard: {result.guard}")
        if self._last_accept is not None and self.status.state == RUNNING:
            worst, seam = self.status.worst_seam, result.seam
            self.status.worst_seam = Seam(
                max(worst.position, seam.position),
                max(worst.velocity, seam.velocity),
                max(worst.acceleration, seam.acceleration),
            )
        self._last_accept = now
        self.status.chunks += 1
        self._set_state(RUNNING, "")

    def _failed_inference(self, error: Exception) -> None:
        self.status.errors += 1
        self._errors_in_row += 1
        reason = f"inference raised {type(error).__name__}: {error}"
        self.reports.error(f"inference {type(error).__name__}", reason)
        with self._lock:
            self.cycle.forget_chunks()
            self.status.last_reason = reason
            if self._stop.is_set() or self._paused or self.status.state == FAILED:
                return  # it stands already, for a reason that stays
            final = self._errors_in_row >= self.settings.max_errors
            self._enter_hold(reason, FAILED if final else HOLDING)
        if final:
            self._on_failed(f"{reason} ({self._errors_in_row} times in a row)")

    def _record(
        self, result: CycleResult, chunk: ActionChunk, snapshot: Snapshot, marks: tuple[int, int, int, int]
    ) -> None:
        record = chunk_record(
            result,
            chunk,
            snapshot,
            marks,
            number=self.recorder.chunks,
            sent=self.clock(),
            period=self.settings.inference_period,
            deadline=self.inference_deadline.next + self._waited + self.settings.inference_period,
        )
        wrote = not self.recorder.error
        self.recorder.add(record)
        if self.recorder.error and wrote:
            self.reports.error("log", f"latency_log: {self.recorder.error}; going on without it")

    # The control thread

    def _control_loop(self) -> None:
        real_time.use_fifo(self.settings.fifo_priority, lambda text: self.reports.warn("fifo", text))
        real_time.use_affinity(self.settings.cpu_affinity, lambda text: self.reports.warn("affinity", text))
        missed = 0
        while self.control_deadline.wait(self._stop):
            if self.control_deadline.missed > missed:
                count, missed = self.control_deadline.missed - missed, self.control_deadline.missed
                self.reports.warn("tick", f"control: {count} ticks missed ({missed} so far)")
            try:
                with self._lock:
                    self._tick(self.clock(), time.monotonic_ns())
            except Exception as error:
                self.reports.error("control", f"control tick raised {type(error).__name__}: {error}")

    def _tick(self, now: int, steady: int) -> None:
        if self._stop.is_set():
            return
        jump = self.clock_monitor.look(now, steady)
        if jump is not None:
            self._clock_jumped(jump)
        faults = self._faults(now)
        self.status.faults = tuple(faults)
        if self.status.state == RUNNING:
            in_force = self.cycle.timeline.sample(now)
            self._hold.commanded = None if in_force is None else in_force[0]
            if faults:
                self._enter_hold(str(faults[0]), HOLDING)
                self.reports.error(f"hold {faults[0].source} {faults[0].kind}", f"holding: {faults[0]}")
            elif self._tracking.away(self._hold.commanded, self._hold.measured(now), now):
                self._enter_hold(f"robot more than {self.settings.tracking_tolerance:g} from its command", HOLDING)
                self.reports.error("tracking", f"holding where the robot is: {self.status.reason}")
            elif self._hold.commanded is not None:
                self._send_tick(now)
        elif self.status.state == WAITING:
            self.status.reason = str(faults[0]) if faults else "waiting for the first chunk"
        elif self.status.holds:
            self._hold.repeat(now, steady)

    def _send_tick(self, now: int) -> None:
        current = self.cycle.timeline.current
        assert self._hold.commanded is not None
        if current is not None and now >= current.end and self.cycle.robot.command.interface == "twist":
            # A speed has no end of its own: past the chunk's last step it must become 0.
            self._enter_hold("the chunk ended before a new one came", HOLDING)
            return
        if current is not None:
            # The cubic of the first segment starts with the speed of before and may swing past its point.
            limits, start = self.cycle.robot.limits, current.start_position
            lowest, highest = np.minimum(limits.lower, start), np.maximum(limits.upper, start)
            self._hold.commanded = np.clip(self._hold.commanded, lowest, highest)
        self.output.tick(self._hold.commanded, now)

    def _faults(self, now: int) -> list[Fault]:
        """Everything that is wrong now."""
        faults = []
        if now <= 0:
            faults.append(Fault("clock", "missing", "clock: no /clock message yet, expected one (use_sim_time)"))
        faults += self.watchdog.inputs(self.buffer.status(now))
        if not self.buffer.prompt:
            faults.append(Fault("prompt", "missing", "prompt: none yet, expected one on its topic or parameter"))
        faults += self.watchdog.skew(self._snapshot.stamps)
        if self.contended and self.status.state == WAITING:
            faults.append(Fault("output", "contended", self.contended))
        if self.status.state in (RUNNING, HOLDING):
            faults += self.watchdog.output(now, self._last_accept)
        return faults

    @staticmethod
    def _blocking(faults: list[Fault]) -> list[Fault]:
        """Those that a new chunk would not cure."""
        return [fault for fault in faults if fault.kind != "overdue"]

    def _clock_jumped(self, jump: Fault) -> None:
        self.reports.error(f"clock {jump.kind}", f"{jump}; starting afresh")
        if self.status.state == RUNNING:
            self._enter_hold(str(jump), HOLDING)
        self._forget(before=0)

    # Holding

    def _enter_hold(self, reason: str, state: str) -> None:
        """Stop the robot where it is told to be now, and say why. Called under the lock."""
        moving = self.status.state == RUNNING
        if state == HOLDING and not moving and self._hold.commanded is None:
            state = WAITING  # nothing has ever been commanded: the conditions of a first command stay
        self._set_state(state, reason)
        self.cycle.forget_chunks()
        self.status.last_reason = reason
        if not moving:
            return
        self.status.holds += 1
        self._tracking.reset()
        self._hold.begin(self.clock())

    def _set_state(self, state: str, reason: str) -> None:
        if state != self.status.state:
            self.reports.info(f"{state}: {reason}" if reason else state)
        self.status.state, self.status.reason = state, reason
