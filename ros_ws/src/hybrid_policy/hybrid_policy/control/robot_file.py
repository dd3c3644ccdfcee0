"""The robot file: what one robot publishes, obeys and allows. Strict, and converted once, here.

Everything that the node knows about a robot comes from this file: which topic is which of the
policy's cameras, the joints with their order and limits, how the checkpoint's numbers relate to the
robot's, and how commands leave. A key that is not known, a key that is missing and a value of the
wrong type are each one :class:`InputError` line ``file: key: value given, expected ...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.strict_yaml import Section, load_mapping
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import PolicySpec

INTERFACES = ("joint_trajectory", "forward_position", "twist")
ENCODINGS = ("rgb8", "bgr8", "mono8", "rgba8", "bgra8")
TWIST_AXES = ("x", "y", "z", "roll", "pitch", "yaw")


@dataclass(frozen=True)
class Camera:
    """One camera: ``name`` is the policy's name for it, ``rate`` the frames per second expected.

    encodings: those accepted of a ``sensor_msgs/Image``; unused where ``type`` is ``compressed``.
    frozen_after: seconds of identical frames, while the robot moves, that mean a frozen camera; 0: never
        (a simulated camera has no noise, so nothing can be told from identical frames).
    """

    name: str
    topic: str
    type: str = "image"
    rate: float = 30.0
    encodings: tuple[str, ...] = ENCODINGS
    frozen_after: float = 1.0


@dataclass(frozen=True)
class Joint:
    """One joint's limits: rad (or m), per s, per s^2; None where the file does not say.

    max_jump: the largest distance between the command now and a new chunk's action due now; a chunk
        beyond it is refused as a whole. None: no such limit (the velocity limit still holds).
    """

    name: str
    min: float | None = None
    max: float | None = None
    max_velocity: float | None = None
    max_acceleration: float | None = None
    max_jump: float | None = None


@dataclass(frozen=True)
class Convention:
    """The checkpoint's value of a joint is ``(position - offset) * scale``."""

    offset: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Gripper:
    """Where the gripper's command goes when it has a topic of its own (std_msgs/Float64MultiArray).

    joints: for ``forward_position``: the joints that leave on this topic and not on the main one.
    open, closed: for ``twist``: the positions published for the action values ``open_value`` and
        ``closed_value`` (LIBERO: -1 and 1), linear in between, never beyond.
    """

    topic: str
    joints: tuple[str, ...] = ()
    open: float = 1.0
    closed: float = 0.0
    open_value: float = -1.0
    closed_value: float = 1.0


@dataclass(frozen=True)
class Command:
    """How commands leave. ``rate``: ticks per second of the control thread.

    For ``twist`` (geometry_msgs/TwistStamped in ``frame``): one unit of an action is ``linear_scale``
    metres or ``angular_scale`` radians in one policy period; the speeds are limited to ``max_linear``
    (m/s) and ``max_angular`` (rad/s).
    """

    interface: str
    topic: str
    rate: float
    gripper: Gripper | None = None
    frame: str = "base_link"
    linear_scale: float = 1.0
    angular_scale: float = 1.0
    max_linear: float = 0.25
    max_angular: float = 1.0


@dataclass(frozen=True)
class Timeouts:
    """Seconds; ``action`` is what happens when an input is older: hold, zero (twist only) or none."""

    camera: float
    joint_states: float
    skew: float
    action: str = "hold"


@dataclass(frozen=True)
class Limits:
    """The limits of every commanded value, float64 [commands] each; infinite where there is none."""

    names: tuple[str, ...]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    velocity: NDArray[np.float64]
    acceleration: NDArray[np.float64]
    jump: NDArray[np.float64]


