"""One Euler step of the flow, with real-time chunking, from the expert's output to its next input.

For each action i of the chunk (x, Y: [horizon, actions]; W: [horizon]; c = clean count)::

    v  = norm(h) W_out.T + b_out
    x <- x - dt * (v - w * W[i] * (Y - (x - t * v)))
    x <- Y where i < c
    h <- x W_in.T + b_in
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybrid_policy.kernels.norm import pdl_option
from hybrid_policy.kernels.qkv import prefetch_l2


@dataclass(frozen=True)
class FlowWeights:
    """The two action projections, float32: ``out_weight`` [A, K], ``out_bias`` [A], ``in_weight`` [K, A],
    ``in_bias`` [K], as checkpoints hold them; and ``in_columns`` [A, K], the second transposed."""

    out_weight: Tensor
    out_bias: Tensor
    in_weight: Tensor
    in_bias: Tensor
    in_columns: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_columns", self.in_weight.T.contiguous())

    def double(self) -> FlowWeights:
        """The same in float64, for references."""
        return FlowWeights(*(x.double() for x in (self.out_weight, self.out_bias, self.in_weight, self.in_bias)))


@dataclass(frozen=True)
class Guide:
    """Real-time chunking's device inputs: target Y float32 [H, A], weights W float32 [H], clean int32 [1]."""

    target: Tensor
    weights: Tensor
    clean: Tensor


def flow_step_reference(
    h: Tensor,
    x: Tensor,
    h_next: Tensor,
    weights: FlowWeights,
    guide: Guide,
    t: float,
    dt: float,
    strength: float,
    *,
    first: bool = False,
) -> None:
    """The mathematics of `flow_step`."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    if not first:
        v = h.to(weights.out_weight.dtype) @ weights.out_weight.T + weights.out_bias
        pull = strength * guide.weights[:, None] * (guide.target - (x - t * v))
        x -= dt * (v - pull)
    x.copy_(torch.where(rows < guide.clean, guide.target, x))
    h_next.copy_(x @ weights.in_weight.T + weights.in_bias)


def plan_flow(width: int) -> tuple[int, int]:
    """(BLOCK_K, warps): four neighbouring values of K a thread, all actions.

    Then a thread holds every action's sum and its own columns of both weights, and nothing need change hands between
    the two products; with more warps than that, several would write one value to one place of shared memory.
    """
    block = max(16, min(1024, triton.next_power_of_2(width)))
    return block, max(1, block // 128)


@triton.jit
def _flow_step_kernel(
    h_ptr, x_ptr, next_ptr, out_w_ptr, out_b_ptr, in_w_ptr, in_b_ptr, y_ptr, w_ptr, clean_ptr,
    scale_ptr, shift_ptr, t, dt, strength, eps,
    K: tl.constexpr, A: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr, NORM: tl.constexpr, PROGRAMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    a = tl.arange(0, BLOCK_A)
    inside = a < A
    if PDL:
        # the loop's weights have pushed these two out of L2 since the last step
        line = tl.arange(0, BLOCK_A)
        for k0 in tl.static_range(0, K * A, 32 * BLOCK_A * PROGRAMS):
            place = k0 + (row * BLOCK_A + line) * 32
            place = tl.where(place < K * A, place, 0)
            prefetch_l2(out_w_ptr + place)
            prefetch_l2(in_w_ptr + place)
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * A + a, mask=inside, other=0.0)
    target = tl.load(y_ptr + row * A + a, mask=inside, other=0.0)
    if not FIRST:
        squares = tl.zeros([BLOCK_K], tl.float32)
        if NORM:
            for k0 in tl.static_range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                h = tl.load(h_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
                squares += h * h
        root = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        # one reduction at the end: the loads of all blocks are under way at once
        products = tl.zeros([BLOCK_A, BLOCK_K], tl.float32)
        for k0 in tl.static_range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            h = tl.load(h_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM:
                scale = tl.load(scale_ptr + k, mask=k < K, other=0.0).to(tl.float32)
                shift = tl.load(shift_ptr + k, mask=k < K, other=0.0).to(tl.float32)
                h = h * root * scale + shift
            mask = inside[:, None] & (k < K)[None, :]
            weight = tl.load(out_w_ptr + a[:, None] * K + k[None, :], mask=mask, other=0.0)
            products += weight * h[None, :]
        v = tl.sum(products, 1)
        v += tl.load(out_b_ptr + a, mask=inside, other=0.0)
        pull = strength * tl.load(w_ptr + row) * (target - (x - t * v))
        x = x - dt * (v - pull)
    x = tl.where(row < tl.load(clean_ptr), target, x)
    for i in tl.static_range(A):  # each thread holds all of x: a store of the whole would share it out once more
        tl.store(x_ptr + row * A + i, tl.sum(tl.where(a == i, x, 0.0), 0))
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < K)[None, :]
        weight = tl.load(in_w_ptr + a[:, None] * K + k[None, :], mask=mask, other=0.0)
        y = tl.sum(weight * x[:, None], 0) + tl.load(in_b_ptr + k, mask=k < K, other=0.0)
        tl.store(next_ptr + row * K + k, y.to(next_ptr.dtype.element_ty), mask=k < K)


def flow_step(
    h: Tensor,
    x: Tensor,
    h_next: Tensor,
    weights: FlowWeights,
    guide: Guide,
    t: float,
    dt: float,
    strength: float,
    *,
    first: bool = False,
    norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
) -> None:
    """Advance ``x`` by one Euler step and write the expert's next input.

    Args:
        h: [H, K] the expert's output, normed, or raw with ``norm`` = (1 + scale, shift), [K] each.
        x: float32 [H, A], in place. h_next: [H, K]; may be ``h``.
        t, dt, strength: the step's time, 1 / steps, and real-time chunking's w(t).
        first: before the first step: only ``x`` -> ``h_next``.
    """
    rows, actions = x.shape
    width = h_next.shape[1]
    scale, shift = norm if norm is not None else (None, None)
    block, warps = plan_flow(width)
    _flow_step_kernel[(rows,)](
        h, x, h_next, weights.out_weight, weights.out_bias, weights.in_columns, weights.in_bias,
        guide.target, guide.weights, guide.clean, scale, shift, t, dt, strength, eps,
        K=width, A=actions, BLOCK_A=triton.next_power_of_2(actions), BLOCK_K=block,
        FIRST=first, NORM=norm is not None, PROGRAMS=rows, PDL=pdl, num_warps=warps, **pdl_option(pdl),
    )  # fmt: skip
