"""Real-time chunking, the part outside the model: the delay to expect and the steps consumed.

Black, Galliker, Levine: Real-Time Execution of Action Chunking Flow Policies (arXiv 2506.07339). The
guidance itself runs inside the engine, with delay, consumed count and previous chunk as its inputs.
"""

from __future__ import annotations

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
    """How many actions are due within ``delay`` nanoseconds, the one due at its very end included.

    Those are given to the next chunk as they are, so that at the swap both chunks say the same.
    """
    return max(0, delay) // period + 1


def continuation(previous: ActionChunk, stamp: int, period: int, delay: int) -> Continuation | None:
    """What the engine needs to continue ``previous`` from an observation of time ``stamp``.

    s, the consumed steps, are those between the two observations; d is clamped so that
    ``d <= s <= horizon - d`` holds. None: the previous chunk has nothing left, or is not older.
    """
    horizon = len(previous.normalised)
    consumed = round((stamp - previous.stamp) / period)
    if consumed < 1 or consumed >= horizon:
        return None
    return Continuation(previous.normalised, consumed, max(0, min(delay, consumed, horizon - consumed)))
