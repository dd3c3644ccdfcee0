"""What a replay follows from and what it leaves: settings, chunks, a recipe's run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.evaluation.delays import DelayModel
from hybrid_policy.evaluation.node_parameters import NodeParameters
from hybrid_policy.evaluation.survey import Survey
from hybrid_policy.models.observation import Continuation, Observation


@dataclass(frozen=True)
class ReplaySettings:
    """What determines a replay.

    node: the node's parameters: rate of inference, chunking, tolerances, seed. delay: of each inference;
        one that takes longer than a period misses the next starts, as in the node.
    duration: seconds to replay at most; 0: all.
    """

    node: NodeParameters
    delay: DelayModel = field(default_factory=DelayModel)
    duration: float = 0.0


@dataclass(frozen=True)
class ReplayedChunk:
    """One inference. Times are nanoseconds on the bag's clock.

    actions: float32 [horizon, action_dim]. commands: float64 [horizon, commands].
    joints: float64 [joints], where the robot was. ages: input -> seconds since its stamp at the start.
    timings: seconds by stage on this machine, ``infer`` the whole call; they differ between runs.
    segment: resets of the clock before it.
    """

    number: int
    stamp: int
    started: int
    finished: int
    segment: int
    actions: NDArray[np.float32]
    commands: NDArray[np.float64]
    joints: NDArray[np.float64]
    accepted: bool
    reason: str
    seam: tuple[float, float, float]
    clipped: tuple[int, int, int]
    clipped_joints: tuple[str, ...]
    skew: float
    ages: dict[str, float]
    prompt: str
    continued: bool
    timings: dict[str, float]


@dataclass(frozen=True, eq=False)
class Moment:
    """A chunk worth looking at: how bad it was, which it is, small pictures by camera name."""

    score: float
    number: int
    stamp: int
    segment: int
    pictures: dict[str, NDArray[np.uint8]]


@dataclass
class RecipeRun:
    """One recipe's pass over one bag.

    executed_times, executed: int64 [ticks], float64 [ticks, commands]: what the robot would have been
        told, at the policy's rate. holds: (time, reason) of each time the robot would have been held.
    refused: (topic, kind of fault) -> (count, the first in full) of messages that the node's buffer dropped.
    """

    recipe: str
    chunks: list[ReplayedChunk] = field(default_factory=list)
    executed_times: list[int] = field(default_factory=list)
    executed: list[NDArray[np.float64]] = field(default_factory=list)
    executed_segments: list[int] = field(default_factory=list)
    holds: list[tuple[int, str]] = field(default_factory=list)
    damaged: Counter[str] = field(default_factory=Counter)
    refused: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    missed: int = 0
    drops: dict[str, dict[str, int]] = field(default_factory=dict)
    worst: list[Moment] = field(default_factory=list)


#: (chunk) -> how bad it was; larger is worse, NaN where unknown.
Score = Callable[[ReplayedChunk], float]


@dataclass(frozen=True)
class Running:
    """An inference between its start and its end."""

    observation: Observation
    noise: NDArray[np.float32]
    previous: Continuation | None
    started: int
    finished: int
    skew: float
    ages: dict[str, float]


def dropped_messages(run: RecipeRun, known: Survey) -> list[str]:
    """A line for each kind of message that the node would drop and that the survey has not spoken of."""
    lines = []
    for (topic, kind), (count, first) in run.refused.items():
        seen = known.topics.get(topic)
        if seen is not None and kind not in seen.refused:
            units = "; are its units rad and m?" if "limits and a margin" in first else ""
            lines.append(f"{topic}: {count} of {seen.messages} messages dropped by the node: {first}{units}")
    return lines


def why_no_chunk(run: RecipeRun, dropped: list[str]) -> str:
    """The reason in a sentence; ``dropped``: from `dropped_messages`."""
    if dropped:
        return f"no inference could be run: {'; '.join(dropped)}"
    if run.damaged:
        text, count = run.damaged.most_common(1)[0]
        return f"no inference could be run: {count} times an image could not be decoded: {text}"
    if run.holds:
        return f"no inference could be run; at the first start: {run.holds[0][1]}"
    return "no inference could be run: cameras and joint states never came together"
