"""Waiting for absolute deadlines, and what the operating system offers to meet them.

Each measure is tried and, where it is not allowed, reported in one line: the node goes on without it.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CLOCK_MONOTONIC = 1
_TIMER_ABSTIME = 1
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_SECOND = 1_000_000_000
#: A thread that waits looks up at least this often whether it is to stop.
_SLICE = 200_000_000


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)


def sleep_until(deadline: int) -> None:
    """Sleep to an absolute time of CLOCK_MONOTONIC (nanoseconds); the interpreter lock is released."""
    until = _Timespec(deadline // _SECOND, deadline % _SECOND)
    while _libc.clock_nanosleep(_CLOCK_MONOTONIC, _TIMER_ABSTIME, ctypes.byref(until), None) == errno.EINTR:
        pass


@dataclass(frozen=True)
class Lateness:
    """Microseconds by which a loop woke up late. missed: wake-ups left out, being a whole period late."""

    count: int
    missed: int
    p50: float
    p99: float
    max: float


class PeriodicDeadline:
    """Deadlines at a fixed period, absolute: lateness does not add up; a deadline missed is left out.

    period: nanoseconds. capacity: wake-ups kept for :meth:`lateness`.
    """

    def __init__(self, period: int, capacity: int = 12_000) -> None:
        self.period = period
        self.next = 0
        self.missed = 0
        self._late: NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)
        self._count = 0

    def wait(self, stop: threading.Event, slack: int = 0) -> bool:
        """Sleep until the next deadline; False when ``stop`` was set.

        slack: nanoseconds by which a deadline may have passed before it is left out.
        """
        now = time.monotonic_ns()
        if self.next == 0:
            self.next = now
        self.next += self.period
        if self.next + slack <= now:
            skipped = (now - slack - self.next) // self.period + 1
            self.missed += int(skipped)
            self.next += skipped * self.period
        while self.next - now > _SLICE:
            if stop.is_set():
                return False
            sleep_until(now + _SLICE)
            now = time.monotonic_ns()
        sleep_until(self.next)
        self._late[self._count % len(self._late)] = time.monotonic_ns() - self.next
        self._count += 1
        return not stop.is_set()

    def lateness(self) -> Lateness:
        """How late the loop has been."""
        kept = self._late[: min(self._count, len(self._late))] / 1e3
        if len(kept) == 0:
            return Lateness(0, self.missed, 0.0, 0.0, 0.0)
        p50, p99 = np.percentile(kept, [50, 99])
        return Lateness(self._count, self.missed, float(p50), float(p99), float(kept.max()))


def use_fifo(priority: int, warn: Callable[[str], None]) -> bool:
    """SCHED_FIFO for the calling thread alone; 0: leave it."""
    if priority == 0:
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except (OSError, AttributeError) as error:
        warn(f"rt.fifo_priority: SCHED_FIFO {priority} not allowed ({error}); going on with normal scheduling")
        return False
    return True


def use_affinity(cores: Sequence[int], warn: Callable[[str], None]) -> bool:
    """Pin the calling thread to cores; any negative one: leave it."""
    if not cores or min(cores) < 0:
        return False
    try:
        os.sched_setaffinity(0, set(cores))
    except (OSError, ValueError, AttributeError) as error:
        warn(f"rt.cpu_affinity: cores {list(cores)} not available ({error}); going on with any")
        return False
    return True


def lock_memory(warn: Callable[[str], None]) -> bool:
    """mlockall: no page of this process is swapped out."""
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0:
        reason = os.strerror(ctypes.get_errno())
        warn(f"rt.mlockall: not allowed ({reason}; see ulimit -l); going on without")
        return False
    return True


def freeze_garbage() -> None:
    """Take everything alive now out of later garbage collections."""
    gc.collect()
    gc.freeze()


def use_switch_interval(seconds: float) -> None:
    """How long a Python thread may keep the interpreter from another; 0: leave it."""
    if seconds > 0.0:
        sys.setswitchinterval(seconds)
