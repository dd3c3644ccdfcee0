"""Imports point downwards only: ros > evaluation > control, runtime, sim > models > kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hybrid_policy
import pytest

PACKAGE = Path(hybrid_policy.__file__).parent
LEVELS = {"kernels": 0, "models": 1, "control": 2, "runtime": 2, "sim": 2, "evaluation": 3, "ros": 4}
ROS_MODULES = {
    "rclpy",
    "sensor_msgs",
    "trajectory_msgs",
    "std_msgs",
    "std_srvs",
    "diagnostic_msgs",
    "geometry_msgs",
}


def imports_of(path: Path) -> set[str]:
    """Absolute names of every module that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(room: str, names: set[str]) -> set[str]:
    """The imports that a file of ``room`` may not have."""
    bad = set()
    for name in names:
        parts = name.split(".")
        other = parts[1] if parts[0] == "hybrid_policy" and len(parts) > 1 else room
        if other != room and LEVELS.get(other, -1) >= LEVELS[room]:
            bad.add(name)
        if parts[0] in ROS_MODULES and room != "ros":
            bad.add(name)
        if parts[0] == "torch" and room in {"control", "sim"}:
            bad.add(name)
    return bad


def test_the_rule_itself_finds_violations() -> None:
    assert violations("models", {"hybrid_policy.runtime.engine.Engine"})
    assert violations("control", {"torch.nn"})
    assert violations("evaluation", {"rclpy.node.Node"})
    assert not violations("ros", {"rclpy.node.Node", "hybrid_policy.control.guard.Guard"})


@pytest.mark.parametrize("room", LEVELS)
def test_imports_point_downwards(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    found = {str(path.relative_to(PACKAGE)): violations(room, imports_of(path)) for path in files}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("room", ["control", "sim"])
def test_torch_is_not_loaded_by(room: str) -> None:
    modules = [
        f"hybrid_policy.{room}." + ".".join(path.relative_to(PACKAGE / room).with_suffix("").parts)
        for path in (PACKAGE / room).rglob("*.py")
        if path.name != "__init__.py"
    ]
    script = f"import sys, {', '.join(['json', *modules])}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
