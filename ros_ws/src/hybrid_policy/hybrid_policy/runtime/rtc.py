"""Real-time chunking (RTC): a new chunk that continues the one the robot is executing.

Kevin Black, Manuel Galliker, Sergey Levine, "Real-Time Execution of Action Chunking Flow Policies"
(arXiv 2506.07339); here with time running from 1 (noise) to 0 (actions), as pi0.5 has it. With Y the
previous chunk from its step ``s`` on, H the horizon, d the actions to keep and e = H - s, every flow step is

    x̂ = x - t·v;   x <- x - (1/n)·(v - w(t)·W ⊙ (Y - x̂))

which is the paper's guidance with the Jacobian of x̂ taken as the identity: forward only, so it fits a
captured graph. Everything that depends on an inference is two arrays, W [H] and Y [H, action_dim]; what
depends on the step alone, w(t), is known at load. Without a previous chunk W is zero, and the same
arithmetic is the plain flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import Continuation

Mode = Literal["off", "guided", "prior_corrected", "prefix"]
Schedule = Literal["exp", "linear"]


@dataclass(frozen=True)
class RealTimeChunking:
    """How an inference is tied to the previous chunk.

    mode: ``off``; ``guided`` (the paper's weight, which takes the actions' variance as 1);
        ``prior_corrected`` (the weight for actions of standard deviation ``prior_std``); ``prefix``
        (for checkpoints trained with a clean action prefix, arXiv 2512.05964).
    schedule: how W falls from 1 to 0 between the delay and the end of the overlap.
    beta: the largest guidance weight w(t); 0: the number n of the flow's steps. Where W is 1, a step moves
        x̂ by the share w/n of its distance to Y: with n the last step puts the action on Y exactly, with
        less a part of the distance is left, and more overshoots. (5 steps and 5 in the paper's code, 10
        and 10 in LeRobot.)
    prior_std: standard deviation of normalised actions, for ``prior_corrected``.
    """

    mode: Mode = "guided"
    schedule: Schedule = "linear"
    beta: float = 0.0
    prior_std: float = 0.2

    def __post_init__(self) -> None:
        """Refuse values that the formulas are not defined for."""
        if self.mode not in ("off", "guided", "prior_corrected", "prefix"):
            raise InputError.at("rtc", "mode", self.mode, "off, guided, prior_corrected or prefix")
        if self.schedule not in ("exp", "linear"):
            raise InputError.at("rtc", "schedule", self.schedule, "exp or linear")
        if not (np.isfinite(self.beta) and self.beta >= 0):
            raise InputError.at("rtc", "beta", self.beta, "a number >= 0")
        if not (np.isfinite(self.prior_std) and self.prior_std > 0):
            raise InputError.at("rtc", "prior_std", self.prior_std, "a number > 0")

    @property
    def guides(self) -> bool:
        """Whether flow steps carry a guidance term."""
        return self.mode in ("guided", "prior_corrected")

    def step_weights(self, times: NDArray[np.float64]) -> NDArray[np.float32]:
        """w(t) for each flow time, float32 [steps]; zero unless the mode guides.

        With actions of variance σ² and unit noise, the variance of the actions given x_t is
        r² = σ²t²/((1-t)²σ² + t²), and w = t/((1-t)·r²), cut at ``beta`` (at n where that is 0).
        """
        if not self.guides:
            return np.zeros(len(times), np.float32)
        variance = 1.0 if self.mode == "guided" else self.prior_std**2
        with np.errstate(divide="ignore"):
            weight = ((1 - times) ** 2 * variance + times**2) / (variance * times * (1 - times))
        return np.minimum(weight, self.beta or len(times)).astype(np.float32)


def overlap(horizon: int, consumed: float) -> int:
    """e: how many actions of a chunk lie within the previous one, ``consumed`` steps after its start."""
    return horizon - math.ceil(consumed)


def overlap_weights(horizon: int, delay: int, consumed: float, schedule: Schedule) -> NDArray[np.float32]:
    """W, float32 [horizon]: 1 for the first ``delay`` steps, then falling to 0 at the end of the overlap."""
    end = overlap(horizon, consumed)
    index = np.arange(horizon, dtype=np.float64)
    c = np.clip((end - index) / (end - delay + 1), 0.0, 1.0)
    falling = c * np.expm1(c) / np.expm1(1.0) if schedule == "exp" else c
    return np.where(index < delay, 1.0, np.where(index < end, falling, 0.0)).astype(np.float32)


def shifted(previous: Continuation, horizon: int, action_dim: int) -> NDArray[np.float32]:
    """Y, float32 [horizon, action_dim]: the previous chunk from its first unconsumed step, zeros after it.

    Between two steps, where ``consumed`` is not a whole number, what lies on the line between them: the
    new chunk then says of a moment what the previous one said, however the stamps fall.

    The paper has d <= s, since there a chunk is asked for only when the one before it has taken over; the
    formulas need d <= e alone.

    Raises:
        InputError: a wrong shape, a value that is not finite, or not 0 <= delay <= horizon - consumed.
    """
    chunk = previous.normalised
    if chunk.shape != (horizon, action_dim):
        raise InputError.at("previous", "normalised.shape", chunk.shape, f"({horizon}, {action_dim})")
    if not np.isfinite(chunk).all():
        raise InputError.at("previous", "normalised", "NaN or infinity", "finite numbers")
    s, d = previous.consumed, previous.delay
    if not (0.0 <= s <= horizon and 0 <= d <= overlap(horizon, s)):
        raise InputError.at(
            "previous", "(delay, consumed)", (d, s), f"0 <= delay <= {horizon} - consumed (horizon {horizon})"
        )
    target = np.zeros((horizon, action_dim), np.float32)
    low = math.floor(s) + np.arange(overlap(horizon, s))
    share = np.float32(s - math.floor(s))
    target[: len(low)] = chunk[low] + share * (chunk[np.minimum(low + 1, horizon - 1)] - chunk[low])
    return target
