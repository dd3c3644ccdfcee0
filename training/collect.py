"""Frames to learn from: what the cameras see, and what the expert would do there, for either prompt.

Two kinds, half of each:

* at rest: an independent scene a frame, the arms anywhere over the table; physics is not run. Many
  scenes teach where the named cube is;
* on the way: the expert works with disturbed set-points and frames are drawn from its episodes. They
  teach grasp, lift and recovery.

Every frame is labelled with the expert's plan for the red and for the blue cube: the expert is Markov,
so it has an answer for both, and the network must read the prompt to know which is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.models.images import resize_with_pad
from hybrid_policy.share import share_path
from hybrid_policy.sim.expert import LAG, PERIOD, ExpertState, next_set_points, plan
from hybrid_policy.sim.kinematics import arm_to
from hybrid_policy.sim.robot import CAMERAS, TIME_STEP, SimRobot
from hybrid_policy.sim.scene import HOME
from hybrid_policy.sim.tasks import TASK_COLOURS, SceneSettings, expert_state, judge, sample_scene
from numpy.typing import NDArray

SCENES = SceneSettings(randomise=True, distractor=0.35, start_noise=0.07)
_REACH = np.array([[-0.10, 0.32, 0.0], [0.28, 0.68, 0.35]])  # of a cube's centre (m)
_STEPS = round(PERIOD / TIME_STEP)


@dataclass
class Frames:
    """N frames. cubes: float32 [N, 2, 3], the red and the blue cube's centre (m).

    images: uint8 [N, cameras, S, S, 3]. state: float32 [N, 14], the checkpoint's units.
    actions: float32 [N, 2, horizon, 14], the expert's plan for red and for blue, the checkpoint's units.
    """

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    cubes: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.state)

    @classmethod
    def joined(cls, parts: list[Frames]) -> Frames:
        """All parts in one."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Recorder:
    """Collects frames and asks the expert for all of them at once."""

    def __init__(self, robot_file: RobotFile, size: int, horizon: int) -> None:
        self._robot_file, self._size, self._horizon = robot_file, size, horizon
        self._images: list[NDArray[np.uint8]] = []
        self._states: list[NDArray[np.float32]] = []
        self._asked: list[ExpertState] = []

    def __len__(self) -> int:
        return len(self._states)

    def see(self, robot: SimRobot) -> NDArray[np.uint8]:
        """uint8 [cameras, S, S, 3]: as the policy's own preprocessing makes them."""
        return np.stack([resize_with_pad(robot.render(name), self._size, self._size) for name in CAMERAS])

    def add(
        self, robot: SimRobot, images: NDArray[np.uint8], set_points: list[NDArray[np.float64]] | None = None
    ) -> None:
        """One frame: the robot as it is now, with images that may be a moment older.

        set_points: what the plans for red and blue start from; the robot's own where None.
        """
        self._images.append(images)
        self._states.append(self._robot_file.state(robot.positions))
        for index, colour in enumerate(TASK_COLOURS):
            asked = expert_state(robot, colour)
            if set_points is not None:
                asked = replace(asked, set_points=set_points[index][None])
            self._asked.append(asked)

    def frames(self) -> Frames:
        """Label all and start anew."""
        joined = ExpertState(
            *(np.concatenate([getattr(asked, field.name) for asked in self._asked]) for field in fields(ExpertState))
        )
        plans = self._robot_file.actions(plan(joined, self._horizon))
        cubes = joined.cube.reshape(-1, 2, 3)
        # A cube that was knocked off the table or out of reach teaches nothing.
        kept = ((cubes >= _REACH[0]) & (cubes <= _REACH[1])).all(axis=(1, 2))
        frames = Frames(
            np.stack(self._images)[kept],
            np.stack(self._states)[kept],
            plans.reshape(-1, 2, *plans.shape[1:])[kept],
            cubes[kept].astype(np.float32),
        )
        self._images, self._states, self._asked = [], [], []
        return frames


