"""From the node's parameters to the settings of its parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_policy.control.cycle import CycleSettings
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.ros.loop_state import LoopSettings


def cycle_settings(values: Mapping[str, Any]) -> CycleSettings:
    """How chunks follow each other."""
    return CycleSettings(
        chunking=values["chunking"],
        blend=values["blend"],
        ensemble_weight=values["ensemble_weight"],
        delay_window=values["delay_window"],
        seed=values["seed"],
    )


def loop_settings(values: Mapping[str, Any], robot: RobotFile) -> LoopSettings:
    """Periods, tolerances and real-time measures of the two threads."""
    return LoopSettings(
        inference_period=round(1e9 / values["inference_rate"]),
        tick_period=round(1e9 / robot.command.rate),
        hold_tolerance=values["hold_tolerance"],
        tracking_tolerance=values["tracking_tolerance"],
        max_errors=values["max_errors"],
        wait_for_images=values["wait_for_images"],
        fifo_priority=values["rt.fifo_priority"],
        cpu_affinity=tuple(values["rt.cpu_affinity"]),
    )


def thresholds(values: Mapping[str, Any]) -> dict[str, float]:
    """The parameters ``diagnostics.*``, without their prefix."""
    prefix = "diagnostics."
    return {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}


def log_path(where: str, node: str) -> Path | None:
    """The file that the parameter ``latency_log`` means for a node of this name; None: no log."""
    if where == "auto":
        home = Path(os.environ.get("ROS_HOME", Path.home() / ".ros"))
        return home / "hybrid_policy" / f"latency-{node}-{os.getpid()}.jsonl"
    return Path(where).expanduser() if where else None
