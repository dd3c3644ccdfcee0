"""Scales of FP8 activations that hold for any input, from the weights alone: what follows a LayerNorm is bounded.

A normalised row n of K values has ‖n‖ ≤ √K, so

    |n_k w_k + b_k|            ≤ √K |w_k| + |b_k|                          the norm's output
    |W_j·(n∘w + b) + c_j|      ≤ √K ‖W_j∘w‖ + |W_j·b + c_j|                a product behind it (Cauchy-Schwarz)

and |gelu(y)| ≤ |y|. Such a scale is some eight times larger than the largest value of a typical row. E4M3 is a
floating format: that costs the three lowest of its fifteen binades and no precision above them, and in exchange
nothing is searched for a maximum at run time, nothing is calibrated, and nothing saturates.
"""

from __future__ import annotations

from torch import Tensor

from hybrid_policy.kernels.norm import E4M3_MAX


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


def _scale(bound: Tensor) -> float:
    value = float(bound)
    return value / E4M3_MAX if value != 0 else 1.0  # NaN and Inf stay: such weights must not look fine


def folded(norm: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """A norm whose output comes divided by ``scale``."""
    return norm[0] / scale, norm[1] / scale
