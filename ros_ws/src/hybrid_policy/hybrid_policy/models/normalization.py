"""Normalisation of states and actions: the formulas of openpi and of LeRobot, which differ in detail.

============  ==========================================  =======================================
mode          openpi (float64)                            LeRobot (float32)
============  ==========================================  =======================================
quantiles     (x - q01) / (q99 - q01 + 1e-6) * 2 - 1      2 (x - q01) / d - 1, d = q99 - q01, or eps if 0
mean_std      (x - mean) / (std + 1e-6)                   (x - mean) / (std + eps); back: x std + mean
min_max       -                                           2 (x - min) / d - 1, d = max - min, or eps if 0
identity      x                                           x
============  ==========================================  =======================================

Sources: openpi ``transforms.py`` (Normalize, Unnormalize); LeRobot 0.6.1 ``normalize_processor.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError

Mode = Literal["quantiles", "quantile10", "mean_std", "min_max", "identity"]

#: the two statistics that each mode needs
STATISTICS: dict[str, tuple[str, ...]] = {
    "quantiles": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "identity": (),
}

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Normalization:
    """How one vector is normalised and back.

    a, b: the mode's two statistics in its order (q01 and q99, mean and std, min and max), one value a
        dimension: float64 for openpi's formulas, float32 for LeRobot's.
    eps: openpi's 1e-6; LeRobot's from its processor (1e-8 unless changed).
    """

    mode: Mode
    style: Literal["openpi", "lerobot"]
    eps: float = 1e-8
    a: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    b: Floats = field(default_factory=lambda: np.empty(0, np.float32))

    @classmethod
    def of(
        cls,
        mode: Mode,
        style: Literal["openpi", "lerobot"],
        statistics: Mapping[str, Floats],
        dimensions: int,
        what: str,
        *,
        eps: float | None = None,
    ) -> Normalization:
        """From statistics by name; longer ones (padded to the model's width) are cut to ``dimensions``.

        Raises:
            InputError: a statistic is missing, too short or not finite, or a spread is negative.
        """
        dtype = np.float64 if style == "openpi" else np.float32
        epsilon = eps if eps is not None else (1e-6 if style == "openpi" else 1e-8)
        names = STATISTICS[mode]
        if not names:
            return cls(mode, style, epsilon)
        missing = [name for name in names if name not in statistics]
        if missing:
            raise InputError(f"{what}: {mode} normalisation needs {', '.join(names)}; missing: {', '.join(missing)}")
        pair: list[Floats] = []
        for name in names:
            values: Floats = np.ravel(statistics[name]).astype(dtype)
            if values.size < dimensions:
                raise InputError(f"{what}.{name}: {values.size} values given, expected {dimensions}")
            if not np.isfinite(values[:dimensions]).all():
                raise InputError(f"{what}.{name}: holds NaN or infinity")
            pair.append(values[:dimensions])
        spread = pair[1] if mode == "mean_std" else pair[1] - pair[0]
        if (spread < 0).any():
            at = int(np.argmin(spread))
            raise InputError(f"{what}: {names[1]} is below {'0' if mode == 'mean_std' else names[0]} in dimension {at}")
        return cls(mode, style, epsilon, pair[0], pair[1])

    @property
    def _spread(self) -> Floats:
        d = self.b if self.mode == "mean_std" else self.b - self.a
        if self.style == "openpi":
            return d + self.eps
        if self.mode == "mean_std":
            return d + np.float32(self.eps)
        return np.where(d == 0, np.float32(self.eps), d)

    def _own(self, x: Floats) -> Floats:
        """LeRobot works in float32; openpi in numpy's wider type of x and its float64 statistics."""
        return x if self.style == "openpi" else x.astype(np.float32)

    def normalize(self, x: Floats) -> Floats:
        """[..., n] -> [..., n] in the style's own precision."""
        if self.mode == "identity":
            return x
        x = self._own(x)
        if self.mode == "mean_std":
            return (x - self.a) / self._spread
        if self.style == "openpi":
            return (x - self.a) / self._spread * 2.0 - 1.0
        return 2.0 * (x - self.a) / self._spread - 1.0

    def unnormalize(self, x: Floats) -> Floats:
        """The way back; LeRobot's mean_std leaves eps out, as LeRobot does."""
        if self.mode == "identity":
            return x
        x = self._own(x)
        if self.mode == "mean_std":
            return x * (self._spread if self.style == "openpi" else self.b) + self.a
        if self.style == "openpi":
            return (x + 1.0) / 2.0 * self._spread + self.a
        if self.mode == "min_max":
            return (x + 1.0) / 2.0 * self._spread + self.a
        return (x + 1.0) * self._spread / 2.0 + self.a


#: left edges of the 256 bins of [-1, 1]
_EDGES = np.linspace(-1, 1, 256 + 1)[:-1]


def discretize(state: Floats) -> NDArray[np.intp]:
    """Normalised state -> bins 0...255; below -1 gives -1, above 1 gives 255 (openpi, LeRobot)."""
    return np.digitize(state, bins=_EDGES) - 1
