"""What a control loop is set to and what it is doing."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid_policy.control.chunk_timeline import Seam
from hybrid_policy.control.watchdog import Fault

WAITING, RUNNING, HOLDING = "waiting", "running", "holding"
PAUSED, STOPPED, FAILED = "paused", "stopped", "failed"
#: Seconds between two copies of the hold command: one that is lost does not stay lost.
HOLD_REPEAT = 1.0
#: Camera periods for which the inference waits for images; and the age at which it does not wait for newer.
PATIENCE, FRESH = 1.25, 0.25


@dataclass(frozen=True)
class LoopSettings:
    """Periods in nanoseconds, tolerances in rad or m; see the node's parameters of the same names."""

    inference_period: int
    tick_period: int
    hold_tolerance: float
    tracking_tolerance: float
    max_errors: int
    wait_for_images: bool = False
    fifo_priority: int = 0
    cpu_affinity: tuple[int, ...] = (-1,)


@dataclass
class LoopStatus:
    """What the loop is doing, for diagnostics and people."""

    state: str = WAITING
    reason: str = "no observation yet"
    faults: tuple[Fault, ...] = ()
    holds: int = 0
    chunks: int = 0
    errors: int = 0
    discarded: int = 0
    unheard: int = 0
    worst_seam: Seam = field(default_factory=Seam)
    last_reason: str = ""
