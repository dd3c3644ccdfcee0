"""The shadow check: now and then, the same observation and noise through another recipe, off the deadline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.cycle import CycleResult
from hybrid_policy.models.observation import Policy


def action_cosine(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Cosine of the angle between two chunks ([horizon, action_dim] each), all values as one vector."""
    a, b = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0.0 else 1.0


@dataclass(frozen=True)
class ShadowReport:
    """Checks done so far; the last and the smallest cosine; how many were below the threshold."""

    checks: int = 0
    last: float = 1.0
    smallest: float = 1.0
    below: int = 0
    error: str = ""


class ShadowCheck:
    """Runs ``policy`` beside the one in force, in a thread of its own, on every ``every``-th chunk.

    An offer that comes while a check is running is left out: nothing ever waits for the shadow.
    on_below: called with the cosine when it falls below ``threshold`` (from the shadow's thread).
    """

    def __init__(self, policy: Policy, every: int, threshold: float, on_below: Callable[[float], None]) -> None:
        self.policy = policy
        self.report = ShadowReport()
        self._every, self._threshold, self._on_below = every, threshold, on_below
        self._seen = 0
        self._queue: queue.Queue[CycleResult | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, result: CycleResult) -> None:
        """Perhaps check this chunk."""
        self._seen += 1
        if self._seen % self._every == 0 and self._queue.empty():
            try:
                self._queue.put_nowait(result)
            except queue.Full:
                return

    def close(self, timeout: float = 2.0) -> None:
        """End the thread."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _run(self) -> None:
        while (result := self._queue.get()) is not None:
            try:
                shadow = self.policy.infer(result.observation, result.noise, result.previous)
            except Exception as error:
                self.report = ShadowReport(
                    self.report.checks, self.report.last, self.report.smallest, self.report.below, str(error)
                )
                continue
            cosine = action_cosine(result.chunk.normalised, shadow.normalised)
            low = cosine < self._threshold
            self.report = ShadowReport(
                self.report.checks + 1,
                cosine,
                min(self.report.smallest, cosine),
                self.report.below + low,
            )
            if low:
                self._on_below(cosine)
