"""What an engine needs of a device: run one inference from prepared inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.models.processors import ModelInputs


@dataclass(frozen=True)
class Guidance:
    """Real-time chunking's inputs of one inference.

    target: Y, float32 [horizon, max_action_dim]. weights: W, float32 [horizon]; zeros guide nothing.
    clean: leading actions that are given (training-time real-time chunking), 0 otherwise.
    """

    target: NDArray[np.float32]
    weights: NDArray[np.float32]
    clean: int = 0


class Backend(Protocol):
    """One device with a model on it, everything allocated."""

    @property
    def description(self) -> str:
        """One line for the log: device, precision routes."""
        ...

    def run(
        self, inputs: ModelInputs, noise: NDArray[np.float32], guidance: Guidance | None
    ) -> tuple[NDArray[np.float32], Mapping[str, float]]:
        """Normalised actions float32 [horizon, max_action_dim], and seconds of vision, prefix and denoise."""
        ...

    def memory_bytes(self) -> int:
        """Device memory held at steady state; 0 where that has no meaning."""
        ...

    def close(self) -> None:
        """Give the device's memory back. The backend cannot run any more."""
        ...
