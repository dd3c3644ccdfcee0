"""Stopping the robot and keeping it where it stopped."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.cycle import ControlCycle
from hybrid_policy.control.hold import hold_position
from hybrid_policy.control.observation_buffer import ObservationBuffer
from hybrid_policy.ros.log import ThrottledLog
from hybrid_policy.ros.loop_state import HOLD_REPEAT
from hybrid_policy.ros.outputs import Output


class RobotHold:
    """What the robot is told to be at, and the commands that keep it there. Not locked: the loop's lock serves.

    commanded: float64 [commands], the command in force; None before the first.
    tolerance: rad (m), see :func:`hybrid_policy.control.hold.hold_position`.
    Times are nanoseconds, ``now`` by the clock of the stamps, ``steady`` by the monotonic one.
    """

    def __init__(
        self,
        cycle: ControlCycle,
        buffer: ObservationBuffer,
        output: Output,
        tolerance: float,
        reports: ThrottledLog,
    ) -> None:
        self.commanded: NDArray[np.float64] | None = None
        self._cycle, self._buffer, self._output = cycle, buffer, output
        self._robot, self._tolerance, self._reports = cycle.robot, tolerance, reports
        self._twist = cycle.robot.command.interface == "twist"
        self._sends = cycle.robot.timeouts.action != "none"
        self._last = 0

    def measured(self, now: int) -> NDArray[np.float64] | None:
        """float64 [commands]: where the robot is, if known and fresh; None for a twist."""
        newest = self._buffer.newest_joints()
        if self._twist or newest is None or abs(now - newest[0]) > self._robot.timeouts.joint_states * 1e9:
            return None
        return newest[1][self._robot.command_index]

    def begin(self, now: int) -> None:
        """Stop the robot where it is told to be now, or where it is (``timeouts.action`` none: send nothing)."""
        if not self._sends:
            return
        measured = self.measured(now)
        if measured is None:
            measured = self._seen_away()
        position = hold_position(self._robot, self.commanded, measured, self._tolerance)
        if position is None:
            self._reports.error("hold", "cannot hold: the robot's position is not known, nothing sent")
            return
        self.commanded = position
        self._cycle.hold(now, position)
        self._output.hold(position, now)
        self._last = time.monotonic_ns()

    def _seen_away(self) -> NDArray[np.float64] | None:
        """float64 [commands]: where the robot was last seen, if that was not where it had been told to be then.

        A robot that did not follow its command (blocked) must not be sent to it when joint states stop or the
        clock jumps; one that followed has gone on with its command since.
        """
        newest = self._buffer.newest_joints()
        if self._twist or newest is None:
            return None
        stamp, seen = newest[0], newest[1][self._robot.command_index]
        told = self._cycle.timeline.sample(stamp)
        return seen if told is not None and np.abs(seen - told[0]).max() > self._tolerance else None

    def repeat(self, now: int, steady: int) -> None:
        """Send the hold again, each tick or each `HOLD_REPEAT`, while it is known where the robot is."""
        if self.commanded is None or not self._sends:
            return
        interval = HOLD_REPEAT if self._robot.command.interface == "joint_trajectory" else 0.0
        if (steady - self._last) * 1e-9 < interval:
            return
        self._last = steady
        if self._twist or self.follow_robot(now):
            self._output.hold(self.commanded, now)

    def follow_robot(self, now: int) -> bool:
        """Go along with a robot that was moved while held, by hand or by another controller.

        The old command, sent again or as the start of the next chunk, would throw it back. False: it is not
        known where the robot is.
        """
        measured = self.measured(now)
        if measured is None or self.commanded is None:
            return False
        position = hold_position(self._robot, self.commanded, measured, self._tolerance)
        if position is not None and (position != self.commanded).any():
            self._reports.warn("moved", "the robot was moved while it was held: holding where it is now")
            self.commanded = position
            if self._cycle.timeline.current is not None:
                self._cycle.timeline.hold(now, position)
        return True
