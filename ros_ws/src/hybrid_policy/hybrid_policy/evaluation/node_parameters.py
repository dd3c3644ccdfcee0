"""The policy node's parameters that a replay depends on, from the node's own parameter file.

The defaults are those of the shipped ``config/policy_node.yaml``, so a replay does what a node does that
was started without arguments; a robot's own file (``params_file`` of the launch file) does as its node does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hybrid_policy.control.cycle import CHUNKING, CycleSettings
from hybrid_policy.errors import InputError
from hybrid_policy.share import share_path

_SHIPPED = "config/policy_node.yaml"


@dataclass(frozen=True)
class NodeParameters:
    """Named as in the parameter file, a dot as two underscores; see docs/parameters.md for each."""

    checkpoint: str
    recipe: str
    device: str
    cpu_threads: int
    prompt: str
    inference_rate: float
    chunking: str
    delay_window: int
    ensemble_weight: float
    blend: float
    seed: int
    output_timeout: float
    future_tolerance: float
    joint_margin: float
    hold_tolerance: float
    rtc__mode: str
    rtc__schedule: str
    rtc__beta: float
    rtc__prior_std: float

    @property
    def cycle(self) -> CycleSettings:
        """How chunks follow each other."""
        return CycleSettings(
            chunking=self.chunking,
            blend=self.blend,
            ensemble_weight=self.ensemble_weight,
            delay_window=self.delay_window,
            seed=self.seed,
        )


def read_parameters(path: Path | None, given: Mapping[str, Any]) -> NodeParameters:
    """The shipped defaults, over them a user's file, over that what the command line gives (None: nothing).

    Raises:
        InputError: a file cannot be read, or a value has another type than its default or is out of range.
    """
    shipped = share_path(_SHIPPED)
    values = _read(shipped)
    lacking = [f.name for f in fields(NodeParameters) if f.name not in values]
    if lacking:
        raise InputError(f"{shipped}: {', '.join(lacking).replace('__', '.')}: missing")
    origin = {name: str(shipped) for name in values}
    layers = [(str(path), _read(path))] if path is not None else []
    layers.append(("--", {k: v for k, v in given.items() if v is not None}))
    for source, layer in layers:
        for name, value in layer.items():
            if name in values:
                values[name] = _like(source, name, value, values[name])
                origin[name] = source
    made = NodeParameters(**{f.name: values[f.name] for f in fields(NodeParameters)})
    _check(made, origin)
    return made


def _check(made: NodeParameters, origin: Mapping[str, str]) -> None:
    for name, least in (("inference_rate", 1e-3), ("cpu_threads", 0), ("blend", 0), ("delay_window", 1), ("seed", 0)):
        value = getattr(made, name)
        if not least <= value < float("inf"):
            raise InputError.at(origin[name], name, value, f"a number of at least {least}")
    if made.inference_rate > 1000.0:
        raise InputError.at(origin["inference_rate"], "inference_rate", made.inference_rate, "at most 1000")
    if made.chunking not in CHUNKING:
        raise InputError.at(origin["chunking"], "chunking", made.chunking, " or ".join(CHUNKING))


def _like(source: str, name: str, value: Any, default: Any) -> Any:
    """The value, if it is of the default's type (an integer is a number too)."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        kind = {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(type(default), "that")
        raise InputError.at(source, name.replace("__", "."), value, kind)
    return value


def _read(path: Path) -> dict[str, Any]:
    """``/**`` and ``policy_node`` of a ROS 2 parameter file, flat."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as a parameter file ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a ROS 2 parameter file, expected node names with ros__parameters")
    found: dict[str, Any] = {}
    for node, section in content.items():
        if str(node).rpartition("/")[2] not in ("**", "policy_node"):
            continue
        if not isinstance(section, dict) or not isinstance(section.get("ros__parameters"), dict):
            raise InputError(f"{path}: {node}: expected ros__parameters below it")
        found |= _flat(section["ros__parameters"])
    return found


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        name = prefix + str(key).replace(".", "__")
        found |= _flat(value, f"{name}__") if isinstance(value, Mapping) else {name: value}
    return found
