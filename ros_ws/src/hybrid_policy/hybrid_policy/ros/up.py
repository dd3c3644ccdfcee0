"""Start the simulated robot and the policy node, show the latency live, end with a table and a picture.

The same nodes with the same parameters as `ros2 launch hybrid_policy robot.launch.py sim:=true`, where
launch is not installed. Ends when the named cube is lifted, or after --seconds. Everything that the nodes
say and write lies in the output folder: their logs, latency.jsonl, summary.json, episode.png, episode.gif.

exit code: 0 the robot was controlled (whether or not it lifted the cube: see success), 1 no chunk was
published, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from std_msgs.msg import String

from hybrid_policy.control.latency import ChunkRecord, LatencyRecorder
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.ros import bringup
from hybrid_policy.ros.processes import NodeProcess, check_running, ros_environment
from hybrid_policy.share import resolve

#: Seconds that a policy may take to load before the run is given up.
LOAD_TIMEOUT = 300.0
#: Seconds that the run goes on after success, so that the picture shows the cube held.
AFTERWARDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The launch file's arguments as options, and those of the run."""
    for argument in bringup.ARGUMENTS:
        default = "true" if argument.name == "sim" else argument.default
        parser.add_argument(
            f"--{argument.name.replace('_', '-')}",
            default=default,
            choices=argument.choices or None,
            metavar=None if argument.choices else argument.name.upper(),
            help=f"{argument.description} (default: {default or 'none'})",
        )
    parser.add_argument("--prompt", default="", help="the task; default: the robot file's")
    parser.add_argument("--seconds", type=float, default=20.0, help="longest run (default: 20; 0: until Ctrl-C)")
    parser.add_argument("--seed", type=int, default=-1, help="seed of the simulated scene (default: drawn)")
    parser.add_argument("--keep-going", action="store_true", help="do not end when the cube is lifted")
    parser.add_argument("--output", type=Path, default=Path("out/run"), help="folder (default: out/run)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    """Run it; see the module's docstring."""
    values = {a.name: str(getattr(args, a.name)) for a in bringup.ARGUMENTS}
    robot = RobotFile.load(resolve(values["robot"], "config/robots"))
    output: Path = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for old in ("latency.jsonl", "episode.png", "episode.gif", "summary.json"):
        (output / old).unlink(missing_ok=True)
    environment = ros_environment()
    # Beside other ROS systems on this machine, unless the user has chosen a domain.
    os.environ["ROS_DOMAIN_ID"] = environment.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    os.environ.update({k: environment[k] for k in ("AMENT_PREFIX_PATH", "ROS_AUTOMATIC_DISCOVERY_RANGE")})
    described = bringup.nodes(values)
    for node in described:
        if node.executable == "policy_node":
            node.parameters["latency_log"] = str(output / "latency.jsonl")
            if args.prompt:
                node.parameters["prompt"] = args.prompt
        else:
            node.parameters.update({"film": str(output), "seed": args.seed, "prompt": args.prompt})
    console = Console(stderr=args.json)
    console.print(
        f"[bold]{robot.name}[/] · checkpoint {values['checkpoint']} · recipe {values['recipe']} · "
        f"ROS_DOMAIN_ID {environment['ROS_DOMAIN_ID']} · output {output}"
    )
    monitor = _Monitor(output / "latency.jsonl")
    processes = [NodeProcess.start(n, output / f"{n.name}.log", environment) for n in described]
    try:
        _watch(processes, monitor, console, args)
    except KeyboardInterrupt:
        console.print("interrupted: the robot holds, the nodes end")
    finally:
        codes = {p.name: p.stop() for p in reversed(processes)}  # the policy first: it sends the hold
        monitor.read()
        monitor.close()
    return _conclude(console, monitor, codes, output, args.json)


def _watch(processes: list[NodeProcess], monitor: _Monitor, console: Console, args: argparse.Namespace) -> None:
    """Show the live table until the run is over."""
    began = time.monotonic()
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            monitor.spin(0.25)
            monitor.read()
            check_running(processes)
            now = time.monotonic()
            live.update(monitor.view(now - began))
            if monitor.first is None:
                if now - began > LOAD_TIMEOUT:
                    end = processes[-1].tail()
                    raise InputError(f"no chunk within {LOAD_TIMEOUT:.0f} s; the policy's log ends:\n{end}")
                continue
            if args.seconds and now - monitor.first > args.seconds:
                return
            if monitor.lifted and not args.keep_going and now - monitor.lifted > AFTERWARDS:
                return


def _conclude(console: Console, monitor: _Monitor, codes: dict[str, int], output: Path, as_json: bool) -> int:
    """Print and write the summary; the exit code."""
    summary = {
        **monitor.recorder.summary().to_dict(),
        "task": monitor.task,
        "success": bool(monitor.task.get("success")),
        "exit_codes": codes,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if as_json:
        print(json.dumps(summary))
    else:
        console.print(monitor.table())
        if monitor.task:
            word = "[green]success[/]" if summary["success"] else "[yellow]not lifted[/]"
            console.print(f"lift the {monitor.task['target']} cube: {word} ({monitor.task['seconds']} s)")
        for name in ("episode.png", "episode.gif", "latency.jsonl"):
            if (output / name).exists():
                console.print(f"  {output / name}")
    failed = {name: code for name, code in codes.items() if code != 0}
    if failed:
        console.print(f"nodes that did not end cleanly: {failed}; their logs are in {output}")
    return 0 if monitor.recorder.chunks and not failed else 1


class _Monitor:
    """What is known of the run: chunks from the latency log, the task from the simulator's topic."""

    def __init__(self, log: Path) -> None:
        self.recorder = LatencyRecorder()
        self.task: dict[str, object] = {}
        self.first: float | None = None
        self.lifted: float | None = None
        self._log, self._offset = log, 0
        self._last: ChunkRecord | None = None
        rclpy.init()
        self._node = rclpy.create_node("up")
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._node.create_subscription(String, "task/status", self._on_status, latched)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)

    def spin(self, seconds: float) -> None:
        """Receive for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def close(self) -> None:
        """End ROS."""
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.try_shutdown()

    def _on_status(self, message: String) -> None:
        self.task = json.loads(message.data)
        lifted = bool(self.task.get("success"))
        self.lifted = (self.lifted or time.monotonic()) if lifted else None

    def _lines(self) -> Iterator[str]:
        if not self._log.exists():
            return
        with self._log.open(encoding="utf-8") as file:
            file.seek(self._offset)
            while (line := file.readline()).endswith("\n"):
                self._offset = file.tell()
                yield line

    def read(self) -> None:
        """Take in the log's new lines."""
        for line in self._lines():
            fields = json.loads(line)
            if "chunk" not in fields:
                continue
            self._last = ChunkRecord(**fields)
            self.recorder.add(self._last)
            self.first = self.first or time.monotonic()

    def view(self, seconds: float) -> Group | str:
        """What is shown while it runs."""
        if self._last is None:
            return f"loading the policy and the simulator … {seconds:.0f} s"
        last = self._last
        target = f" · lift the {self.task['target']} cube" if self.task else ""
        return Group(
            self.table(),
            f"{seconds:5.1f} s{target} · chunk {last.chunk}: infer {last.infer_ms:.1f} ms, "
            f"image to command {last.stamp_to_publish_ms:.1f} ms, "
            f"deadline {'met' if last.deadline_met else 'missed'}",
        )

    def table(self) -> Table:
        """Percentiles of every stage so far."""
        summary = self.recorder.summary()
        counts = f"{summary.chunks} chunks, {summary.misses} deadlines missed, {summary.refused} refused"
        table = Table(title=counts)
        table.add_column("stage (ms)")
        for name in ("p50", "p95", "p99", "max"):
            table.add_column(name, justify="right")
        for name, one in summary.stages.items():
            table.add_row(name, *(f"{x:.2f}" for x in (one.p50, one.p95, one.p99, one.max)))
        return table
