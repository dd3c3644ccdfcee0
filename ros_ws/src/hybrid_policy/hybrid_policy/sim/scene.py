"""What lies on the table: cubes, light and the arms' start. Plain data, no simulator."""

from __future__ import annotations

from dataclasses import dataclass

#: Joint names in the robot file's order: left arm, left gripper, right arm, right gripper.
ARM_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
JOINT_NAMES = tuple(f"{side}_{name}" for side in ("left", "right") for name in (*ARM_JOINTS, "gripper"))

#: Both arms at gym-aloha's start (rad, gripper m): half folded, the grippers level and nearly closed.
HOME = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.024) * 2

#: Half an edge of a cube, as gym-aloha's own cube has it (m).
CUBE_HALF = 0.02

#: Where cubes are put, seen from the world's origin (m): 22 x 20 cm in front of the right arm.
AREA_X = (-0.02, 0.20)
AREA_Y = (0.40, 0.60)

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "green": (0.0, 0.75, 0.0),
    "yellow": (0.95, 0.85, 0.0),
}


@dataclass(frozen=True)
class Cube:
    """One cube. colour: its name, as a prompt says it; rgb: its shade in [0, 1]; metres and rad."""

    colour: str
    x: float
    y: float
    yaw: float = 0.0
    half: float = CUBE_HALF
    rgb: tuple[float, float, float] | None = None

    @property
    def shade(self) -> tuple[float, float, float]:
        """The rgb that is rendered: ``rgb``, or the plain colour of that name."""
        return self.rgb if self.rgb is not None else COLOURS[self.colour]


@dataclass(frozen=True)
class Look:
    """What the cameras see besides the cubes. 1.0 is gym-aloha's own light; table: rgb of the table top."""

    ambient: float = 1.0
    diffuse: float = 1.0
    table: tuple[float, float, float] = (0.2, 0.2, 0.2)


@dataclass(frozen=True)
class Scene:
    """Cubes on the table, the prompt that names one of them, and how the episode starts.

    target: the colour that the prompt names.
    start: 14 joint positions in the order of JOINT_NAMES (rad; grippers m).
    """

    cubes: tuple[Cube, ...]
    target: str
    prompt: str
    start: tuple[float, ...] = HOME
    look: Look = Look()
