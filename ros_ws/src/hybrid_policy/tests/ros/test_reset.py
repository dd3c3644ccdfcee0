"""A reset at any moment of an inference: what was seen before it never moves the robot."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hybrid_policy.control.cycle import ControlCycle, CycleSettings
from hybrid_policy.control.latency import LatencyRecorder
from hybrid_policy.control.observation_buffer import ObservationBuffer, Snapshot
from hybrid_policy.control.watchdog import ClockMonitor, Watchdog
from hybrid_policy.models.observation import ActionChunk, Observation

from ..control.synthetic import TWO_JOINTS, RampPolicy, image, joint_state, robot  # isort: skip

if importlib.util.find_spec("rclpy") is None:
    pytest.skip("rclpy is not installed", allow_module_level=True)

from hybrid_policy.ros.control_loop import ControlLoop
from hybrid_policy.ros.log import ThrottledLog
from hybrid_policy.ros.loop_state import LoopSettings

SETTINGS = LoopSettings(20_000_000, 20_000_000, hold_tolerance=0.2, tracking_tolerance=0.0, max_errors=3)


class Once:
    """Runs what it is given at its first call."""

    def __init__(self) -> None:
        self.action: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        action, self.action = self.action, lambda: None
        action()


class HookedBuffer(ObservationBuffer):
    """Something happens between the choice of messages and their decoding."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.meanwhile = Once()

    def observe(self, snapshot: Snapshot) -> Observation:
        self.meanwhile()
        return super().observe(snapshot)


class HookedPolicy(RampPolicy):
    """Something happens during inference."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.meanwhile = Once()

    def infer(self, observation: Observation, noise: Any = None, previous: Any = None) -> ActionChunk:
        self.meanwhile()
        return super().infer(observation, noise, previous)


class Commands:
    """Stands for an output with one listener: keeps where joint a of each chunk would have started."""

    topic = "commands"

    def __init__(self, a: int) -> None:
        self.starts: list[float] = []
        self._a = a

    def chunk(self, trajectory: Any) -> None:
        self.starts.append(float(trajectory.start_position[self._a]))

    def hold(self, position: Any, now: int) -> None:
        """Not looked at."""

    def tick(self, position: Any, now: int) -> None:
        """Not looked at."""

    def listeners(self) -> int:
        return 1


class Silent:
    """A logger that nobody reads."""

    def info(self, text: str) -> None:
        """Say nothing."""

    warning = error = info


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.002)


@pytest.mark.parametrize("moment", ["before", "during"])
def test_what_was_seen_before_a_reset_is_discarded(tmp_path: Path, moment: str) -> None:
    two = robot(tmp_path, TWO_JOINTS)
    buffer, policy = HookedBuffer(two, two.cameras), HookedPolicy(two)
    sent = Commands(two.command_names.index("a"))
    loop = ControlLoop(
        ControlCycle(two, policy, CycleSettings()),
        buffer,
        sent,  # type: ignore[arg-type]
        Watchdog(two.timeouts, 0.0, 0.1),
        SETTINGS,
        clock=time.time_ns,
        clock_monitor=ClockMonitor(),
        recorder=LatencyRecorder(),
        reports=ThrottledLog(Silent()),
    )

    def show(position: float, stamp: int) -> None:
        buffer.receive_image("cam", image(stamp))
        buffer.receive_joints(joint_state(stamp, ["a", "b"], [position, 0.05]))

    def reset() -> None:
        loop.reset()
        show(0.1, seen + 1)  # had been on its way
        show(0.3, time.time_ns())

    hook = buffer.meanwhile if moment == "before" else policy.meanwhile
    hook.action = reset
    seen = time.time_ns()
    show(0.1, seen)
    loop.start()
    try:
        until(lambda: bool(sent.starts))
        assert loop.status.discarded == 1
        assert sent.starts[0] == pytest.approx(0.3)
    finally:
        assert loop.stop("the end of the test")
