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
_COMMAND_WORDS = ("command", "action", "target", "leader", "goal")
#: Words in a topic's name or type that make one look for commands there.
_UNREAD_WORDS = (*_COMMAND_WORDS, "cmd", "jog", "trajectory", "servo")


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
    topic may be there raw or as its ``/compressed`` sibling. Joint states of another name are taken where
    the bag has one such topic alone.

    Args:
        robot: the robot file.
        topics: the bag's topics by name.
        remap: robot file's topic -> bag's topic, as the user says.
        command_topic: the topic that holds what the robot was told; found by itself where empty.

    Raises:
        InputError: the user names a topic that the bag lacks, or remaps one that the robot file does not have.
    """
    for given in (*remap.values(), command_topic):
        if given and _find(given, topics) is None:
            raise InputError(f"{given}: no such topic in the bag, expected one of {_listed(topics.values())}")
    wanted = [*(c.topic for c in robot.cameras), robot.joint_states_topic, robot.prompt_topic, robot.command.topic]
    remap = {_own_name(given, wanted): topic for given, topic in remap.items()}
    finder = _Finder(topics, remap)
    cameras = {c.name: found for c in robot.cameras if (found := finder.camera(c)) is not None}
    for camera in robot.cameras:
        if camera.name not in cameras:
            finder.lacks_camera(camera, {topic for topic, _ in cameras.values()})
    joints = finder.joints(robot.joint_states_topic)
    prompt = finder.typed(robot.prompt_topic, STRING)
    if prompt:
        finder.say_namespace("prompt", robot.prompt_topic, prompt)
    command = finder.command(robot, command_topic, joints)
    return TopicMatch(cameras, joints, prompt, command, tuple(finder.lacks), tuple(finder.notes))


def _own_name(given: str, wanted: Collection[str]) -> str:
    """The robot file's own writing of a topic that the user remaps: with a leading slash or without."""
    name = next((name for name in wanted if name.strip("/") == given.strip("/")), None)
    if name is None:
        raise InputError(f"--remap: {given} given, expected a topic of the robot file: {', '.join(wanted)}")
    return name


