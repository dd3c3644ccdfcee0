"""A policy in the simulator, in simulated time, with the controller of the node.

An :class:`Episode` is driven from outside, so that many can share one batched inference::

    episode = Episode(robot, scene, robot_file, spec, settings=LoopSettings(), seed=0)
    while (asked := episode.observe()) is not None:
        episode.act(policy.infer(*asked))
    print(episode.result)

Between two inferences the arm follows the trajectory in force at 100 Hz, with the guard, the blend and
the cutting of late actions of ``control.ControlCycle``. The delay of inference is made: what was seen at
time t takes command at t + delay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.cycle import ControlCycle, CycleSettings
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.models.observation import ActionChunk, Continuation, Observation, Policy, PolicySpec
from hybrid_policy.sim.robot import TIME_STEP, SimRobot
from hybrid_policy.sim.scene import Scene
from hybrid_policy.sim.tasks import judge

Asked = tuple[Observation, NDArray[np.float32], Continuation | None]

_SUBSTEPS = 5
#: One and a half times what the expert needs for the slowest scenes (3.9 s of 4 s, at 20 Hz).
TIME_LIMIT = 6.0


@dataclass(frozen=True)
class LoopSettings:
    """How an episode runs. Times in s of the simulator.

    rate: inferences per second. delay: from the observation to the first command of its chunk.
    image_age: how much older than the joint state the images are (a camera runs at 20 Hz).
    limit: an episode that has not succeeded by then has failed.
    switch: after the lift, hold for a second, then ask for the other cube: success means both.
    chunking, blend: see ``control.CycleSettings``.
    """

    rate: float = 5.0
    delay: float = 0.1
    image_age: float = 0.02
    limit: float = TIME_LIMIT
    switch: bool = False
    chunking: str = "off"
    blend: float = 0.2


@dataclass(frozen=True)
class EpisodeResult:
    """seed: of the scene's number. seconds: until success, or all of them. steps: inferences used.

    wrong: another cube than the named one was lifted at some time. refused: chunks that the controller
    did not take.
    """

    seed: int
    target: str
    success: bool
    wrong: bool
    seconds: float
    steps: int
    refused: int


class _ModelsPolicy:
    """What the cycle asks of a policy when inference happens outside: its dimensions."""

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec

    def infer(
        self,
        observation: Observation,
        noise: NDArray[np.float32] | None = None,
        previous: Continuation | None = None,
    ) -> ActionChunk:
        """Never called: an Episode hands the observation out."""
        raise NotImplementedError("an Episode's inference happens outside of it")


class Episode:
    """One scene from start to success or time limit."""

    def __init__(
        self,
        robot: SimRobot,
        scene: Scene,
        robot_file: RobotFile,
        spec: PolicySpec,
        *,
        settings: LoopSettings,
        seed: int = 0,
    ) -> None:
        self.robot, self.settings, self.seed = robot, settings, seed
        self.target, self.prompt = scene.target, scene.prompt
        self._until = round(settings.limit * 1e9)
        self._stop_at_success = True
        self._carries_over = False
        self.robot_file = robot_file
        cycle_settings = CycleSettings(chunking=settings.chunking, blend=settings.blend, seed=seed)
        self.cycle = ControlCycle(robot_file, _ModelsPolicy(spec), cycle_settings)
        self._cameras = spec.cameras
        self._asked: Asked | None = None
        self._seen: tuple[int, dict[str, NDArray[np.uint8]]] | None = None
        self._next_inference = 0
        self._succeeded: int | None = None
        self._wrong = False
        self._steps = self._refused = 0
        robot.reset(scene)
        self.cycle.timeline.hold(0, robot.set_points)

    @property
    def over(self) -> bool:
        """Success, or no time left."""
        return (self._stop_at_success and self._succeeded is not None) or self.robot.time_ns >= self._until

    @property
    def result(self) -> EpisodeResult:
        """How it went so far."""
        end = self.robot.time_ns if self._succeeded is None else self._succeeded
        return EpisodeResult(
            seed=self.seed,
            target=self.target,
            success=self._succeeded is not None,
            wrong=self._wrong,
            seconds=end * 1e-9,
            steps=self._steps,
            refused=self._refused,
        )

    def ask(self, prompt: str, target: str, limit: float, stop_at_success: bool = True) -> None:
        """Go on with another prompt (for the cube of colour ``target``) for ``limit`` s from now."""
        self.prompt, self.target = prompt, target
        self._until = self.robot.time_ns + round(limit * 1e9)
        self._stop_at_success = stop_at_success
        self._succeeded = None
        # what the last prompt lifted may stay up for a moment
        self._carries_over = True

    def observe(self) -> Asked | None:
        """Run to the next inference and see: observation, noise, continuation; None when it is over."""
        self._see()
        self._run_until(self._next_inference)
        if self.over or self._seen is None:
            return None
        (stamp, images), self._seen = self._seen, None
        joints = self.robot.positions
        observation = Observation(
            images=images,
            state=self.robot_file.state(joints),
            prompt=self.prompt,
            stamps={**dict.fromkeys(images, stamp), "joints": self.robot.time_ns},
            joints=joints,
        )
        self._asked = (observation, *self.cycle.prepare(observation))
        return self._asked

    def act(self, chunk: ActionChunk) -> None:
        """The chunk of the last observation takes command after the delay."""
        if self._asked is None:
            raise RuntimeError("act: nothing has been observed")
        observation, noise, previous = self._asked
        self._asked = None
        started = observation.stamp
        self._steps += 1
        ready = started + round(self.settings.delay * 1e9)
        self._next_inference = max(started + round(1e9 / self.settings.rate), ready)
        if self._next_inference == ready:
            self._see()  # while the old chunk is still in force
        self._run_until(ready)
        if self.over:
            return
        now = self.robot.time_ns
        taken = self.cycle.accept(observation, chunk, started, now, previous=previous, noise=noise)
        self._refused += taken.trajectory is None

    def _see(self) -> None:
        """Take the pictures of the next inference, ``image_age`` before it."""
        if self._seen is None:
            self._run_until(self._next_inference - round(self.settings.image_age * 1e9))
            if not self.over:
                self._seen = self.robot.time_ns, {name: self.robot.render(name) for name in self._cameras}

    def _run_until(self, stamp: int) -> None:
        while self.robot.time_ns < stamp and not self.over:
            sampled = self.cycle.timeline.sample(self.robot.time_ns)
            if sampled is not None:
                self.robot.command(sampled[0])
            left = (stamp - self.robot.time_ns) * 1e-9 / TIME_STEP
            self.robot.step(max(1, min(_SUBSTEPS, round(left))))
            verdict = judge(self.robot, self.target)
            self._wrong |= verdict.wrong and not self._carries_over
            if verdict.success and self._succeeded is None:
                self._succeeded = self.robot.time_ns


def run_episode(
    policy: Policy,
    robot: SimRobot,
    scene: Scene,
    robot_file: RobotFile,
    *,
    settings: LoopSettings,
    seed: int = 0,
) -> EpisodeResult:
    """One scene with a policy that answers one observation at a time (``runtime.Engine``)."""
    episode = Episode(robot, scene, robot_file, policy.spec, settings=settings, seed=seed)
    drive(episode, policy)
    first = episode.result
    if settings.switch and first.success:
        episode.ask(scene.prompt, scene.target, 1.0, stop_at_success=False)
        drive(episode, policy)
        other = next(cube.colour for cube in scene.cubes if cube.colour != scene.target)
        episode.ask(scene.prompt.replace(scene.target, other), other, settings.limit)
        drive(episode, policy)
        return replace(episode.result, target=scene.target)
    return first


def drive(episode: Episode, policy: Policy) -> None:
    """Infer until the episode is over."""
    while (asked := episode.observe()) is not None:
        episode.act(policy.infer(*asked))
