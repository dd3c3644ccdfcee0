"""Warnings that repeat are said once, then at most every few seconds with their count."""

from __future__ import annotations

import threading
import time
from typing import Any

#: Seconds between two lines of the same key.
INTERVAL = 5.0


class ThrottledLog:
    """Wraps a ROS logger; safe from every thread. ``key`` says what counts as the same message."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, int]] = {}

    def _due(self, key: str, text: str) -> str:
        now = time.monotonic()
        with self._lock:
            last, kept = self._said.get(key, (-INTERVAL, 0))
            if now - last < INTERVAL:
                self._said[key] = (last, kept + 1)
                return ""
            self._said[key] = (now, 0)
        return f"{text} ({kept} more like this)" if kept else text

    def info(self, text: str) -> None:
        """Say something once."""
        self._logger.info(text)

    def warn(self, key: str, text: str) -> None:
        """Warn, throttled by key."""
        if line := self._due(key, text):
            self._logger.warning(line)

    def error(self, key: str, text: str) -> None:
        """Report an error, throttled by key."""
        if line := self._due(key, text):
            self._logger.error(line)
