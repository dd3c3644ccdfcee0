"""Absolute deadlines, and measures that fall back with a warning."""

from __future__ import annotations

import itertools
import os
import threading
import time

from hybrid_policy.ros import real_time


def test_deadlines_do_not_drift() -> None:
    deadline, stop = real_time.PeriodicDeadline(5_000_000), threading.Event()
    reached = []
    for _ in range(20):
        assert deadline.wait(stop)
        reached.append(deadline.next)
        assert time.monotonic_ns() >= deadline.next
    steps = {b - a for a, b in itertools.pairwise(reached)}
    assert all(step % 5_000_000 == 0 for step in steps)
    late = deadline.lateness()
    assert late.count == 20
    assert 0.0 <= late.p50 <= late.p99 <= late.max


def test_deadlines_that_passed_are_left_out_and_counted() -> None:
    deadline, stop = real_time.PeriodicDeadline(2_000_000), threading.Event()
    deadline.wait(stop)
    began = deadline.next
    time.sleep(0.021)
    deadline.wait(stop)
    assert deadline.missed >= 9
    assert (deadline.next - began) % 2_000_000 == 0


def test_a_long_wait_can_be_stopped() -> None:
    deadline, stop = real_time.PeriodicDeadline(3600 * 10**9), threading.Event()
    threading.Timer(0.05, stop.set).start()
    assert not deadline.wait(stop)


def test_measures_fall_back_with_a_warning() -> None:
    said: list[str] = []
    assert not real_time.use_fifo(0, said.append)
    assert not real_time.use_affinity([-1], said.append)
    assert said == []
    assert not real_time.use_affinity([100_000], said.append)
    assert "rt.cpu_affinity" in said.pop()
    outcome: list[tuple[bool, int]] = []

    def elsewhere() -> None:  # a thread of its own: the priority is that thread's alone
        outcome.append((real_time.use_fifo(1, said.append), os.sched_getscheduler(0)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    allowed, policy = outcome[0]
    assert (policy == os.SCHED_FIFO) == allowed
    assert bool(said) != allowed
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_deadline_within_the_slack_is_kept() -> None:
    deadline, stop = real_time.PeriodicDeadline(50_000_000), threading.Event()
    deadline.wait(stop)
    deadline.next = time.monotonic_ns() - 60_000_000  # what follows passed 10 ms ago
    kept = deadline.next + 50_000_000
    assert deadline.wait(stop, slack=10**9)
    assert deadline.next == kept
    assert deadline.missed == 0
    deadline.next = time.monotonic_ns() - 60_000_000
    deadline.wait(stop)
    assert deadline.missed > 0
