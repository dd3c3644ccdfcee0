"""How late a control loop wakes up: idle, beside inference, beside a hog of the interpreter.

    python benchmarks/lateness.py --seconds 10 --output benchmarks/results/lateness.json

The loops: an rclpy timer, a thread on absolute deadlines (what the node's control thread is), and the
same with the node's real-time measures. The loads, in the same process: nothing; the shipped policy
inferring without a pause; a thread of pure Python. Measures that this machine does not allow are named.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.models.observation import Observation
from hybrid_policy.ros import real_time
from hybrid_policy.share import resolve, share_path

LOADS = ("idle", "inference", "pure Python")


def timer_loop(rate: float, seconds: float) -> list[float]:
    """Lateness (us) of an rclpy timer on the steady clock."""
    import rclpy
    from rclpy.clock import Clock, ClockType
    from rclpy.executors import SingleThreadedExecutor

    rclpy.init(domain_id=49)
    node = rclpy.create_node("lateness")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    calls: list[int] = []
    period = round(1e9 / rate)
    steady = Clock(clock_type=ClockType.STEADY_TIME)
    node.create_timer(1 / rate, lambda: calls.append(time.monotonic_ns()), clock=steady)
    begin = time.monotonic_ns()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        executor.spin_once(timeout_sec=0.1)
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown()
    late, before = [], 0
    for call in calls:
        tick, rest = divmod(call - begin, period)
        late += [rest / 1e3, *[period / 1e3] * max(0, int(tick) - before - 1)]  # left out: a period late
        before = int(tick)
    return late


def thread_loop(rate: float, seconds: float, measures: bool, said: list[str]) -> list[float]:
    """Lateness (us) of a thread on absolute deadlines; with all of the node's measures or none."""
    late: list[float] = []
    stop = threading.Event()

    def loop() -> None:
        if measures:
            real_time.use_fifo(40, said.append)
        deadline = real_time.PeriodicDeadline(round(1e9 / rate))
        missed = 0
        while deadline.wait(stop):
            late.append((time.monotonic_ns() - deadline.next) / 1e3)
            late.extend([1e6 / rate] * (deadline.missed - missed))  # a tick left out is a period late
            missed = deadline.missed

    interval = sys.getswitchinterval()
    if measures:
        real_time.lock_memory(said.append)
        real_time.freeze_garbage()
        real_time.use_switch_interval(5e-4)
    thread = threading.Thread(target=loop)
    thread.start()
    time.sleep(seconds)
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)
    gc.unfreeze()
    return late


@contextmanager
def load(kind: str, infer: Callable[[], Any]) -> Iterator[None]:
    """Something that runs in another thread meanwhile."""
    stop = threading.Event()

    def work() -> None:
        count = 0
        while not stop.is_set():
            if kind == "inference":
                infer()
            else:
                count += 1

    thread = threading.Thread(target=work)
    if kind != "idle":
        thread.start()
    yield
    stop.set()
    if kind != "idle":
        thread.join()


def main() -> None:
    """Measure every loop under every load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lateness.json"))
    args = parser.parse_args()
    import torch
    from hybrid_policy.runtime.engine import Engine

    torch.set_num_threads(1)
    engine = Engine.from_checkpoint(share_path("checkpoints/sim_pi05"), "bf16", "cpu")
    robot = RobotFile.load(resolve("sim_aloha", "config/robots"))
    middle = np.array([0.5 * ((j.min or 0.0) + (j.max or 0.0)) for j in robot.joints])
    images = {name: np.zeros((224, 224, 3), np.uint8) for name in engine.spec.cameras}
    observation = Observation(images, robot.state(middle), robot.prompt, {"joints": 1}, middle)
    said: list[str] = []
    loops: dict[str, Callable[[], list[float]]] = {
        "rclpy timer, 50 Hz": lambda: timer_loop(50, args.seconds),
        "thread, 50 Hz": lambda: thread_loop(50, args.seconds, False, said),
        "thread, 200 Hz, with measures": lambda: thread_loop(200, args.seconds, True, said),
    }
    rows = []
    for name, loop in loops.items():
        for kind in LOADS:
            with load(kind, lambda: engine.infer(observation)):
                time.sleep(0.3)
                late = np.array(loop())
            p50, p99, worst = np.percentile(late, [50, 99, 100])
            rows.append({"loop": name, "load": kind, "p50": p50, "p99": p99, "max": worst, "ticks": len(late)})
            print(f"{name:<32} {kind:<12} p50 {p50:8.0f}  p99 {p99:8.0f}  max {worst:8.0f} us", flush=True)
    for text in dict.fromkeys(said):
        print(text)
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}",
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
        "unit": "microseconds",
        "measures not allowed here": list(dict.fromkeys(said)),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