@dataclass(frozen=True)
class RobotFile:
    """A robot, as its file describes it; see ``config/robots/sim_aloha.yaml`` for the form.

    action_conventions: of the joints whose actions are scaled otherwise than their states (``aloha.yaml``).
    """

    name: str
    cameras: tuple[Camera, ...]
    joints: tuple[Joint, ...]
    joint_states_topic: str
    joint_states_rate: float
    prompt_topic: str
    prompt: str
    rate: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    conventions: Mapping[str, Convention]
    command: Command
    timeouts: Timeouts
    action_conventions: Mapping[str, Convention] = field(default_factory=dict)
    description: str = ""
    source: str = ""
    robot_description_topic: str = ""
    path: Path = field(default_factory=Path)

    @classmethod
    def load(cls, path: str | Path) -> RobotFile:
        """Read and check a robot file.

        Raises:
            InputError: the file cannot be read, or a key is unknown, missing or of the wrong type.
        """
        from hybrid_policy.control.robot_file_form import read_robot

        return read_robot(Section(load_mapping(Path(path)), Path(path), ""))

    @property
    def period(self) -> int:
        """Nanoseconds between two actions of a chunk."""
        return round(1e9 / self.rate)

    @cached_property
    def joint_names(self) -> tuple[str, ...]:
        """Every joint that must be in a joint state, in the file's order."""
        return tuple(joint.name for joint in self.joints)

    @cached_property
    def command_names(self) -> tuple[str, ...]:
        """What a command commands: joints in the file's order, or the twist's axes and the gripper."""
        if self.command.interface == "twist":
            return (*TWIST_AXES, *(("gripper",) if "gripper" in self.action_names else ()))
        return tuple(name for name in self.joint_names if name in self.action_names)

    @cached_property
    def command_index(self) -> NDArray[np.intp]:
        """Position in ``joint_names`` of each commanded joint; empty for ``twist``."""
        names = () if self.command.interface == "twist" else self.command_names
        return np.array([self.joint_names.index(name) for name in names], dtype=np.intp)

    @cached_property
    def _conversion(self) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
        index = np.array([self.joint_names.index(name) for name in self.state_names], dtype=np.intp)
        used = [self.conventions.get(name, Convention()) for name in self.state_names]
        return index, np.array([c.offset for c in used]), np.array([c.scale for c in used])

    @cached_property
    def _inverse(self) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
        order = [self.action_names.index(n) for n in self.command_names if n in self.action_names]
        if self.command.interface == "twist":
            unit = [self.command.linear_scale * self.rate] * 3 + [self.command.angular_scale * self.rate] * 3
            offset, scale = [0.0] * 6, [1.0 / value for value in unit]
            if "gripper" in self.action_names and self.command.gripper is not None:
                grip = self.command.gripper
                slope = (grip.closed - grip.open) / (grip.closed_value - grip.open_value)
                scale.append(1.0 / slope)
                offset.append(grip.open - grip.open_value * slope)
        else:
            both = {**self.conventions, **self.action_conventions}
            used = [both.get(name, Convention()) for name in self.command_names]
            offset, scale = [c.offset for c in used], [c.scale for c in used]
        return np.array(order, dtype=np.intp), np.array(offset), np.array(scale)

    def state(self, joints: NDArray[np.float64]) -> NDArray[np.float32]:
        """float64 [joints] (the file's order; rad, m) -> float32 [state], the checkpoint's own numbers."""
        index, offset, scale = self._conversion
        return ((joints[index] - offset) * scale).astype(np.float32)

    def commands(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        """The checkpoint's actions (float [..., action_dim]) -> commands, float64 [..., commands].

        Joint positions in rad or m in the order of ``command_names``; for ``twist``: m/s, rad/s and
        the gripper's position.
        """
        order, offset, scale = self._inverse
        return actions[..., order].astype(np.float64) / scale + offset

    def actions(self, commands: NDArray[np.float64]) -> NDArray[np.float32]:
        """The inverse of :meth:`commands`: float64 [..., commands] -> float32 [..., action_dim]."""
        order, offset, scale = self._inverse
        actions = np.empty(commands.shape, dtype=np.float32)
        actions[..., order] = (commands - offset) * scale
        return actions

    @cached_property
    def limits(self) -> Limits:
        """The limits of the commanded values, in the order of ``command_names``."""
        if self.command.interface == "twist":
            grip = self.command.gripper
            bound = [self.command.max_linear] * 3 + [self.command.max_angular] * 3
            lower, upper = [-value for value in bound], list(bound)
            if "gripper" in self.action_names and grip is not None:
                lower.append(min(grip.open, grip.closed))
                upper.append(max(grip.open, grip.closed))
            none = np.full(len(lower), np.inf)
            return Limits(self.command_names, np.array(lower), np.array(upper), none, none, none)
        joints = [self.joints[i] for i in self.command_index]

        def column(values: list[float | None], missing: float) -> NDArray[np.float64]:
            return np.array([missing if value is None else value for value in values], dtype=np.float64)

        return Limits(
            names=self.command_names,
            lower=column([j.min for j in joints], -np.inf),
            upper=column([j.max for j in joints], np.inf),
            velocity=column([j.max_velocity for j in joints], np.inf),
            acceleration=column([j.max_acceleration for j in joints], np.inf),
            jump=column([j.max_jump for j in joints], np.inf),
        )

    def with_joints(self, joints: tuple[Joint, ...]) -> RobotFile:
        """A copy with other limits (those read from a robot description)."""
        return replace(self, joints=joints)

    def policy_cameras(self, spec: PolicySpec) -> tuple[Camera, ...]:
        """The cameras that this checkpoint looks through, in the checkpoint's order."""
        by_name = {camera.name: camera for camera in self.cameras}
        return tuple(by_name[name] for name in spec.cameras)


def check_fit(robot: RobotFile, spec: PolicySpec) -> None:
    """Hold a robot file against a checkpoint before anything runs.

    Raises:
        InputError: one line for each thing that does not fit: a camera that the checkpoint needs and
            the file lacks, or another number of state or action values.
    """
    problems = []
    names = [camera.name for camera in robot.cameras]
    for camera in spec.cameras:
        if camera not in names:
            problems.append(
                f"{robot.path}: cameras: {', '.join(names)} given, expected {camera} too ({spec.name} needs it)"
            )
    for key, have, want in (
        ("policy.state", len(robot.state_names), spec.state_dim),
        ("policy.action", len(robot.action_names), spec.action_dim),
    ):
        if have != want:
            problems.append(f"{robot.path}: {key}: {have} names given, expected {want} (the checkpoint {spec.name})")
    if problems:
        raise InputError("\n".join(problems))
