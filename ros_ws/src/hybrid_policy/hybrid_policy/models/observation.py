"""The words that every room shares: observation, action chunk, policy. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one moment.

    images: camera name (the model's) -> uint8 [height, width, 3], RGB, any size.
    state: float32 [state_dim], in the checkpoint's own order, signs and units (the robot file's
        conversion has been applied), not normalised.
    prompt: the task, as the user wrote it.
    stamps: nanoseconds of the message header each part came from: one for each camera name, and
        ``"joints"``.
    joints: float64 [joints], the same joint positions in the robot file's order and ROS units
        (rad, m); empty where no robot is involved.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    prompt: str
    stamps: Mapping[str, int] = field(default_factory=dict)
    joints: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @property
    def stamp(self) -> int:
        """Nanoseconds of the joint state, the time that a chunk is counted from; 0 if unstamped."""
        return self.stamps.get("joints", max(self.stamps.values(), default=0))


@dataclass(frozen=True)
class Continuation:
    """The previous chunk, for real-time chunking.

    normalised: float32 [horizon, max_action_dim], the previous chunk in the model's space.
    consumed: steps of it between its observation and the new one (``s``), not always a whole number.
    delay: leading actions of the new chunk that must be the previous one's (``d``), since they will have
        been executed, or will be in execution, when it takes over.
    """

    normalised: NDArray[np.float32]
    consumed: float
    delay: int


@dataclass(frozen=True)
class ActionChunk:
    """``horizon`` actions and what they came from.

    actions: float32 [horizon, action_dim] in the checkpoint's units (unnormalised; absolute, also
        where the checkpoint predicts relative ones).
    normalised: float32 [horizon, max_action_dim], the model's own output, for a Continuation.
    stamp: nanoseconds of the observation. Action ``k`` is due at ``stamp + k * period``, as in a
        recording, where the action of a frame is the command given at the frame's own time.
    timings: seconds spent in each stage: preprocess, vision, prefix, denoise, postprocess.
    """

    actions: NDArray[np.float32]
    normalised: NDArray[np.float32]
    stamp: int
    timings: Mapping[str, float]


@dataclass(frozen=True)
class PolicySpec:
    """What a checkpoint needs and gives: held against a robot file before anything runs."""

    name: str
    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    max_action_dim: int
    horizon: int


class Policy(Protocol):
    """What the controller asks of an engine. ``runtime.Engine`` is the one that ships."""

    @property
    def spec(self) -> PolicySpec:
        """What the policy needs and gives."""
        ...

    def infer(
        self,
        observation: Observation,
        noise: NDArray[np.float32] | None = None,
        previous: Continuation | None = None,
    ) -> ActionChunk:
        """One chunk for one observation.

        noise: float32 [horizon, max_action_dim], the flow's start; drawn anew if None.
        previous: what real-time chunking continues; None starts freely.
        """
        ...
