"""An RMS norm that costs no kernel: the product before it leaves what the product behind it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NormOutput:
    """What a linear that ends a residual block writes for the norm that begins the next one.

    The next product then needs no norm kernel: it takes ``scaled`` as its x and finishes with the row factor
    ``rsqrt(sum over t of squares[t, m] / N + eps)`` (see ``gate_up.NormPrologue``).

    Attributes:
        factor: [N] bf16, the next norm's column factor (1 + w, or adaRMS's 1 + scale).
        scaled: [M, N] bf16, written: out * factor.
        squares: float32 [T, M], zero at first; partial sums of out^2 are written to its rows. T is
            ``PackedLinear.norm_tiles(m)``, a power of two: rows that no program owns stay zero.
    """

    factor: torch.Tensor
    scaled: torch.Tensor
    squares: torch.Tensor


def norm_operands(
    norm: NormOutput | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """A kernel's three arguments."""
    return (None, None, None) if norm is None else (norm.factor, norm.scaled, norm.squares)
