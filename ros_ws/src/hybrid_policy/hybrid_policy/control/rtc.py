"""Real-time chunking, the part outside the model: the delay to expect and the steps consumed.

Black, Galliker, Levine: Real-Time Execution of Action Chunking Flow Policies (arXiv 2506.07339). The
guidance itself runs inside the engine, with delay, consumed count and previous chunk as its inputs.
"""

from __future__ import annotations

import math
from collections import deque

from hybrid_policy.models.observation import ActionChunk, Continuation


class DelayEstimator:
    """The delay that the next inference must expect: the largest of the recent ones.

    A delay runs from the observation's stamp to the moment its chunk takes over, both by the clock of
    the stamps, so it holds at any frame rate and in a replay. Cold starts are not to be pushed.

    window: how many recent delays count.
    """

    def __init__(self, window: int) -> None:
        self._recent: deque[int] = deque(maxlen=window)

    def push(self, delay: int) -> None:
        """Add one measured delay (nanoseconds, at least 0)."""
        self._recent.append(max(0, delay))

    def clear(self) -> None:
        """Forget the delays (after a clock jump)."""
        self._recent.clear()

    def steps(self, period: int) -> int | None:
        """The delay in steps of ``period`` nanoseconds, see :func:`delay_steps`; None before the first."""
        return delay_steps(max(self._recent), period) if self._recent else None


def delay_steps(delay: int, period: int) -> int:
    """How many actions the next chunk has to keep as they are, for a swap ``delay`` nanoseconds from its start.

    Those that are due before the swap are the paper's d. The first one due at the swap or after it, and the
    one that follows, are kept as well: the curve through the actions has at the swap a position that depends
    on the one and a velocity that depends on both, and only where both chunks agree on them is there no seam.
    """
    return -(-max(0, delay) // period) + 2


def continuation(previous: ActionChunk, stamp: int, period: int, delay: int) -> Continuation | None:
    """What the engine needs to continue ``previous`` from an observation of time ``stamp``.

    s, the consumed steps, are those between the two observations, by their stamps: not a whole number,
    unless the stamps happen to lie on the grid of the actions. ``delay`` (see :func:`delay_steps`) is cut at
    half of what is left, so that one long delay does not tie the policy to its old plan until it is
    forgotten. None: the previous chunk has nothing left, or is not older.
    """
    horizon = len(previous.normalised)
    consumed = (stamp - previous.stamp) / period
    if not 0.0 < consumed <= horizon - 1:
        return None
    left = horizon - math.ceil(consumed)
    return Continuation(previous.normalised, consumed, max(0, min(delay, (left + 1) // 2)))
