"""Nanoseconds to and from builtin_interfaces' Time and Duration."""

from __future__ import annotations

from builtin_interfaces.msg import Duration, Time

_SECOND = 1_000_000_000


def time_message(nanoseconds: int) -> Time:
    """A header's stamp."""
    return Time(sec=nanoseconds // _SECOND, nanosec=nanoseconds % _SECOND)


def duration_message(nanoseconds: int) -> Duration:
    """A trajectory point's ``time_from_start``."""
    return Duration(sec=nanoseconds // _SECOND, nanosec=nanoseconds % _SECOND)


def duration_ns(message: Time | Duration) -> int:
    """Nanoseconds of either."""
    return int(message.sec) * _SECOND + int(message.nanosec)
