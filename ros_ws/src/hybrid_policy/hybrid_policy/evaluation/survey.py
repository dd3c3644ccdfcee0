"""One pass over a bag before anything is replayed: what is in it, how good, and by which clock to read it.

The pass keeps stamps and joint values, never images, so its memory grows with minutes, not gigabytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control import ingest
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import BagMessage, BagSource
from hybrid_policy.evaluation.message_types import Decoder
from hybrid_policy.evaluation.recorded_actions import RecordedActions
from hybrid_policy.evaluation.topic_match import JOINT_STATE, TopicMatch

#: ns: a stamp further back than this is a clock that was reset.
RESET = 500_000_000
#: ns: record times and stamps further apart than this belong to different clocks (sim and wall time).
CLOCKS_APART = 2_000_000_000
#: A gap is an interval longer than this many expected ones.
GAP = 2.5
_MOST_NAMES = 4096


@dataclass
class TopicSurvey:
    """One input: its stamps and what was wrong with it. Times are nanoseconds on the replay's clock.

    stamps: header stamps. arrivals: record times. zero_stamps: messages without a stamp.
    refused: reason -> count, of messages that the live node would drop too; examples: one of each in full.
    """

    name: str
    type: str
    role: str
    expected_rate: float
    messages: int = 0
    zero_stamps: int = 0
    resets: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    stamps: list[int] = field(default_factory=list)
    arrivals: list[int] = field(default_factory=list)

    def refuse(self, error: InputError) -> None:
        """Count a message that cannot be used."""
        kind = kind_of(error)
        self.refused[kind] += 1
        self.examples.setdefault(kind, str(error))

    def gaps(self) -> list[tuple[int, float]]:
        """(stamp before the gap, seconds) of every interval longer than 2.5 expected ones."""
        stamps = np.array(self.stamps, dtype=np.int64)
        if len(stamps) < 2 or self.expected_rate <= 0:
            return []
        steps = np.diff(stamps)
        wide = np.flatnonzero(steps > GAP * 1e9 / self.expected_rate)
        return [(int(stamps[i]), float(steps[i] * 1e-9)) for i in wide]

    def rate(self) -> float:
        """Messages per second by their stamps; 0 for fewer than two."""
        if len(self.stamps) < 2:
            return 0.0
        steps = np.diff(np.array(self.stamps, dtype=np.int64))
        span = float(steps[steps > 0].sum()) * 1e-9
        return (len(self.stamps) - 1) / span if span > 0 else 0.0


def kind_of(error: InputError) -> str:
    """The kind of a fault without its values, so that 10,000 NaNs are one line."""
    text = str(error)
    return text.partition(" given")[0].rpartition(":")[0] if " given" in text else text[:60]


@dataclass
class Survey:
    """What one bag holds for one robot.

    clock: ``record`` (arrival = record time) or ``stamp`` (arrival = header stamp, where the recorder's
        clock is another than the robot's).
    lacks: what keeps the policy from being replayed; empty where it can be.
    joint_times, joints: int64 [n], float64 [n, joints] in the robot file's order; empty where the bag's
        joint states do not name the robot's joints.
    joint_names: the names in the bag's joint states, whatever the robot file says.
    """

    match: TopicMatch
    topics: dict[str, TopicSurvey]
    clock: str
    start: int
    end: int
    lacks: list[str]
    notes: list[str]
    actions: RecordedActions
    joint_times: NDArray[np.int64]
    joints: NDArray[np.float64]
    joint_names: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Length on the replay's clock."""
        return max(0, self.end - self.start) * 1e-9


def survey(source: BagSource, robot: RobotFile, match: TopicMatch) -> Survey:
    """Read every used topic once.

    Raises:
        InputError: the bag holds no message at all.
    """
    decoder = Decoder(source.topics)
    topics = _inputs(robot, match)
    lacks, notes = list(match.lacks), list(match.notes)
    for topic in list(topics.values()):
        if not decoder.knows(topic.type):
            lacks.append(f"{topic.name}: type {topic.type} has no definition in the bag and is no standard one")
    state = _Reading(robot, match, decoder, topics)
    for message in source.messages(match.used or list(source.topics)):
        state.take(message)
    if not state.count:
        if not source.topics and source.problems:
            raise InputError("\n".join(source.problems))
        found = ", ".join(sorted(source.topics)) or "none"
        why = "".join(f"\n{line}" for line in source.problems)
        raise InputError(f"{source.path}: no message on any topic that counts (topics: {found}){why}")
    return state.finish(lacks, notes)


def _inputs(robot: RobotFile, match: TopicMatch) -> dict[str, TopicSurvey]:
    found = {}
    for name, (topic, camera) in match.cameras.items():
        kind = "sensor_msgs/msg/CompressedImage" if camera.type == "compressed" else "sensor_msgs/msg/Image"
        found[topic] = TopicSurvey(topic, kind, f"camera {name}", camera.rate)
    if match.joints:
        found[match.joints] = TopicSurvey(match.joints, JOINT_STATE, "joints", robot.joint_states_rate)
    return found


class _Reading:
    """The state of a survey while messages come in."""

    def __init__(self, robot: RobotFile, match: TopicMatch, decoder: Decoder, topics: dict[str, TopicSurvey]) -> None:
        self.robot, self.match, self.decoder, self.topics = robot, match, decoder, topics
        self.cameras = {topic: camera for topic, camera in match.cameras.values()}
        self.actions = RecordedActions(robot.command_names)
        self.command_errors: Counter[str] = Counter()
        self.pending: list[tuple[str, Any, int, int, int]] = []
        self.joint_rows: list[NDArray[np.float64]] = []
        self.joint_rows_at: list[tuple[int, int]] = []
        self.segment = 0
        self.newest = 0
        self.joint_names: tuple[str, ...] = ()
        self.names_seen: set[str] = set()
        self.most_positions = 0
        self.count = 0
        self.offsets: list[int] = []
        self.first: int | None = None
        self.last = 0

    def take(self, message: BagMessage) -> None:
        self.count += 1
        self.first = message.t_ns if self.first is None else min(self.first, message.t_ns)
        self.last = max(self.last, message.t_ns)
        topic = self.topics.get(message.topic)
        if topic is not None:
            topic.messages += 1
        try:
            decoded = self.decoder.decode(message)
        except InputError as error:
            if topic is not None:
                topic.refuse(error)
            return
        if message.topic == self.match.command:
            at_stamp = stamp_or_zero(decoded) or self.newest or message.t_ns
            self.pending.append((message.type, decoded, message.t_ns, at_stamp, self.segment))
        if topic is None:
            return
        stamp = stamp_or_zero(decoded)
        if stamp == 0:
            topic.zero_stamps += 1
            stamp = message.t_ns
        else:
            self.offsets.append(message.t_ns - stamp)
        if topic.stamps and stamp < topic.stamps[-1] - RESET:
            topic.resets += 1
            self.segment = max(self.segment, topic.resets)
        self.newest = stamp
        try:
            if topic.role == "joints":
                self._joints(decoded, stamp)
            else:
                ingest.check_image(decoded, self.cameras[message.topic])
        except InputError as error:
            topic.refuse(error)
            return
        topic.stamps.append(stamp)
        topic.arrivals.append(message.t_ns)

    def _joints(self, message: Any, stamp: int) -> None:
        named = getattr(message, "name", ())
        self.most_positions = max(self.most_positions, len(getattr(message, "position", ())))
        if not self.joint_rows and len(self.names_seen) < _MOST_NAMES:
            self.names_seen.update(str(name) for name in named)
        if len(named) > len(self.joint_names):
            self.joint_names = tuple(str(name) for name in named)
        self.joint_rows.append(ingest.joint_positions(message, self.robot.joint_names))
        self.joint_rows_at.append((stamp, self.segment))

    def finish(self, lacks: list[str], notes: list[str]) -> Survey:
        clock = self._clock(notes)
        for topic in self.topics.values():
            self._judge(topic, lacks, notes)
        at = np.array([pair[0] for pair in self.joint_rows_at], dtype=np.int64)
        width = len(self.robot.joint_names)
        rows = np.array(self.joint_rows).reshape(-1, width)
        self._actions(clock, rows, notes)
        used = [t for topic in self.topics.values() for t in (topic.stamps if clock == "stamp" else topic.arrivals)]
        start, end = (min(used), max(used)) if used else (self.first or 0, self.last)
        return Survey(
            self.match, self.topics, clock, start, end, lacks, notes, self.actions, at, rows, self.joint_names
        )

    def _clock(self, notes: list[str]) -> str:
        if not self.offsets:
            return "record"
        if self.segment:
            return "stamp"
        apart = float(np.median(np.abs(np.array(self.offsets, dtype=np.int64))))
        if apart <= CLOCKS_APART:
            return "record"
        notes.append(
            f"header stamps and record times are {apart * 1e-9:.4g} s apart (median): another clock, such as "
            "sim time; the replay follows the stamps"
        )
        return "stamp"

    def _judge(self, topic: TopicSurvey, lacks: list[str], notes: list[str]) -> None:
        if topic.messages == 0:
            lacks.append(f"{topic.role}: {topic.name} has no message")
            return
        if not topic.stamps:
            kind = topic.refused.most_common(1)[0][0]
            more = self._about_joints(topic) if topic.role == "joints" else ""
            lacks.append(
                f"{topic.role}: none of {topic.messages} messages on {topic.name} can be used: "
                f"{topic.examples[kind]}{more}"
            )
            return
        if topic.zero_stamps:
            notes.append(
                f"{topic.name}: {topic.zero_stamps} of {topic.messages} messages have a stamp of 0; the live "
                "node drops such messages, the replay takes their record times"
            )
        if topic.resets:
            notes.append(f"{topic.name}: the clock was set back {topic.resets} times; the replay starts anew at each")
        for kind, count in topic.refused.most_common(5):
            notes.append(f"{topic.name}: {count} of {topic.messages} messages left out: {topic.examples[kind]}")

    def _about_joints(self, topic: TopicSurvey) -> str:
        """What a person needs to know whose joint states are all refused."""
        if not self.names_seen:
            if not self.most_positions:
                return ""
            return "; the messages do not name their joints, so none can be told from another"
        if not self.most_positions:
            return "; the messages carry no positions (velocities or efforts alone say nothing of where the arm is)"
        if set(self.robot.joint_names) <= set(self.joint_names):
            return ""
        if set(self.robot.joint_names) <= self.names_seen:
            return "; they are all there, but in different messages: the node needs them in one (joint_state_publisher)"
        return f"; the bag's joints are {', '.join(self.joint_names)}"

    def _actions(self, clock: str, rows: NDArray[np.float64], notes: list[str]) -> None:
        for kind, message, arrival, stamp, segment in self.pending:
            try:
                self.actions.add(kind, message, stamp if clock == "stamp" else arrival, segment)
            except InputError as error:
                self.command_errors[str(error)] += 1
        for text, count in self.command_errors.most_common(3):
            notes.append(f"{self.match.command}: {count} of {len(self.pending)} messages left out: {text}")
        if len(self.actions):
            self.actions.source = self.match.command
        elif len(rows) and self.robot.command.interface != "twist":
            self.actions.source = "measured joint positions"
            notes.append(
                "recorded actions: no usable command topic; the positions that the joints reached stand in for them"
            )
            for (time, segment), row in zip(self.joint_rows_at, rows):
                self.actions.add_positions(time, row[self.robot.command_index], segment)
        else:
            notes.append("recorded actions: none, so the policy is compared with nothing recorded")


def stamp_or_zero(message: Any) -> int:
    """Nanoseconds of the header's stamp; 0 where the message has none."""
    try:
        return int(message.header.stamp.sec) * 1_000_000_000 + int(message.header.stamp.nanosec)
    except (AttributeError, TypeError, ValueError):
        return 0
