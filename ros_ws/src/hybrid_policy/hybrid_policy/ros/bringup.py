"""Which nodes run with which parameters: one description for ``ros2 launch`` and ``hybrid-policy up``.

Imports neither rclpy nor launch, so that both can use it and tests can hold them together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid_policy.share import share_path


@dataclass(frozen=True)
class Argument:
    """A launch argument, as ``ros2 launch --show-args`` prints it."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeDescription:
    """One node to start. ``parameters`` override the files of ``parameter_files``."""

    executable: str
    name: str
    parameters: dict[str, object]
    parameter_files: tuple[str, ...] = ()
    namespace: str = ""
    log_level: str = "info"
    environment: dict[str, str] = field(default_factory=dict)

    def ros_arguments(self) -> list[str]:
        """The node's command line after its executable, for a plain process."""
        arguments = ["--ros-args", "-r", f"__node:={self.name}", "--log-level", self.log_level]
        if self.namespace:
            arguments += ["-r", f"__ns:=/{self.namespace.strip('/')}"]
        for path in self.parameter_files:
            arguments += ["--params-file", path]
        for name, value in self.parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if isinstance(value, str):
                text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
            arguments += ["-p", f"{name}:={text}"]
        return arguments


BOOLEANS = ("true", "false")

ARGUMENTS = (
    Argument("robot", "sim_aloha", "Robot file: a path, or the name of one that ships (config/robots)"),
    Argument(
        "checkpoint",
        "shipped",
        "Checkpoint directory; 'shipped': the policy of the simulated robot; 'random': random weights",
    ),
    Argument("recipe", "bf16", "Precision recipe: a path, or the name of one that ships (config/recipes)"),
    Argument("device", "auto", "Where the policy runs", ("auto", "cpu", "cuda")),
    Argument("sim", "false", "Start the simulated robot too", BOOLEANS),
    Argument("namespace", "", "Namespace of every node"),
    Argument("use_sim_time", "false", "Take the time from /clock", BOOLEANS),
    Argument("params_file", "", "Parameters of policy_node; empty: the package's config/policy_node.yaml"),
    Argument("log_level", "info", "Level of every node's log", ("debug", "info", "warn", "error", "fatal")),
    Argument("autostart", "true", "Configure and activate the policy at once", BOOLEANS),
)


def environment() -> dict[str, str]:
    """Variables that every node needs and the user has not set: the Fast DDS profile.

    Fast DDS's default shared-memory segment (512 KiB) is smaller than one 640x480 image, and loses
    more than half of them; the profile has one of 32 MiB. Camera drivers should have it too.
    """
    names = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
    if any(name in os.environ for name in names):
        return {}
    # Fast DDS 3 (Kilted) deprecates the old name; Fast DDS 2 knows it alone.
    name = names[1] if os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy") else names[0]
    return {name: str(share_path("config/fastdds.xml"))}


def nodes(values: Mapping[str, str]) -> list[NodeDescription]:
    """The nodes for the arguments' values (text, as launch has them).

    Raises:
        InputError: a file of ours that a value names does not exist.
    """
    use_sim_time = values["use_sim_time"].lower() == "true"
    namespace, log_level, variables = values["namespace"], values["log_level"], environment()
    described = []
    if values["sim"].lower() == "true":
        described.append(
            NodeDescription(
                executable="sim_robot_node",
                name="sim_robot",
                parameters={"robot": values["robot"], "publish_clock": use_sim_time},
                namespace=namespace,
                log_level=log_level,
                environment=variables,
            )
        )
    described.append(
        NodeDescription(
            executable="policy_node",
            name="policy_node",
            parameters={
                **{name: values[name] for name in ("robot", "checkpoint", "recipe", "device")},
                "autostart": values["autostart"].lower() == "true",
                "use_sim_time": use_sim_time,
            },
            parameter_files=(values["params_file"] or str(share_path("config/policy_node.yaml")),),
            namespace=namespace,
            log_level=log_level,
            environment=variables,
        )
    )
    return described
