"""What the robot was told while the bag was recorded, at any moment.

Two kinds of command streams exist, and a moment's action means another thing in each:

- *set points* (one-point JointTrajectory, Float64MultiArray, JointState, TwistStamped, a controller's
  reference): the action at a time is the set point sent at that time, as data sets are made; between
  two of them it is interpolated.
- *trajectories* (JointTrajectory of several points): a message is in force from its arrival until the
  next; the action is the point due then, interpolated, and led in from the command before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.message_types import CONTROLLER_STATE
from hybrid_policy.evaluation.topic_match import FLOATS, JOINT_STATE, TRAJECTORY, TWIST

#: ns: further from any command than this, nothing is known.
HOLD = 500_000_000


@dataclass
class RecordedActions:
    """Commands in the order of ``names``; fill with :meth:`add`, then :meth:`sample`.

    names: the commanded values, as the robot file orders them.
    source: the topic and its type, or that positions measured later stand in for commands.
    """

    names: Sequence[str]
    source: str = ""
    _arrivals: list[int] = field(default_factory=list)
    _segments: list[int] = field(default_factory=list)
    _messages: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._arrivals)

    @cached_property
    def arrivals(self) -> NDArray[np.int64]:
        """int64 [messages]: when each command was recorded, on the replay's clock."""
        return np.array(self._arrivals, dtype=np.int64)

    def add(self, kind: str, message: Any, arrival: int, segment: int = 0) -> None:
        """Take one command message; ``segment`` counts the resets of the clock before it.

        Raises:
            InputError: the message names none of the joints, has another number of values, or lacks a field.
        """
        try:
            times, values = self._points(kind, message, arrival)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"command: not a whole {kind} ({error})") from error
        self._append(arrival, segment, times, values)

    def add_positions(self, time: int, values: NDArray[np.float64], segment: int = 0) -> None:
        """Take measured positions in place of a command (float64 [commands])."""
        self._append(time, segment, np.array([time], dtype=np.int64), values[None])

    def _append(self, arrival: int, segment: int, times: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        if self._arrivals and self._segments[-1] == segment:
            arrival = max(arrival, self._arrivals[-1])  # jitter of stamps must not undo the order
        self._arrivals.append(arrival)
        self._segments.append(segment)
        self._messages.append((times, values))

    def segment(self, number: int) -> RecordedActions:
        """The commands between two resets of the clock (0: those before the first)."""
        chosen = [i for i, one in enumerate(self._segments) if one == number]
        part = RecordedActions(self.names, self.source)
        for i in chosen:
            part._append(self._arrivals[i], number, *self._messages[i])
        return part

    @cached_property
    def _all_values(self) -> NDArray[np.float64] | None:
        """float64 [messages, commands] where every command is a set point, else None."""
        if any(len(times) > 1 for times, _ in self._messages):
            return None
        return np.concatenate([values for _, values in self._messages])

    def sample(self, times: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64 [times, commands]: what was commanded; NaN where nobody knows.

        For one segment (:meth:`segment`); call it once everything was added.
        """
        if not self._arrivals:
            return np.full((len(times), len(self.names)), np.nan)
        if self._all_values is not None:
            return _set_points(self.arrivals, self._all_values, times)
        return self._trajectories(times)

    def _trajectories(self, times: NDArray[np.int64]) -> NDArray[np.float64]:
        out = np.full((len(times), len(self.names)), np.nan)
        owner = np.searchsorted(self.arrivals, times, side="right") - 1
        for j in np.unique(owner[owner >= 0]):
            chosen = owner == j
            knots, values = self._knots(int(j))
            at = np.where(times[chosen] <= knots[-1] + HOLD, np.minimum(times[chosen], knots[-1]), -1)
            for c in range(values.shape[1]):
                # Differences from the first knot: float64 has no room for nanoseconds since 1970.
                sampled = np.interp((at - knots[0]).astype(np.float64), (knots - knots[0]).astype(np.float64),
                                    values[:, c], left=np.nan)  # fmt: skip
                out[chosen, c] = sampled
        return out

    def _knots(self, j: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        times, values = self._messages[j]
        arrival = self._arrivals[j]
        ahead = times > arrival
        if not ahead.any():
            return np.array([arrival], dtype=np.int64), values[-1:]
        start = values[ahead][0]
        if j > 0:
            before_times, before = self._messages[j - 1]
            known = np.array(
                [np.interp(arrival - before_times[0], before_times - before_times[0], before[:, c])
                 for c in range(before.shape[1])]
            )  # fmt: skip
            start = np.where(np.isnan(known), start, known)
        elif (~ahead).any():
            start = values[~ahead][-1]
        return np.concatenate(([arrival], times[ahead])), np.vstack((start, values[ahead]))

    def _points(self, kind: str, message: Any, arrival: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        now = np.array([arrival], dtype=np.int64)
        if kind == TRAJECTORY:
            return self._trajectory(message, arrival)
        if kind == CONTROLLER_STATE:
            point = getattr(message, "reference", None) or message.desired
            if not len(point.positions) and hasattr(message, "desired"):
                point = message.desired
            return now, self._by_name(message.joint_names, np.asarray(point.positions, dtype=np.float64)[None])
        if kind == JOINT_STATE:
            return now, self._by_name(message.name, np.asarray(message.position, dtype=np.float64)[None])
        if kind == TWIST:
            linear, angular = message.twist.linear, message.twist.angular
            values = [linear.x, linear.y, linear.z, angular.x, angular.y, angular.z]
            values += [np.nan] * (len(self.names) - 6)
            return now, np.array([values])
        if kind == FLOATS:
            data = np.asarray(message.data, dtype=np.float64).reshape(-1)
            if len(data) != len(self.names):
                raise InputError(f"command: {len(data)} values given, expected {len(self.names)}")
            return now, data[None]
        raise InputError(f"command: type {kind} given, expected one that carries positions")

    def _trajectory(self, message: Any, arrival: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        if not message.points:
            raise InputError("command: a trajectory without points given, expected at least one")
        stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        offsets = [p.time_from_start.sec * 1_000_000_000 + p.time_from_start.nanosec for p in message.points]
        values = np.array([np.asarray(p.positions, dtype=np.float64) for p in message.points])
        base = arrival if stamp == 0 or len(message.points) == 1 else stamp
        return base + np.array(offsets, dtype=np.int64), self._by_name(message.joint_names, values)

    def _by_name(self, given: Sequence[str], values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Columns in the order of ``names``; NaN for those that the message does not command."""
        given = list(given)
        if values.ndim != 2 or values.shape[1] != len(given):
            raise InputError(f"command: {values.shape[-1]} positions given, expected {len(given)} (one a joint)")
        out = np.full((len(values), len(self.names)), np.nan)
        columns = [(i, given.index(name)) for i, name in enumerate(self.names) if name in given]
        if not columns:
            raise InputError(
                f"command: joints {', '.join(given[:4])} ... given, expected {', '.join(self.names[:4])} ..."
            )
        for i, k in columns:
            out[:, i] = values[:, k]
        return out


def _set_points(
    arrivals: NDArray[np.int64], values: NDArray[np.float64], times: NDArray[np.int64]
) -> NDArray[np.float64]:
    after = np.clip(np.searchsorted(arrivals, times, side="left"), 0, len(arrivals) - 1)
    before = np.clip(np.searchsorted(arrivals, times, side="right") - 1, 0, len(arrivals) - 1)
    span = arrivals[after] - arrivals[before]
    inside = (times >= arrivals[0]) & (span <= HOLD) & (times <= arrivals[-1])
    share = np.divide(times - arrivals[before], span, out=np.zeros(len(times)), where=span > 0)
    low, high = values[before], values[after]
    mixed = low + share[:, None] * (high - low)
    held = (times >= arrivals[before]) & (times - arrivals[before] <= HOLD)
    return np.where(inside[:, None], mixed, np.where(held[:, None], low, np.nan))
