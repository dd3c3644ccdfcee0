"""Ten minutes of control, with the simulated robot beside it: ticks, deadlines, memory, every chunk.

    python benchmarks/soak.py --seconds 600 --output benchmarks/results/soak.json

Starts the simulated robot and the policy node as `hybrid-policy up` does, as two processes, and watches
from a third: resident memory every second, /diagnostics, and at the end the latency log. With --load,
that many processes compete for the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from hybrid_policy.ros import bringup
from hybrid_policy.ros.processes import NodeProcess, ros_environment
from rclpy.executors import SingleThreadedExecutor

#: Seconds after the first chunk from which memory counts: caches, log buffers and pools have filled.
SETTLED = 60.0


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> int:
    """Run it, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--checkpoint", default="shipped")
    parser.add_argument("--recipe", default="bf16")
    parser.add_argument("--domain", type=int, default=48)
    parser.add_argument("--load", type=int, default=0, help="processes that compete for the cores")
    parser.add_argument("--output", type=Path, default=Path("out/soak.json"))
    args = parser.parse_args()
    environment = ros_environment() | {"ROS_DOMAIN_ID": str(args.domain)}
    os.environ.update({"ROS_DOMAIN_ID": str(args.domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"})
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    values = {a.name: a.default for a in bringup.ARGUMENTS}
    values |= {"sim": "true", "checkpoint": args.checkpoint, "recipe": args.recipe}
    described = bringup.nodes(values)
    described[1].parameters["latency_log"] = str(folder / "latency.jsonl")
    competitors = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.load)]
    nodes = [NodeProcess.start(n, folder / f"{n.name}.log", environment) for n in described]
    rclpy.init(domain_id=args.domain)
    node = rclpy.create_node("soak")
    heard: dict[str, dict[str, str]] = {}

    def on_diagnostics(message: DiagnosticArray) -> None:
        for status in message.status:
            name = status.name.split(": ", 1)[1]
            heard[name] = {v.key: v.value for v in status.values} | {"message": status.message}

    node.create_subscription(DiagnosticArray, "/diagnostics", on_diagnostics, 10)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    memory: list[tuple[float, float]] = []
    began = first = None
    try:
        while first is None or time.monotonic() - first < args.seconds:
            executor.spin_once(timeout_sec=0.2)
            now = time.monotonic()
            began = began or now
            if first is None:
                if int(heard.get("output", {}).get("chunks", "0")) > 0:
                    first = now
                elif now - began > 120.0 or not nodes[1].running():
                    print(nodes[1].tail(30), file=sys.stderr)
                    return 1
            elif not memory or now - first - memory[-1][0] >= 1.0:
                memory.append((now - first, resident_mib(nodes[1].process.pid)))
    finally:
        codes = {n.name: n.stop() for n in reversed(nodes)}
        for process in competitors:
            process.kill()
        executor.shutdown()
        rclpy.try_shutdown()
    lines = [json.loads(line) for line in (folder / "latency.jsonl").read_text().splitlines()]
    total = np.array([line["total_ms"] for line in lines])
    late = [(t, m) for t, m in memory if t >= SETTLED] or memory
    output, log = heard["output"], nodes[1].log.read_text(errors="replace")
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}",
        "checkpoint": heard["inference"]["checkpoint"],
        "seconds": args.seconds,
        "chunks": len(lines),
        "chunk numbers complete": [line["chunk"] for line in lines] == list(range(len(lines))),
        "accepted": sum(line["accepted"] for line in lines),
        "refused or discarded, with a reason": sum(bool(line["reason"]) for line in lines if not line["accepted"]),
        "deadlines missed": sum(not line["deadline_met"] for line in lines),
        "total ms p50/p99/max": [round(float(v), 2) for v in np.percentile(total, [50, 99, 100])],
        "seam position (rad), velocity (rad/s), p50 and p95": [
            [round(float(v), 4) for v in np.percentile([line[key] for line in lines if line["accepted"]], [50, 95])]
            for key in ("seam_position", "seam_velocity")
        ],
        "control ticks missed": int(output["control ticks missed"]),
        "control ticks missed, reported": sum("ticks missed" in line for line in log.splitlines()),
        "control lateness p50/p99/max (us)": output["control lateness p50/p99/max (us)"],
        "holds": int(output["holds"]),
        "memory MiB after a minute, at the end": [round(late[0][1], 1), round(late[-1][1], 1)],
        "memory growth MiB (slope of the line through all samples x time)": round(
            float(np.polyfit(*np.array(late).T, 1)[0] * (late[-1][0] - late[0][0])) if len(late) > 2 else 0.0,
            2,
        ),
        "exit codes": codes,
        "input rates": {k: v["rate"] for k, v in heard.items() if k.startswith("input")},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
