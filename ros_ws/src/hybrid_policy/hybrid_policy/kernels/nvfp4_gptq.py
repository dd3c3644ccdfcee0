"""NVFP4 by error feedback over calibration activations (GPTQ: Frantar et al., arXiv 2210.17323).

Columns are rounded one after another; each one's error is spread over the columns not yet rounded so that the layer's
output on the calibration activations changes least: with H = X^T X and U the upper Cholesky factor of its inverse,
``w[:, j:] -= (w[:, j] - q[:, j]) / U[j, j] * U[j, j:]``. A group's scale is searched when its first column's turn
comes, on the weights as they then are, weighted by what each column's error costs: ``1 / U[j, j]^2``.
"""

from __future__ import annotations

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import nvfp4
from hybrid_policy.kernels.nvfp4 import GROUP, NVFP4Tensor


def hessian(activations: torch.Tensor) -> torch.Tensor:
    """X^T X in float64 of activations [M, K]; add those of several batches."""
    wide = activations.double()
    return wide.T @ wide


def quantize_gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    *,
    damping: float = 0.01,
    global_scale: torch.Tensor | None = None,
    block: int = 128,
) -> NVFP4Tensor:
    """Quantise a matrix for the inputs that ``moments`` describes.

    Args:
        weight: [N, K] floating point, K a multiple of 16.
        moments: [K, K], :func:`hessian`'s sum.
        damping: added to the diagonal, as a part of its mean; keeps directions without data from diverging.
        global_scale: as :func:`hybrid_policy.kernels.nvfp4.quantize`.
        block: columns whose updates are gathered before they reach the rest; speed only.

    Raises:
        InputError: shapes that do not fit, or moments that are not finite.
    """
    n, k = weight.shape
    if tuple(moments.shape) != (k, k) or not bool(torch.isfinite(moments).all()):
        raise InputError.at("quantize_gptq", "moments", tuple(moments.shape), f"finite [{k}, {k}]")
    global_ = nvfp4.global_scale_of(weight) if global_scale is None else global_scale.float()
    inverse = moments.double() + damping * moments.diagonal().double().mean() * torch.eye(k, device=weight.device)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(inverse)), upper=True).float()
    left = weight.float() / global_
    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((n, k // GROUP), dtype=torch.float8_e4m3fn, device=weight.device)
    cost = upper.diagonal().reciprocal().square()
    for begin in range(0, k, block):
        end = min(begin + block, k)
        errors = torch.zeros((n, end - begin), device=weight.device)
        for j in range(begin, end):
            if j % GROUP == 0:
                here = left[:, j : j + GROUP].contiguous()
                weights = cost[j : j + GROUP].expand(n, 1, GROUP)
                scales[:, j // GROUP] = nvfp4.search_scales(here.unsqueeze(1), "sweep", weights)[:, 0]
                scale = scales[:, j // GROUP].float()
                divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
            codes[:, j] = nvfp4.encode_e2m1(left[:, j] / divisor)
            errors[:, j - begin] = (left[:, j] - nvfp4.decode_e2m1(codes[:, j]) * scale) / upper[j, j]
            left[:, j + 1 : end] -= errors[:, j - begin, None] * upper[j, j + 1 : end]
        left[:, end:] -= errors @ upper[begin:end, end:]
    return NVFP4Tensor(nvfp4.pack_codes(codes), scales, global_.reshape(()))
