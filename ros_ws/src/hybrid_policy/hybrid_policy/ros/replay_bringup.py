"""What ``replay.launch.py`` starts: the real policy node in sim time, and a player that feeds it a bag."""

from __future__ import annotations

from collections.abc import Mapping

from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.ros import bringup
from hybrid_policy.ros.bringup import BOOLEANS, Argument, NodeDescription
from hybrid_policy.share import resolve

_SHARED = ("robot", "checkpoint", "recipe", "device", "params_file", "log_level")

ARGUMENTS = (
    Argument("bag", "", "The bag to play: a folder, or one of its files"),
    *(argument for argument in bringup.ARGUMENTS if argument.name in _SHARED),
    Argument("rate", "1.0", "How fast to play; the node's own latency does not scale with it"),
    Argument("delay", "3.0", "Seconds before playing, for the node to load and activate"),
    Argument("start_paused", "false", "Wait for the space bar before playing", BOOLEANS),
    Argument("dry_run", "true", "Publish chunks on the preview topic only, never to a controller", BOOLEANS),
)


def topics(robot: RobotFile) -> list[str]:
    """What to play: the inputs and the prompt. Recorded commands stay out, the node publishes its own."""
    names = [camera.topic for camera in robot.cameras]
    names += [robot.joint_states_topic, robot.prompt_topic]
    if robot.robot_description_topic:
        names.append(robot.robot_description_topic)
    return ["/" + name.lstrip("/") for name in names]


def player(values: Mapping[str, str]) -> list[str]:
    """The command line of ``ros2 bag play``.

    Raises:
        InputError: the robot file cannot be read.
    """
    robot = RobotFile.load(resolve(values["robot"], "config/robots"))
    command = ["ros2", "bag", "play", values["bag"], "--clock", "200", "--rate", values["rate"]]
    command += ["--delay", values["delay"], "--disable-keyboard-controls"]
    if values["start_paused"].lower() == "true":
        command.remove("--disable-keyboard-controls")
        command.append("--start-paused")
    return [*command, "--topics", *topics(robot)]


def node(values: Mapping[str, str]) -> NodeDescription:
    """The policy node, as ``robot.launch.py`` starts it, in the bag's time.

    Raises:
        InputError: a file of ours that a value names does not exist.
    """
    defaults = {argument.name: argument.default for argument in bringup.ARGUMENTS}
    given = {name: values[name] for name in _SHARED}
    described = bringup.nodes({**defaults, **given, "sim": "false", "use_sim_time": "true", "autostart": "true"})[0]
    described.parameters["dry_run"] = values["dry_run"].lower() == "true"
    return described
