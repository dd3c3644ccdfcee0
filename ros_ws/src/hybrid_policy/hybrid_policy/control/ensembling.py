"""Temporal ensembling, the alternative to real-time chunking (Zhao et al., ACT, arXiv 2304.13705)."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class TemporalEnsemble:
    """Averages what several chunks say about the same moment.

    A moment's command is ``sum(exp(-m k) a_k) / sum(exp(-m k))`` over the chunks that reach it, k = 0
    the oldest. Chunks are matched by time, not by index.

    weight: m; 0 is a plain mean, larger values trust older chunks more. limit: chunks remembered.
    """

    def __init__(self, period: int, weight: float, limit: int = 16) -> None:
        self._period, self._weight = period, weight
        self._chunks: deque[tuple[int, Array]] = deque(maxlen=limit)

    def clear(self) -> None:
        """Forget every chunk."""
        self._chunks.clear()

    def add(self, stamp: int, actions: Array) -> Array:
        """Remember a chunk (float64 [horizon, commands], from time ``stamp``) and average it.

        Returns float64 [horizon, commands] at the new chunk's own times.
        """
        horizon = len(actions)
        self._chunks = deque(
            (chunk for chunk in self._chunks if chunk[0] + self._period * len(chunk[1]) > stamp),
            self._chunks.maxlen,
        )
        self._chunks.append((stamp, actions))
        steps = np.arange(horizon, dtype=np.float64)
        total, norm, rank = np.zeros_like(actions), np.zeros(horizon), np.zeros(horizon)
        for begin, chunk in self._chunks:
            at = steps + (stamp - begin) / self._period
            covered = (at >= 0.0) & (at <= len(chunk) - 1)
            low = np.clip(np.floor(at).astype(np.intp), 0, len(chunk) - 1)
            high = np.minimum(low + 1, len(chunk) - 1)
            value = chunk[low] + (at - low)[:, None] * (chunk[high] - chunk[low])
            weight = np.where(covered, np.exp(-self._weight * rank), 0.0)
            total += weight[:, None] * np.where(covered[:, None], value, 0.0)
            norm += weight
            rank += covered
        return total / norm[:, None]
