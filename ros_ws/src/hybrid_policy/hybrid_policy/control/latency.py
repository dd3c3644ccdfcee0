"""Where the time of each chunk went: one JSON line a chunk, percentiles at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

#: The stages that an engine times, in order.
ENGINE_STAGES = ("preprocess", "vision", "prefix", "denoise", "postprocess")


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk. Times are nanoseconds of the node's clock; durations milliseconds.

    stamps: of every input, by name. skew_ms: between the oldest and newest of them. decode_ms: images
    to arrays. stages_ms: the engine's own record. infer_ms: the whole call. publish_ms: from its end
    to the message sent (planning, guard, message). total_ms: from taking the inputs to the message sent.
    stamp_to_publish_ms: from the newest image's stamp to the message sent. age_at_due_ms: age of the
    observation when the first action kept is due. deadline_met: sent before the next inference was
    to start. reason: why it was refused, where it was. finished: when it came into force, nanoseconds
    of the clock of ``started``; what follows a log needs it exactly.
    """

    chunk: int
    stamps: Mapping[str, int]
    skew_ms: float
    started: int
    decode_ms: float
    stages_ms: Mapping[str, float]
    infer_ms: float
    publish_ms: float
    total_ms: float
    stamp_to_publish_ms: float
    age_at_due_ms: float
    first_due: int
    cut: int
    consumed: float
    delay: int
    deadline_ms: float
    deadline_met: bool
    accepted: bool
    reason: str = ""
    seam_position: float = 0.0
    seam_velocity: float = 0.0
    seam_acceleration: float = 0.0
    clipped: int = 0
    prompt: str = ""
    finished: int = 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True)
class Distribution:
    """Percentiles of one stage, milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class LatencySummary:
    """stages: name -> distribution, in the order of the work; misses: deadlines missed; refused: not sent."""

    chunks: int
    misses: int
    refused: int
    stages: Mapping[str, Distribution] = field(default_factory=dict)

    def table(self) -> str:
        """The summary as text, one line a stage."""
        lines = [f"{'stage (ms)':<20}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}"]
        for name, one in self.stages.items():
            lines.append(f"{name:<20}{one.p50:>9.2f}{one.p95:>9.2f}{one.p99:>9.2f}{one.max:>9.2f}")
        lines.append(f"{self.chunks} chunks, {self.misses} deadlines missed, {self.refused} refused or discarded")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


_COLUMNS = ("decode", *ENGINE_STAGES, "infer", "publish", "total", "stamp_to_publish", "age_at_due")


class LatencyRecorder:
    """Counts every chunk, keeps the last ``capacity`` for percentiles, writes each to a log.

    Memory is allocated once. A log that cannot be opened or written (a full disk) is given up: ``error``
    says why, ``unwritten`` counts the lines, and recording goes on.
    """

    def __init__(self, path: Path | None = None, capacity: int = 20_000) -> None:
        self._values: NDArray[np.float32] = np.zeros((capacity, len(_COLUMNS)), dtype=np.float32)
        self.chunks = self.misses = self.refused = self.unwritten = 0
        self.error = ""
        self._file: TextIO | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w", encoding="utf-8", buffering=1)
            except OSError as error:
                self.error = f"{path}: {error.strerror}"

    def add(self, record: ChunkRecord) -> None:
        """Record one chunk."""
        row = [record.decode_ms, *(record.stages_ms.get(name, 0.0) for name in ENGINE_STAGES)]
        row += [record.infer_ms, record.publish_ms, record.total_ms]
        row += [record.stamp_to_publish_ms, record.age_at_due_ms]
        self._values[self.chunks % len(self._values)] = row
        self.chunks += 1
        self.misses += not record.deadline_met
        self.refused += not record.accepted
        if self._file is None:
            self.unwritten += bool(self.error)
            return
        try:
            self._file.write(record.to_json() + "\n")
        except OSError as error:
            self.error = f"{self._file.name}: {error.strerror}"
            self.unwritten += 1
            self._close()

    def _close(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:  # closing flushes, which fails on a full disk as well
            self.error = self.error or f"{error.strerror}"
        self._file = None

    def summary(self, last: int | None = None) -> LatencySummary:
        """Percentiles over the last ``last`` chunks (all that are kept where None)."""
        kept = min(self.chunks, len(self._values), self.chunks if last is None else last)
        if kept == 0:
            return LatencySummary(self.chunks, self.misses, self.refused)
        rows = self._values[(self.chunks - kept + np.arange(kept)) % len(self._values)]
        points = np.percentile(rows, [50, 95, 99, 100], axis=0)
        stages = {n: Distribution(*map(float, points[:, i])) for i, n in enumerate(_COLUMNS)}
        return LatencySummary(self.chunks, self.misses, self.refused, stages)

    def close(self) -> None:
        """Close the log."""
        self._close()
