"""What every pass of a policy over a bag does, however its inferences are timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.cycle import ControlCycle, CycleResult
from hybrid_policy.control.hold import hold_position
from hybrid_policy.control.observation_buffer import ObservationBuffer
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.bag import BagSource
from hybrid_policy.evaluation.node_parameters import NodeParameters
from hybrid_policy.evaluation.replay_record import Moment, RecipeRun, ReplayedChunk, Running, Score
from hybrid_policy.evaluation.survey import Survey
from hybrid_policy.models.observation import Observation, Policy

_WORST = 4
#: ns between two of the worst moments.
_APART = 1_000_000_000
_THUMBNAIL = 240


class PolicyPass:
    """Completes inferences, ticks, holds and remembers; ``run_record`` is the outcome."""

    def __init__(
        self,
        robot: RobotFile,
        policy: Policy,
        known: Survey,
        *,
        node: NodeParameters,
        recipe: str,
        score: Score,
    ) -> None:
        """Set up cycle and buffer.

        Raises:
            InputError: the checkpoint does not fit the robot file.
        """
        self._robot, self._policy, self._known = robot, policy, known
        self._cycle = ControlCycle(robot, policy, node.cycle)
        self._buffer = ObservationBuffer(robot, robot.policy_cameras(policy.spec), node.joint_margin)
        if node.prompt:
            self._buffer.set_prompt(node.prompt)
        self._hold_tolerance = node.hold_tolerance
        self._score = score
        self._roles = {topic: name for name, (topic, _) in known.match.cameras.items() if name in policy.spec.cameras}
        self._segment = 0
        self._worst: list[Moment] = []
        self.run_record = RecipeRun(recipe)

    def run(self, source: BagSource) -> Iterator[float]:
        """Replay; yields the seconds of the bag done so far."""
        raise NotImplementedError

    @property
    def _topics(self) -> set[str]:
        """The topics that this policy needs."""
        return {*self._roles, self._known.match.joints, self._known.match.prompt} - {""}

    def _sample(self, now: int) -> None:
        """Note what the robot is told now."""
        sample = self._cycle.timeline.sample(now)
        if sample is not None:
            self.run_record.executed_times.append(now)
            self.run_record.executed.append(sample[0])
            self.run_record.executed_segments.append(self._segment)

    def _complete(self, running: Running, discard: str = "") -> CycleResult:
        """Infer, and put the chunk in force or note why not."""
        began = time.perf_counter()
        chunk = self._policy.infer(running.observation, running.noise, running.previous)
        spent = time.perf_counter() - began
        if discard:
            result = CycleResult(running.observation, chunk, running.started, running.finished, reason=discard)
        else:
            result = self._cycle.accept(
                running.observation, chunk, running.started, running.finished,
                previous=running.previous, noise=running.noise,
            )  # fmt: skip
        replayed = self._described(result, running, spent, len(self.run_record.chunks))
        self.run_record.chunks.append(replayed)
        self._remember(replayed, running.observation)
        return result

    def _hold(self, now: int, reason: str) -> None:
        """Hold as the node does, and note it."""
        self.run_record.holds.append((now, reason))
        self._cycle.forget_chunks()
        if self._robot.timeouts.action == "none":
            return
        newest, commanded = self._buffer.newest_joints(), self._cycle.timeline.sample(now)
        measured = None
        if newest is not None and len(self._robot.command_index):
            measured = newest[1][self._robot.command_index]
        position = hold_position(
            self._robot, None if commanded is None else commanded[0], measured, self._hold_tolerance
        )
        if position is not None:
            self._cycle.hold(now, position)

    def _described(self, result: CycleResult, running: Running, spent: float, number: int) -> ReplayedChunk:
        chunk, seam, guard = result.chunk, result.seam, result.guard
        return ReplayedChunk(
            number=number,
            stamp=chunk.stamp,
            started=running.started,
            finished=running.finished,
            segment=self._segment,
            actions=chunk.actions,
            commands=self._robot.commands(chunk.actions),
            joints=running.observation.joints,
            accepted=result.trajectory is not None,
            reason=result.reason,
            seam=(seam.position, seam.velocity, seam.acceleration),
            clipped=(guard.position, guard.velocity, guard.acceleration),
            clipped_joints=guard.joints,
            skew=running.skew,
            ages=running.ages,
            prompt=running.observation.prompt,
            continued=running.previous is not None,
            timings={**{k: float(v) for k, v in chunk.timings.items()}, "infer": spent},
        )

    def _remember(self, chunk: ReplayedChunk, observation: Observation) -> None:
        """Keep small pictures of the worst moments: which they are is known only at the end."""
        score = self._score(chunk)
        if not np.isfinite(score):
            return
        near = [m for m in self._worst if abs(m.stamp - chunk.stamp) < _APART and m.segment == chunk.segment]
        if near:  # one picture of each bad stretch, at its worst
            if score <= max(m.score for m in near):
                return
            self._worst = [m for m in self._worst if m not in near]
        elif len(self._worst) == _WORST and score <= self._worst[-1].score:
            return
        pictures = {name: thumbnail(pixels) for name, pixels in observation.images.items()}
        self._worst.append(Moment(score, chunk.number, chunk.stamp, chunk.segment, pictures))
        self._worst = sorted(self._worst, key=lambda m: (-m.score, m.number))[:_WORST]

    def _close(self, now: int) -> None:
        """Fill in what is known only at the end."""
        status = self._buffer.status(now)
        self.run_record.drops = {name: dict(one.drops) for name, one in status.items() if one.drops}
        self.run_record.worst = list(self._worst)


def thumbnail(pixels: NDArray[np.uint8], width: int = _THUMBNAIL) -> NDArray[np.uint8]:
    """uint8 [h, width, 3] of a larger picture."""
    import cv2

    height = max(1, round(pixels.shape[0] * width / pixels.shape[1]))
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def fit_robot(robot: RobotFile, known: Survey) -> RobotFile:
    """The robot file with its cameras as the bag has them: raw or compressed."""
    found = {name: camera for name, (_, camera) in known.match.cameras.items()}
    return dataclasses.replace(robot, cameras=tuple(found.get(c.name, c) for c in robot.cameras))
