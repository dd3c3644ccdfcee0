"""What the node says: repeated warnings once, then every few seconds with their count; at the end a summary."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from hybrid_policy.control.latency import LatencyRecorder

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


def summarise(recorder: LatencyRecorder, path: str, logger: Any) -> None:
    """Log a table of what was recorded, and write it to ``path`` as JSON (empty: not)."""
    summary = recorder.summary()
    if not summary.chunks:
        return
    logger.info("summary\n" + summary.table())
    if path:
        try:
            Path(path).expanduser().write_text(json.dumps(summary.to_dict()) + "\n")
        except OSError as error:
            logger.error(f"summary_json: {path}: {error.strerror}")
