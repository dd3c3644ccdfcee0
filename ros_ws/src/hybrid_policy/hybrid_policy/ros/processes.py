"""Nodes as processes of their own: started with the launch file's parameters, ended by interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hybrid_policy.errors import InputError
from hybrid_policy.ros.bringup import NodeDescription

#: Seconds that a node has to send its hold command and write its summary, then to obey SIGTERM.
GRACE, LAST_GRACE = 10.0, 3.0


def ros_environment() -> dict[str, str]:
    """The variables that make ROS 2 wheels in a virtual environment work, and keep DDS on this machine.

    What the user has set stays. The wheels' bootstrap mark goes: a child that keeps it without
    LD_LIBRARY_PATH finds no middleware.
    """
    environment = dict(os.environ)
    environment.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None)
    if sys.prefix != sys.base_prefix and sys.prefix not in environment.get("AMENT_PREFIX_PATH", ""):
        others = environment.get("AMENT_PREFIX_PATH")
        environment["AMENT_PREFIX_PATH"] = os.pathsep.join([sys.prefix, *([others] if others else [])])
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    return environment


@dataclass
class NodeProcess:
    """One running node and the file that its output goes to."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    _output: BinaryIO

    @classmethod
    def start(cls, node: NodeDescription, log: Path, environment: dict[str, str]) -> NodeProcess:
        """Start a node of this package in a process group of its own."""
        output = log.open("wb")
        command = [sys.executable, "-m", f"hybrid_policy.ros.{node.executable}", *node.ros_arguments()]
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, **node.environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches us alone; we stop the nodes in order
        )
        return cls(node.name, process, log, output)

    def running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def stop(self) -> int:
        """Interrupt it, then terminate, then kill; the exit status."""
        for number, seconds in ((signal.SIGINT, GRACE), (signal.SIGTERM, LAST_GRACE), (signal.SIGKILL, None)):
            if not self.running():
                break
            self.process.send_signal(number)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        self._output.close()
        return self.process.returncode

    def tail(self, lines: int = 12) -> str:
        """The last lines of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def check_running(nodes: Sequence[NodeProcess]) -> None:
    """Raise for a node that has ended by itself.

    Raises:
        InputError: with the end of the node's own log.
    """
    for node in nodes:
        if not node.running():
            code = node.process.returncode
            raise InputError(f"{node.name} ended with exit code {code}; {node.log} ends:\n{node.tail()}")
