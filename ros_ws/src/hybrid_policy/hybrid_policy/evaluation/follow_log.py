"""A run again, inference by inference, as its latency log says it went.

The log names, for each chunk, the stamps of the inputs it was inferred from, when inference started and when
the chunk came into force. With the bag recorded meanwhile the same observations, noise and continuations
go through the same cycle, so the trajectories must be those that the node published. What the node
published beside chunks (one point: it held) is taken from the bag, as no log says when a watchdog barked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control import ingest
from hybrid_policy.control.chunk_timeline import Trajectory
from hybrid_policy.control.observation_buffer import JOINTS, Snapshot
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import BagMessage, BagSource
from hybrid_policy.evaluation.message_types import Decoder
from hybrid_policy.evaluation.node_parameters import NodeParameters
from hybrid_policy.evaluation.policy_pass import PolicyPass
from hybrid_policy.evaluation.replay_record import Running, Score
from hybrid_policy.evaluation.survey import Survey, stamp_or_zero
from hybrid_policy.evaluation.topic_match import TRAJECTORY
from hybrid_policy.models.observation import ActionChunk, Continuation, Policy

Array = NDArray[np.float64]
#: (record time, float64 [points, joints]) of a published trajectory.
Sent = tuple[int, Array]
#: Messages of each input kept while the log's inferences are matched.
_KEEP = 512
#: ns: inputs that have not come this long after an inference started are not in the bag.
_PATIENCE = 2_000_000_000
#: ns: a published trajectory is recorded within this of its chunk coming into force.
_PUBLISHED_WITHIN = 200_000_000


class FollowLog(PolicyPass):
    """One pass along a latency log. ``pairs`` holds (replayed trajectory, published positions or None).

    unmatched: chunks of the log whose inputs the bag lacks; from the first of them on, what follows may
    differ from the run, as it continues another chunk.
    """

    def __init__(
        self,
        robot: RobotFile,
        policy: Policy,
        known: Survey,
        *,
        node: NodeParameters,
        log: Sequence[Mapping[str, Any]],
        sent: Sequence[Sent],
        recipe: str,
        score: Score,
    ) -> None:
        """Set up.

        Raises:
            InputError: the checkpoint does not fit the robot file, or the log lacks ``finished``.
        """
        super().__init__(robot, policy, known, node=node, recipe=recipe, score=score)
        if any(not record.get("finished") for record in log):
            raise InputError("latency log: chunks without finished, expected the log of this version's node")
        self._log = deque(log)
        self._sent = list(sent)
        self._next_sent = 0
        self._last_chunk: ActionChunk | None = None
        self._kept: dict[str, deque[tuple[int, Any]]] = {
            name: deque(maxlen=_KEEP) for name in (*self._roles.values(), JOINTS)
        }
        self._ticked = 0
        self.pairs: list[tuple[Trajectory, Array | None]] = []
        self.unmatched: list[int] = []

    def run(self, source: BagSource) -> Iterator[float]:
        """Replay; yields the seconds of the bag done so far."""
        decoder = Decoder(source.topics)
        first: int | None = None
        last = 0
        for message in source.messages(self._topics - {self._known.match.prompt}):
            try:
                decoded = decoder.decode(message)
            except InputError:
                continue
            first = message.t_ns if first is None else first
            last = message.t_ns
            self._keep(message, decoded)
            self._serve(last)
            yield (last - first) * 1e-9
        self._serve(last + 2 * _PATIENCE)
        self._close(last)

    def _keep(self, message: BagMessage, decoded: Any) -> None:
        stamp = stamp_or_zero(decoded)
        if message.topic != self._known.match.joints:
            self._kept[self._roles[message.topic]].append((stamp, decoded))
            return
        try:
            self._buffer.receive_joints(decoded)
            positions = ingest.joint_positions(decoded, self._robot.joint_names)
        except InputError:
            return
        self._kept[JOINTS].append((stamp, positions))

    def _serve(self, now: int) -> None:
        """Every inference of the log whose inputs have come, in the log's order."""
        while self._log:
            record = self._log[0]
            snapshot = self._snapshot(record["stamps"])
            if snapshot is None:
                if now < int(record["started"]) + _PATIENCE:
                    return
                self.unmatched.append(int(record["chunk"]))
                self._log.popleft()
                continue
            self._log.popleft()
            self._again(record, snapshot)

    def _snapshot(self, stamps: Mapping[str, int]) -> Snapshot | None:
        chosen: dict[str, Any] = {}
        for name, kept in self._kept.items():
            found = next((message for stamp, message in reversed(kept) if stamp == stamps.get(name)), None)
            if found is None:
                return None
            chosen[name] = found
        used = {name: int(stamps[name]) for name in chosen}
        skew = (max(used.values()) - min(used.values())) * 1e-9
        images = {name: message for name, message in chosen.items() if name != JOINTS}
        return Snapshot(images, chosen[JOINTS], used, skew)

    def _again(self, record: Mapping[str, Any], snapshot: Snapshot) -> None:
        started, finished = int(record["started"]), int(record["finished"])
        self._tick_until(finished)
        self._buffer.set_prompt(str(record.get("prompt", "")))
        try:
            observation = self._buffer.observe(snapshot)
        except InputError as error:
            self.run_record.damaged[str(error)] += 1
            return
        noise, _ = self._cycle.prepare(observation)
        previous = None
        if record["consumed"] > 0 and self._last_chunk is not None:
            normalised = self._last_chunk.normalised
            previous = Continuation(normalised, float(record["consumed"]), int(record["delay"]))
        ages = {name: (started - stamp) * 1e-9 for name, stamp in snapshot.stamps.items()}
        running = Running(observation, noise, previous, started, finished, snapshot.skew, ages)
        message = self._published(record) if record["accepted"] else None
        reason = str(record.get("reason", ""))
        result = self._complete(running, reason if reason.startswith("discarded") else "")
        if result.trajectory is not None:
            self.pairs.append((result.trajectory, message))
            self._last_chunk = result.chunk
            if message is None:  # nobody heard it: the node then forgets it as well
                self._cycle.timeline.clear()

    def _published(self, record: Mapping[str, Any]) -> Array | None:
        """The message that this chunk went out as; holds published before it are applied on the way."""
        finished = int(record["finished"])
        points = self._policy.spec.horizon - int(record["cut"])
        at = self._next_sent
        while at < len(self._sent) and self._sent[at][0] <= finished + _PUBLISHED_WITHIN:
            arrived, positions = self._sent[at]
            if arrived >= finished and len(positions) == points:
                for held_at, held in self._sent[self._next_sent : at]:
                    if len(held) == 1:
                        self.run_record.holds.append((held_at, "the node held (published in the bag)"))
                        self._cycle.hold(held_at, held[0])
                self._next_sent = at + 1
                return positions
            at += 1
        return None

    def _tick_until(self, end: int) -> None:
        if self._cycle.timeline.current is None:
            self._ticked = end
            return
        while self._ticked < end:
            self._sample(self._ticked)
            self._ticked += self._robot.period


def published(source: BagSource, topic: str) -> Iterator[Sent]:
    """(record time, float64 [points, joints]) of every JointTrajectory on ``topic``."""
    decoder = Decoder(source.topics)
    for message in source.messages([topic]) if topic in source.topics else ():
        if message.type == TRAJECTORY:
            points = decoder.decode(message).points
            yield message.t_ns, np.array([p.positions for p in points], dtype=np.float64)


def parity(pairs: Sequence[tuple[Trajectory, Array | None]]) -> dict[str, float | int | None]:
    """Trajectories replayed against those published: how many were found, the largest difference (rad)."""
    gaps = [float(np.abs(sent - mine.positions).max()) if sent.shape == mine.positions.shape else float("inf")
            for mine, sent in pairs if sent is not None]  # fmt: skip
    return {
        "replayed": len(pairs),
        "matched": len(gaps),
        "largest_difference": max(gaps) if gaps else None,
        "beyond_1e-6": sum(gap > 1e-6 for gap in gaps),
    }
