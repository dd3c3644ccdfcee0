"""Whether the inputs, the clock, the output and the robot can be trusted right now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.observation_buffer import JOINTS, InputStatus
from hybrid_policy.control.robot_file import Timeouts

Array = NDArray[np.float64]
#: Seconds that the robot may be away from its command before that counts.
TRACKING_PATIENCE = 0.5


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. source: an input's name, ``output`` or ``clock``; text: for people."""

    source: str
    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


class Watchdog:
    """Each input has a largest age, together a largest skew; the output has a deadline.

    output_timeout: seconds without a new chunk; 0: no such limit. future: seconds by which a stamp may
    lie ahead of the clock.
    """

    def __init__(self, timeouts: Timeouts, output_timeout: float, future: float = 0.1) -> None:
        self._timeouts, self._output_timeout, self._future = timeouts, output_timeout, future

    def inputs(self, status: Mapping[str, InputStatus]) -> list[Fault]:
        """Faults of the inputs taken one by one."""
        faults = []
        for name, one in status.items():
            limit = self._timeouts.joint_states if name == JOINTS else self._timeouts.camera
            if one.age == float("inf"):
                faults.append(Fault(name, "missing", f"{name}: nothing received yet"))
            elif one.age > limit:
                faults.append(Fault(name, "stale", f"{name}: {one.age:.2f} s old, expected at most {limit:g} s"))
            elif one.age < -self._future:
                text = f"{name}: stamped {-one.age:.2f} s in the future, expected at most {self._future:g} s"
                faults.append(Fault(name, "future", text))
            if one.frozen > 0.0:
                text = f"{name}: identical frames for {one.frozen:.2f} s while the robot moved"
                faults.append(Fault(name, "frozen", text))
        return faults

    def skew(self, stamps: Mapping[str, int]) -> list[Fault]:
        """The fault of inputs that belong together and are too far apart (stamps: nanoseconds by name)."""
        if not stamps:
            return []
        oldest, newest = min(stamps, key=stamps.__getitem__), max(stamps, key=stamps.__getitem__)
        apart = (stamps[newest] - stamps[oldest]) * 1e-9
        if apart <= self._timeouts.skew:
            return []
        text = f"inputs: {oldest} is {apart:.3f} s behind {newest}, expected at most {self._timeouts.skew:g} s"
        return [Fault("inputs", "skew", text)]

    def output(self, now: int, last_chunk: int | None) -> list[Fault]:
        """The fault of a chunk that is overdue; ``last_chunk``: when the last came into force (ns)."""
        if last_chunk is None or self._output_timeout <= 0.0:
            return []
        age = (now - last_chunk) * 1e-9
        if age <= self._output_timeout:
            return []
        text = f"output: no new chunk for {age:.2f} s, expected one within {self._output_timeout:g} s"
        return [Fault("output", "overdue", text)]


class ClockMonitor:
    """Finds jumps of the clock that stamps are held against, by a steady clock beside it.

    forward: seconds by which the clock may run ahead of the steady one between two looks. Sim time may
    run slower than the steady clock without bound, and up to ``fastest`` times as fast.
    """

    def __init__(self, forward: float = 0.5, fastest: float = 1.0) -> None:
        self._forward, self._fastest = round(forward * 1e9), fastest
        self._last: tuple[int, int] | None = None
        self.backward_jumps = 0
        self.forward_jumps = 0

    def look(self, now: int, steady: int) -> Fault | None:
        """Compare with the last look; both in nanoseconds."""
        last, self._last = self._last, (now, steady)
        if last is None or last[0] == 0:  # sim time is 0 until the first /clock message
            return None
        passed, steadily = now - last[0], steady - last[1]
        if passed < 0:
            self.backward_jumps += 1
            return Fault("clock", "backward", f"clock: went back by {-passed * 1e-9:.3f} s")
        if passed > self._fastest * steadily + self._forward:
            self.forward_jumps += 1
            ahead = (passed - steadily) * 1e-9
            return Fault("clock", "forward", f"clock: jumped ahead by {ahead:.3f} s")
        return None


class Tracking:
    """Whether the robot has been away from its command for too long: blocked, stopped, not listening.

    tolerance: rad (m) that count as away; 0: nothing does.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._since: int | None = None

    def reset(self) -> None:
        """It starts from where it is."""
        self._since = None

    def away(self, commanded: Array | None, measured: Array | None, now: int) -> bool:
        """commanded, measured: float64 [commands], None where not known; now: nanoseconds."""
        if measured is None or commanded is None or self._tolerance <= 0.0:
            return False
        if float(np.abs(measured - commanded).max()) <= self._tolerance:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return (now - self._since) * 1e-9 > TRACKING_PATIENCE