class _Finder:
    """Looks for one input after another, and keeps what there is to say."""

    def __init__(self, topics: Mapping[str, BagTopic], remap: Mapping[str, str]) -> None:
        self.topics, self.remap = topics, remap
        self.lacks: list[str] = []
        self.notes: list[str] = []

    def wanted(self, topic: str) -> str:
        return self.remap.get(topic, topic)

    def camera(self, camera: Camera) -> tuple[str, Camera] | None:
        bare = self.wanted(camera.topic).removesuffix("/compressed")
        for name in (self.wanted(camera.topic), f"{bare}/compressed", bare):
            topic = _find(name, self.topics)
            if topic is None or topic.type not in (IMAGE, COMPRESSED) or topic.count == 0:
                continue
            kind = "compressed" if topic.type == COMPRESSED else "image"
            if kind != camera.type:
                self.notes.append(
                    f"camera {camera.name}: {topic.name} is {topic.type}; the robot file says {camera.type}"
                )
            else:
                self.say_namespace(f"camera {camera.name}", camera.topic, topic.name)
            return topic.name, replace(camera, type=kind)
        return None

    def lacks_camera(self, camera: Camera, taken: Collection[str]) -> None:
        """Say what there is instead; ``taken``: the topics of the other cameras."""
        images = [t for t in self.topics.values() if t.type in (IMAGE, COMPRESSED)]
        absent = self._absent(f"camera {camera.name}", camera.topic, (IMAGE, COMPRESSED))
        free = [t for t in images if t.name not in taken and "depth" not in t.name.lower()]
        self.lacks.append(f"{absent}; image topics in the bag: {_listed(images)}{self._how(camera.topic, free)}")

    def joints(self, topic: str) -> str:
        found = self.typed(topic, JOINT_STATE)
        if found:
            self.say_namespace("joint states", topic, found)
            return found
        states = [t for t in self.topics.values() if t.type == JOINT_STATE]
        alone = [t for t in states if t.count != 0 and not _says_command(t)]
        if topic not in self.remap and len(alone) == 1:
            self.notes.append(f"joint states: taken from {alone[0].name}, the robot file says {_shown(topic)}")
            return alone[0].name
        absent = self._absent("joint states", topic, (JOINT_STATE,))
        line = f"{absent}; such topics in the bag: {_listed(states)}{self._how(topic, states)}"
        if not states:
            line += f"; the bag has {_typed_list(self.topics.values())}"
        self.lacks.append(line)
        return ""

    def typed(self, topic: str, kind: str) -> str:
        found = _find(self.wanted(topic), self.topics)
        return found.name if found is not None and found.type == kind and found.count != 0 else ""

    def command(self, robot: RobotFile, given: str, joints: str) -> str:
        wanted = given or self.wanted(robot.command.topic)
        topic = _find(wanted, self.topics)
        if topic is not None and topic.type in COMMANDS and topic.count != 0:
            if not given:
                self.say_namespace("recorded actions", robot.command.topic, topic.name)
            return topic.name
        if given and topic is not None:
            self.notes.append(f"recorded actions: {topic.name} is {topic.type}, expected {' or '.join(COMMANDS)}")
            return ""
        states = _find(robot.joint_states_topic, self.topics)
        taken = {joints, "" if states is None else states.name}
        for kind in COMMANDS:
            found = [
                t
                for t in self.topics.values()
                if t.type == kind and t.count != 0 and t.name not in taken and (kind != JOINT_STATE or _says_command(t))
            ]
            if len(found) == 1:
                self.notes.append(
                    f"recorded actions: taken from {found[0].name} ({kind}), the robot file says {wanted}"
                )
                return found[0].name
            if found:
                self.notes.append(
                    f"recorded actions: {_listed(found)} might hold them; say --command-topic for one of these"
                )
        unread = [t for t in self.topics.values() if t.type not in COMMANDS and t.name not in taken and _looks_told(t)]
        if unread:
            self.notes.append(
                f"recorded actions: {_typed_list(unread)} cannot be read as commands, expected one of "
                f"{', '.join(kind.rpartition('/')[2] for kind in COMMANDS)}"
            )
        return ""

    def say_namespace(self, what: str, topic: str, found: str) -> None:
        """A word where a topic was found below a namespace."""
        if topic not in self.remap and found.strip("/") != _relative(topic):
            self.notes.append(f"{what}: found as {found}, the robot file says {_shown(topic)}")

    def _absent(self, what: str, topic: str, kinds: tuple[str, ...]) -> str:
        """Why a topic cannot be used: it is not there, is of another type, or has no message."""
        there = _find(self.wanted(topic), self.topics)
        expected = " or ".join(kinds)
        if there is None:
            return f"{what}: no topic {_shown(self.wanted(topic))}" + (
                f" of type {expected}" if len(kinds) == 1 else ""
            )
        if there.type in kinds:
            return f"{what}: {there.name} has no message"
        return f"{what}: {there.name} is {there.type}, expected {expected}"

    def _how(self, topic: str, candidates: Collection[BagTopic]) -> str:
        """The option that says which topic it is: whole where there is one alone to say."""
        names = [t.name for t in candidates if t.count != 0]
        return f"; say which with --remap {topic}:={names[0] if len(names) == 1 else 'TOPIC'}" if names else ""


def _says_command(topic: BagTopic) -> bool:
    """Whether a JointState topic's name says that it holds commands and not the joints themselves."""
    return any(word in topic.name for word in _COMMAND_WORDS)


def _looks_told(topic: BagTopic) -> bool:
    return topic.count != 0 and any(word in f"{topic.name} {topic.type}".lower() for word in _UNREAD_WORDS)


def _relative(topic: str) -> str:
    return topic.strip().removeprefix("~").strip("/")


def _find(wanted: str, topics: Mapping[str, BagTopic]) -> BagTopic | None:
    relative = _relative(wanted)
    if not relative:
        return None
    exact = topics.get("/" + relative) or topics.get(relative)
    if exact is not None:
        return exact
    below = [topic for name, topic in topics.items() if name.endswith("/" + relative)]
    return below[0] if len(below) == 1 else None


def _shown(topic: str) -> str:
    return f"/{topic.lstrip('/')}"


def _listed(topics: Collection[BagTopic]) -> str:
    return _cut([topic.name for topic in topics])


def _typed_list(topics: Collection[BagTopic]) -> str:
    return _cut([f"{topic.name} ({topic.type})" for topic in topics])


def _cut(names: list[str]) -> str:
    names = sorted(names)
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")) or "none"
