"""Scales of FP8 activations that hold for any input, from the weights alone: what follows a norm is bounded.

A normalised row n of K values has ‖n‖ ≤ √K, so

    |n_k w_k + b_k|            ≤ √K |w_k| + |b_k|                          the norm's output
    |W_j·(n∘w + b) + c_j|      ≤ √K ‖W_j∘w‖ + |W_j·b + c_j|                a product behind it (Cauchy-Schwarz)

and |gelu(y)| ≤ |y|. Such a scale is some eight times larger than the largest value of a typical row. E4M3 is a
floating format: that costs the three lowest of its fifteen binades and no precision above them, and in exchange
nothing is searched for a maximum at run time, nothing is calibrated, and nothing saturates.

Behind a product of two products, gelu(g) u with g_j = a_j·h and u_j = b_j·h, the same argument gives a scale a row::

    |gelu(g_j) u_j| ≤ |g_j u_j| ≤ ‖h‖² (‖a_j‖ ‖b_j‖ + |a_j·b_j|) / 2

(the largest product of two projections of a vector of that length). It lies some 150 times above a typical row's
largest value, seven binades, and costs 0.1 dB where the rows of the weights are alike; where few of them are far longer
than the others, `gated_row_loss` says what it costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybrid_policy.kernels.norm import E4M3_MAX

#: decibels that a scale known before a product may cost
MOST_LOSS = 1.0


def norm_output_scale(weight: Tensor, bias: Tensor) -> float:
    """Of a LayerNorm's output: weight, bias float [K]."""
    return _scale((weight.numel() ** 0.5 * weight.abs() + bias.abs()).amax())


def product_scale(weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> float:
    """Of a product behind a LayerNorm, before or after a GELU.

    Args:
        weight: float [N, K], as it is multiplied. bias: float [N]. norm_weight, norm_bias: float [K].

    The norm's output is rounded to E4M3, by at most 1/16 of each value; a hundredth more covers the product's rounding.
    """
    rows = weight.shape[1] ** 0.5 * (weight * norm_weight).norm(dim=1)
    shift = (weight @ norm_bias + bias).abs()
    rounding = (rows + weight.abs() @ norm_bias.abs()) / 16
    return _scale((1.01 * (rows + shift + rounding)).amax())


def gated_row_factor(gate: Tensor, up: Tensor) -> float:
    """What ‖h‖² is multiplied by to give a scale for the row gelu(gate h) * (up h).

    Args:
        gate, up: float [N, K], as they are multiplied; ``h`` comes rounded to E4M3 with its own scale a row.

    Rounding moves each value by 1/16, and the smallest by 2^-10 of that scale; a hundredth more covers the products'.
    """
    rounded = 17 / 16 + gate.shape[1] ** 0.5 * 2**-10 / E4M3_MAX
    longest = (gate.norm(dim=1) * up.norm(dim=1) + (gate * up).sum(1).abs()).amax() / 2
    return _scale(1.01 * rounded**2 * longest)


def gated_row_loss(gate: Tensor, up: Tensor, down: Tensor, factor: float) -> float:
    """Decibels by which scales of ``factor`` make E4M3's error in down (gelu(gate h) * (up h)) larger, at most.

    Args:
        gate, up: float [N, K]. down: float [L, N].

    Of a random h: g_j and u_j are then normal and as wide as ‖h‖ ‖a_j‖ / √K, and gelu(g) is g / 2 at least. Rounding
    leaves 7.0e-4 of a value's square (uniform in the logarithm), and below 2^-6 of the scale the square of a step of
    2^-9 / √12, or the whole value.
    """
    energy = down.square().sum(0)
    values = (gate.norm(dim=1) * up.norm(dim=1) / gate.shape[1]).square() / 4
    lost = torch.clamp(values, max=(2**-9 * factor) ** 2 / 12)
    return 10 * math.log10(1 + float((energy * lost).sum() / (energy * values).sum()) / 7.0e-4)


def affordable_row_factor(gate: Tensor, up: Tensor, down: Tensor) -> float | None:
    """`gated_row_factor`; None where that would cost more than `MOST_LOSS`."""
    factor = gated_row_factor(gate, up)
    return factor if gated_row_loss(gate, up, down, factor) <= MOST_LOSS else None


def _scale(bound: Tensor) -> float:
    value = float(bound)
    return value / E4M3_MAX if value != 0 else 1.0  # NaN and Inf stay: such weights must not look fine


def folded(norm: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """A norm whose output comes divided by ``scale``."""
    return norm[0] / scale, norm[1] / scale