def anywhere(random: np.random.Generator) -> NDArray[np.float64]:
    """Joints with the right hand somewhere over the table and a random gripper, float64 [14]."""
    joints = np.asarray(HOME)
    tip = np.array([random.uniform(-0.05, 0.30), random.uniform(0.34, 0.66), random.uniform(0.045, 0.33)])
    # high and far back the hand is level, as at home; low it points down
    level = np.clip((tip[2] - 0.08) / 0.24, 0.0, 1.0) * random.uniform(0.0, 1.0)
    joints[7:13] = arm_to(tip, 1.4 - 1.5 * level)
    joints[:6] += 0.07 * random.standard_normal(6)
    joints[7:13] += 0.04 * random.standard_normal(6)
    joints[[6, 13]] = random.uniform(0.022, 0.056, 2)
    return joints


def add_at_rest(recorder: Recorder, robot: SimRobot, random: np.random.Generator, moved: float = 0.5) -> None:
    """One frame of a new scene, at the start pose or (a share ``moved``) with the hand anywhere."""
    robot.reset(sample_scene(random, SCENES))
    if random.random() < moved:
        robot.place(np.clip(anywhere(random), robot.limits[:, 0], robot.limits[:, 1]))
    # As if it were moving already: the set-points lead by what the friction costs.
    leads = []
    for colour in TASK_COLOURS:
        asked = expert_state(robot, colour)
        step = next_set_points(asked)[0] - asked.set_points[0]
        leads.append(asked.set_points[0] + random.uniform(0.0, 1.0) * np.tile(LAG, 2) * step)
    recorder.add(robot, recorder.see(robot), leads)


def add_on_the_way(recorder: Recorder, robot: SimRobot, random: np.random.Generator, share: float = 0.2) -> None:
    """Frames of one disturbed episode of the expert, ``share`` of all its set-points."""
    robot.reset(sample_scene(random, SCENES))
    if random.random() < 0.35:
        robot.place(np.clip(anywhere(random), robot.limits[:, 0], robot.limits[:, 1]))
    disturbance = random.choice([0.0, 0.004, 0.01]) * np.ones(14)
    disturbance[[6, 13]] = 0.0
    drift = np.zeros(14)
    target = robot.scene.target
    holding = int(random.integers(2, 30))
    for _ in range(220):
        if random.random() < 0.01:
            target = TASK_COLOURS[int(random.integers(2))]
        drift = 0.8 * drift + 0.6 * disturbance * random.standard_normal(14)
        following = next_set_points(expert_state(robot, target))[0] + drift
        images = None
        seen_at = int(random.integers(0, _STEPS + 1)) if random.random() < share else -1
        before = robot.set_points
        for step in range(0, _STEPS, 5):
            if images is None and 0 <= seen_at <= step:
                images = recorder.see(robot)
            robot.command(before + (following - before) * (step + 5) / _STEPS)
            robot.step(5)
        if seen_at >= 0:
            recorder.add(robot, recorder.see(robot) if images is None else images)
        holding -= judge(robot, target).success
        if holding <= 0:
            if random.random() < 0.4:
                break
            # the prompt changes while the cube is held
            target = TASK_COLOURS[1 - TASK_COLOURS.index(target)]
            holding = int(random.integers(2, 30))


def collect(seed: int, frames: int, size: int, horizon: int, rest_share: float = 0.5) -> Frames:
    """At least ``frames`` frames from one simulator; the same for the same seed.

    rest_share: of frames at rest. Above 1: all of them, and all at the start pose (to judge by).
    """
    random = np.random.default_rng(seed)
    robot = SimRobot(sample_scene(random, SCENES))
    robot_file = RobotFile.load(share_path("config/robots/sim_aloha.yaml"))
    recorder = Recorder(robot_file, size, horizon)
    while len(recorder) < min(frames, round(frames * rest_share)):
        add_at_rest(recorder, robot, random, 0.5 if rest_share <= 1.0 else 0.0)
    while len(recorder) < frames:
        add_on_the_way(recorder, robot, random)
    robot.close()
    return recorder.frames()
