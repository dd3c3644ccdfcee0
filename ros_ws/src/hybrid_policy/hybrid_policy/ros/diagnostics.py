"""The node's health as diagnostic_msgs/DiagnosticArray: inputs, inference, output, shadow check."""

from __future__ import annotations

from collections.abc import Mapping

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from hybrid_policy.control.observation_buffer import InputStatus
from hybrid_policy.control.watchdog import Fault
from hybrid_policy.models.observation import Policy
from hybrid_policy.ros.control_loop import ControlLoop
from hybrid_policy.ros.loop_state import FAILED, HOLDING, PAUSED, RUNNING
from hybrid_policy.ros.shadow import ShadowReport
from hybrid_policy.ros.times import time_message

OK, WARN, ERROR, STALE = 0, 1, 2, 3


def status(name: str, level: int, message: str, values: Mapping[str, object]) -> DiagnosticStatus:
    """One status; numbers are shown with four digits."""
    shown = [
        KeyValue(key=key, value=f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in values.items()
    ]
    return DiagnosticStatus(level=bytes([level]), name=name, message=message, values=shown)


class Diagnostics:
    """Builds the messages. prefix: the node's name; thresholds: the node's parameters ``diagnostics.*``."""

    def __init__(self, prefix: str, hardware: str, thresholds: Mapping[str, float]) -> None:
        self._prefix, self._hardware, self._thresholds = prefix, hardware, thresholds

    def array(self, now: int, statuses: list[DiagnosticStatus]) -> DiagnosticArray:
        """The message at the time ``now`` (nanoseconds)."""
        for one in statuses:
            one.name = f"{self._prefix}: {one.name}"
            one.hardware_id = self._hardware
        message = DiagnosticArray(status=statuses)
        message.header.stamp = time_message(max(0, now))
        return message

    def statuses(self, loop: ControlLoop, now: int, engine: Mapping[str, object]) -> list[DiagnosticStatus]:
        """Inputs, inference and output of a running loop."""
        faults = loop.status.faults
        inputs = loop.buffer.status(now)
        result = [self._input(one, [f for f in faults if f.source == name]) for name, one in inputs.items()]
        result.append(self._synchronisation(loop, [f for f in faults if f.source in ("inputs", "clock", "prompt")]))
        result.append(self._inference(loop, engine))
        result.append(self._output(loop))
        return result

    def _input(self, one: InputStatus, faults: list[Fault]) -> DiagnosticStatus:
        level, message = OK, "ok"
        if faults:
            level, message = ERROR, "; ".join(str(fault) for fault in faults)
        elif one.rate < self._thresholds["rate_ratio"] * one.expected_rate:
            level = WARN
            message = f"{one.rate:.1f} messages/s, expected {one.expected_rate:g} (lost, or the driver is slow)"
        values: dict[str, object] = {
            "rate": one.rate,
            "expected rate": one.expected_rate,
            "age (s)": one.age,
            "received": one.received,
        }
        values |= {f"dropped: {reason}": count for reason, count in one.drops.items()}
        return status(f"input {one.name}", level, message, values)

    def _synchronisation(self, loop: ControlLoop, faults: list[Fault]) -> DiagnosticStatus:
        values = {
            "skew (s)": loop.skew,
            "clock jumps back": loop.clock_monitor.backward_jumps,
            "clock jumps ahead": loop.clock_monitor.forward_jumps,
            "prompt": loop.buffer.prompt,
            "prompts dropped": loop.buffer.prompt_drops,
        }
        message = "; ".join(str(fault) for fault in faults) or "ok"
        return status("synchronisation", ERROR if faults else OK, message, values)

    def _inference(self, loop: ControlLoop, engine: Mapping[str, object]) -> DiagnosticStatus:
        summary = loop.recorder.summary(last=1000)
        values: dict[str, object] = dict(engine)
        for stage, one in summary.stages.items():
            values[f"{stage} p50/p95/p99/max (ms)"] = f"{one.p50:.2f}/{one.p95:.2f}/{one.p99:.2f}/{one.max:.2f}"
        values |= {
            "chunks": summary.chunks,
            "deadlines missed": summary.misses,
            "errors": loop.status.errors,
            "log lines not written": loop.recorder.unwritten,
        }
        level, message = OK, "ok"
        running = loop.inferring_seconds()
        if loop.status.errors and loop.status.state != RUNNING:
            level, message = ERROR, loop.status.last_reason or loop.status.reason
        elif running > max(1.0, 5 * loop.settings.inference_period * 1e-9):
            level, message = ERROR, f"one inference has been running for {running:.1f} s"
        elif summary.misses > self._thresholds["miss_ratio"] * max(1, summary.chunks):
            level, message = WARN, f"{summary.misses} of {summary.chunks} deadlines missed"
        elif loop.recorder.error:
            level, message = WARN, f"latency log: {loop.recorder.error}"
        return status("inference", level, message, values)

    def _output(self, loop: ControlLoop) -> DiagnosticStatus:
        state, late = loop.status, loop.control_deadline.lateness()
        listeners = loop.output.listeners()
        values: dict[str, object] = {
            "state": state.state,
            "topic": loop.output.topic,
            "subscribers": listeners,
            "chunks": state.chunks,
            "holds": state.holds,
            "last hold": state.last_reason,
            "discarded": state.discarded,
            "largest seam position (rad)": state.worst_seam.position,
            "largest seam velocity (rad/s)": state.worst_seam.velocity,
            "largest acceleration at a seam (rad/s^2)": state.worst_seam.acceleration,
            "control lateness p50/p99/max (us)": f"{late.p50:.0f}/{late.p99:.0f}/{late.max:.0f}",
            "control ticks missed": late.missed,
        }
        values |= {f"guard: {name}": count for name, count in loop.cycle.guard.counts.items()}
        level, message = OK, state.state
        if state.state in (HOLDING, FAILED):
            level, message = ERROR, f"{state.state}: {state.reason}"
        elif state.state == PAUSED:
            level, message = WARN, state.reason
        elif loop.contended:
            level, message = WARN, loop.contended
        elif state.state != RUNNING:
            level, message = WARN, f"{state.state}: {state.reason}"
        elif listeners == 0:
            level, message = WARN, f"{loop.output.topic} has no subscriber (is the controller active?)"
        elif state.worst_seam.position > self._thresholds["seam_position"]:
            level, message = (
                WARN,
                f"chunks disagree by up to {state.worst_seam.position:.3f} rad at their seams",
            )
        return status("output", level, message, values)


def shadow_status(report: ShadowReport) -> DiagnosticStatus:
    """The shadow check's own status."""
    text = report.error or f"action cosine {report.last:.5f}, smallest {report.smallest:.5f}"
    return status("shadow check", WARN if report.below or report.error else OK, text, vars(report))


def idle_status(state: str, problem: str) -> DiagnosticStatus:
    """The one status of a node that is not active."""
    level = ERROR if problem else OK if state == "inactive" else WARN
    return status("output", level, problem or state, {"state": state})


def engine_values(policy: Policy, recipe: str) -> dict[str, object]:
    """What is known of the policy that runs."""
    memory = getattr(policy, "memory_bytes", None)
    return {
        "recipe": recipe,
        "checkpoint": policy.spec.name,
        "engine": getattr(policy, "description", type(policy).__name__),
        "device memory (MiB)": (memory() if memory is not None else 0) / 2**20,
    }


def status_line(loop: ControlLoop) -> str:
    """One line for people."""
    line = loop.status.state + (f": {loop.status.reason}" if loop.status.reason else "")
    summary = loop.recorder.summary(last=100)
    total = summary.stages.get("total")
    if total is None:
        return line
    return (
        f"{line} | {summary.chunks} chunks, p50 {total.p50:.1f} ms, p99 {total.p99:.1f} ms, "
        f"{summary.misses} missed, {loop.status.holds} holds"
    )
