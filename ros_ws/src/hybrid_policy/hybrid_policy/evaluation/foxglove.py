"""A Foxglove layout for a recording and the predictions bag: cameras above, each joint's curves below."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.figures import COLOURS, INK
from hybrid_policy.evaluation.predictions import topic_name

_PLOTS_A_ROW = 4


def layout(robot: RobotFile, recipes: Sequence[str], images: Mapping[str, str]) -> dict[str, Any]:
    """The layout as Foxglove's "Import from file" reads it. images: camera name -> the recording's topic."""
    panels: dict[str, Any] = {}
    above = []
    for i, camera in enumerate(robot.cameras):
        key = f"Image!camera{i}"
        topic = images.get(camera.name, "/" + camera.topic.lstrip("/"))
        panels[key] = {"imageMode": {"imageTopic": topic}, "foxglovePanelTitle": camera.name}
        above.append(key)
    plots = []
    for i, name in enumerate(robot.command_names):
        key = f"Plot!joint{i}"
        panels[key] = _plot(name, i, recipes)
        plots.append(key)
    rows = [_row(plots[at : at + _PLOTS_A_ROW], "row") for at in range(0, len(plots), _PLOTS_A_ROW)]
    below = _row(rows, "column")
    whole: Any = below
    if above:
        whole = {"direction": "column", "first": _row(above, "row"), "second": below, "splitPercentage": 32}
    return {
        "configById": panels,
        "globalVariables": {},
        "userNodes": {},
        "playbackConfig": {"speed": 1},
        "layout": whole,
    }


def write_layout(robot: RobotFile, recipes: Sequence[str], images: Mapping[str, str], path: Path) -> None:
    """Write the layout file."""
    path.write_text(json.dumps(layout(robot, recipes, images), indent=1) + "\n", "utf-8")


def _plot(name: str, index: int, recipes: Sequence[str]) -> dict[str, Any]:
    curves = [("recorded", "/replay/recorded", INK)]
    curves += [
        (recipe, f"/replay/{topic_name(recipe)}/command", COLOURS[k % len(COLOURS)]) for k, recipe in enumerate(recipes)
    ]
    return {
        "foxglovePanelTitle": name,
        "paths": [
            {
                "value": f"{topic}.position[{index}]",
                "label": label,
                "color": colour,
                "enabled": True,
                "timestampMethod": "headerStamp",
            }
            for label, topic, colour in curves
        ],
        "showLegend": True,
        "legendDisplay": "floating",
        "isSynced": True,
        "xAxisVal": "timestamp",
        "showXAxisLabels": True,
        "showYAxisLabels": True,
    }


def _row(items: Sequence[Any], direction: str) -> Any:
    """Panels side by side as the binary tree that Foxglove wants, evenly wide."""
    if len(items) == 1:
        return items[0]
    return {
        "direction": direction,
        "first": items[0],
        "second": _row(items[1:], direction),
        "splitPercentage": 100 / len(items),
    }
