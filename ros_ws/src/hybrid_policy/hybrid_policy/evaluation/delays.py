"""The delay of each inference in a replay: fixed, or drawn from what a robot's latency log recorded.

Wall-clock delays would make a replay irreproducible. These are a function of the settings alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_policy.errors import InputError


@dataclass(frozen=True)
class DelayModel:
    """Nanoseconds from an observation being taken to its chunk in force.

    fixed: the delay, where ``recorded`` is empty. recorded: delays of a log; each inference draws one.
    source: for the report. followed: chunks of a log that is followed exactly; then nothing is drawn.
    """

    fixed: int = 100_000_000
    recorded: tuple[int, ...] = ()
    seed: int = 0
    source: str = ""
    followed: int = 0

    def draws(self) -> Iterator[int]:
        """The delay of the first inference, the second, ...: the same at each call."""
        random = np.random.default_rng(self.seed)
        while True:
            if self.recorded:
                yield int(self.recorded[int(random.integers(len(self.recorded)))])
            else:
                yield self.fixed

    @property
    def text(self) -> str:
        """For people."""
        if self.followed:
            return f"as {self.source} says ({self.followed} chunks)"
        if not self.recorded:
            return f"{self.fixed * 1e-6:g} ms fixed"
        spread = np.percentile(np.array(self.recorded) * 1e-6, [50, 99])
        percentiles = f"p50 {spread[0]:.1f}, p99 {spread[1]:.1f} ms"
        return f"drawn from {self.source} ({len(self.recorded)} delays, {percentiles})"


def read_log(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a latency log (one JSON object a chunk); a cut-off last line is left out.

    Raises:
        InputError: no such file, or it is no latency log.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as a latency log ({error})") from error
    records: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # the node was killed while writing
            raise InputError(f"{path}: line {number}: not JSON, expected one object a chunk") from error
        if isinstance(record, dict) and "chunk" in record:
            records.append(record)
    if not records:
        raise InputError(f"{path}: holds no chunk, expected the latency log of a policy node")
    for key in ("stamps", "started", "infer_ms"):
        if key not in records[0]:
            raise InputError(f"{path}: no {key} in its lines, expected the latency log of a policy node")
    return records


def from_log(path: Path, seed: int = 0) -> DelayModel:
    """Delays as a log recorded them, the first (cold) one left out where there are others."""
    records = read_log(path)
    delays = [round((r.get("decode_ms", 0.0) + r["infer_ms"]) * 1e6) for r in records]
    return DelayModel(recorded=tuple(delays[1:] or delays), seed=seed, source=path.name)
