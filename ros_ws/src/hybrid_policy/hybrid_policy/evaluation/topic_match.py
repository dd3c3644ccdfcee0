"""Which topic of a bag is which input of a robot file, and a precise word on what is not there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from hybrid_policy.control.robot_file import Camera, RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import BagTopic
from hybrid_policy.evaluation.message_types import CONTROLLER_STATE

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
JOINT_STATE, TRAJECTORY = "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory"
FLOATS, TWIST, STRING = (
    "std_msgs/msg/Float64MultiArray",
    "geometry_msgs/msg/TwistStamped",
    "std_msgs/msg/String",
)
#: Types that can say what the robot was told, the plainest first.
COMMANDS = (TRAJECTORY, CONTROLLER_STATE, FLOATS, TWIST, JOINT_STATE)


@dataclass(frozen=True)
class TopicMatch:
    """The bag's topics by role.

    cameras: robot file's camera name -> (bag topic, the camera with the type that the bag has).
    joints, prompt, command: bag topics; empty where the bag has none.
    lacks: one line for each thing that the bag lacks, saying what it has instead.
    notes: what was taken although it is not exactly what the robot file names.
    """

    cameras: Mapping[str, tuple[str, Camera]]
    joints: str = ""
    prompt: str = ""
    command: str = ""
    lacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def used(self) -> set[str]:
        """Every topic to read."""
        topics = {topic for topic, _ in self.cameras.values()}
        return {t for t in (*topics, self.joints, self.prompt, self.command) if t}


def match_topics(
    robot: RobotFile, topics: Mapping[str, BagTopic], remap: Mapping[str, str], command_topic: str = ""
) -> TopicMatch:
    """Find each input of ``robot`` among a bag's ``topics``.

    A name matches exactly, or under a namespace (``/arm_1/joint_states``) if only one does. An image
    topic may be there raw or as its ``/compressed`` sibling.

    Args:
        robot: the robot file.
        topics: the bag's topics by name.
        remap: robot file's topic -> bag's topic, as the user says.
        command_topic: the topic that holds what the robot was told; found by itself where empty.

    Raises:
        InputError: the user names a topic that the bag lacks.
    """
    for given in (*remap.values(), command_topic):
        if given and _find(given, topics) is None:
            raise InputError(f"{given}: no such topic in the bag, expected one of {_listed(topics.values())}")
    lacks: list[str] = []
    notes: list[str] = []
    cameras: dict[str, tuple[str, Camera]] = {}
    for camera in robot.cameras:
        found = _camera(camera, topics, remap, notes)
        if found is None:
            images = [t for t in topics.values() if t.type in (IMAGE, COMPRESSED)]
            lacks.append(
                f"camera {camera.name}: no topic {_shown(camera.topic, remap)}; image topics in the bag: "
                f"{_listed(images)}"
            )
        else:
            cameras[camera.name] = found
    joints = _typed(robot.joint_states_topic, JOINT_STATE, topics, remap)
    if not joints:
        states = [t for t in topics.values() if t.type == JOINT_STATE]
        lacks.append(
            f"joint states: no topic {_shown(robot.joint_states_topic, remap)} of type {JOINT_STATE}; "
            f"such topics in the bag: {_listed(states)}"
        )
    prompt = _typed(robot.prompt_topic, STRING, topics, remap)
    command = _command(robot, topics, remap, command_topic, joints, notes)
    return TopicMatch(cameras, joints, prompt, command, tuple(lacks), tuple(notes))


def _camera(
    camera: Camera, topics: Mapping[str, BagTopic], remap: Mapping[str, str], notes: list[str]
) -> tuple[str, Camera] | None:
    wanted = remap.get(camera.topic, camera.topic)
    bare = wanted.removesuffix("/compressed")
    for name in (wanted, f"{bare}/compressed", bare):
        topic = _find(name, topics)
        if topic is None or topic.type not in (IMAGE, COMPRESSED) or topic.count == 0:
            continue
        kind = "compressed" if topic.type == COMPRESSED else "image"
        if kind != camera.type:
            notes.append(f"camera {camera.name}: {topic.name} is {topic.type}; the robot file says {camera.type}")
        return topic.name, replace(camera, type=kind)
    return None


def _typed(wanted: str, kind: str, topics: Mapping[str, BagTopic], remap: Mapping[str, str]) -> str:
    topic = _find(remap.get(wanted, wanted), topics)
    return topic.name if topic is not None and topic.type == kind and topic.count != 0 else ""


def _command(
    robot: RobotFile,
    topics: Mapping[str, BagTopic],
    remap: Mapping[str, str],
    given: str,
    joints: str,
    notes: list[str],
) -> str:
    wanted = given or remap.get(robot.command.topic, robot.command.topic)
    topic = _find(wanted, topics)
    if topic is not None and topic.type in COMMANDS and topic.count != 0:
        return topic.name
    for kind in COMMANDS:
        found = [
            t
            for t in topics.values()
            if t.type == kind and t.count != 0 and t.name != joints and (kind != JOINT_STATE or _says_command(t))
        ]
        if len(found) == 1:
            notes.append(f"recorded actions: taken from {found[0].name} ({kind}), the robot file says {wanted}")
            return found[0].name
        if found:
            notes.append(f"recorded actions: {_listed(found)} might hold them; say --command-topic for one of these")
    return ""


def _says_command(topic: BagTopic) -> bool:
    """Whether a JointState topic's name says that it holds commands and not the joints themselves."""
    return any(word in topic.name for word in ("command", "action", "target", "leader", "goal"))


def _find(wanted: str, topics: Mapping[str, BagTopic]) -> BagTopic | None:
    relative = wanted.strip().removeprefix("~").strip("/")
    if not relative:
        return None
    exact = topics.get("/" + relative) or topics.get(relative)
    if exact is not None:
        return exact
    below = [topic for name, topic in topics.items() if name.endswith("/" + relative)]
    return below[0] if len(below) == 1 else None


def _shown(topic: str, remap: Mapping[str, str]) -> str:
    return f"/{remap.get(topic, topic).lstrip('/')}"


def _listed(topics: Collection[BagTopic]) -> str:
    names = sorted(topic.name for topic in topics)
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")) or "none"
