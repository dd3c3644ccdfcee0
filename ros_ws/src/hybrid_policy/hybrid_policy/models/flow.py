"""The flow-matching loop: Euler steps from noise (t = 1) to actions (t = 0). arXiv 2410.24164."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

#: (v, x, t) -> corrected v; the place where real-time chunking enters.
Guidance = Callable[[Tensor, Tensor, float], Tensor]


class Velocity(Protocol):
    """The learnt field at Euler step ``k``, time ``t``."""

    def __call__(self, k: int, t: float, x: Tensor) -> Tensor:
        """v at x, float32 [B, H, A]."""
        ...


def step_times(num_steps: int) -> list[float]:
    """t of each Euler step: 1 + k * dt, not accumulated, as LeRobot computes it."""
    return [1.0 - k * (1.0 / num_steps) for k in range(num_steps)]


def accumulated_times(num_steps: int) -> list[float]:
    """t of each Euler step as openpi has it: dt added up in float32."""
    dt, t = torch.tensor(-1.0 / num_steps, dtype=torch.float32), torch.tensor(1.0, dtype=torch.float32)
    times = []
    while t >= -dt / 2:
        times.append(float(t))
        t = t + dt
    return times


def time_embedding(t: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sine-cosine embedding, computed in float64: float32 [...] -> float32 [..., width], sines first.

    Periods are spaced geometrically: min * (max / min) ** linspace(0, 1, width / 2).
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    period = min_period * (max_period / min_period) ** fraction
    angles = t[..., None].double() * (2.0 * math.pi / period)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def euler(
    velocity: Velocity,
    noise: Tensor,
    times: list[float],
    *,
    guidance: Guidance | None = None,
    clean: Tensor | None = None,
    clean_mask: Tensor | None = None,
) -> Tensor:
    """Integrate x from ``noise`` to actions: x <- x - v / n, n = len(times).

    Args:
        velocity: called with (k, t, x) at each step.
        noise: float32 [B, H, A].
        times: t of each step.
        guidance: corrects v from (v, x, t).
        clean, clean_mask: training-time real-time chunking (arXiv 2512.05964): where the mask (bool,
            broadcastable to [B, H, A]) is set, x is ``clean`` before every step and after the last.

    Returns:
        float32 [B, H, A].
    """
    x, dt = noise, -1.0 / len(times)
    for k, t in enumerate(times):
        if clean is not None and clean_mask is not None:
            x = torch.where(clean_mask, clean, x)
        v = velocity(k, t, x)
        if guidance is not None:
            v = guidance(v, x, t)
        x = x + dt * v
    if clean is not None and clean_mask is not None:
        x = torch.where(clean_mask, clean, x)
    return x


def real_time_guidance(previous: Tensor, weights: Tensor, beta: float) -> Guidance:
    """Real-time chunking (arXiv 2506.07339), the identity variant, which needs no gradient.

    v <- v - w * W * (Y - (x - t v)) with w = min(beta, (t^2 + (1 - t)^2) / (t (1 - t))), beta at t = 1.

    Args:
        previous: Y, float32 [H, A] or [B, H, A]: what is left of the previous chunk, zero-padded.
        weights: W, float32 [H]: 1 for the steps that will have been executed, falling to 0.
        beta: the bound of the guidance weight (5 in the paper's code, 10 in LeRobot).
    """

    def guide(v: Tensor, x: Tensor, t: float) -> Tensor:
        spread = t * (1.0 - t)
        strength = beta if spread <= 0.0 else min(beta, (t * t + (1.0 - t) ** 2) / spread)
        return v - strength * weights[:, None] * (previous - (x - t * v))

    return guide
