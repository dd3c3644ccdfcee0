"""FP8 E4M3 (finite only, largest value 448): per-tensor and per-row weights, per-token-group activations.

``weight[n, k] = e4m3(q[n, k]) * scale[n]``; ``x[m, k] = e4m3(q[m, k]) * scale[m, k // group]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.nvfp4 import E4M3_MAX


@dataclass(frozen=True)
class FP8Tensor:
    """A quantised matrix [N, K].

    Attributes:
        values: float8_e4m3fn [N, K].
        scale: float32, [] (one a tensor) or [N] (one a row).
    """

    values: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float8_e4m3fn or self.values.ndim != 2:
            got = (tuple(self.values.shape), self.values.dtype)
            raise InputError.at("fp8", "values", got, "float8_e4m3fn [N, K]")
        if self.scale.dtype != torch.float32 or self.scale.shape not in ((), (self.values.shape[0],)):
            got = (tuple(self.scale.shape), self.scale.dtype)
            raise InputError.at("fp8", "scale", got, f"float32 [] or [{self.values.shape[0]}]")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    def to(self, device: torch.device | str) -> FP8Tensor:
        """The same tensor on ``device``."""
        return FP8Tensor(self.values.to(device), self.scale.to(device))


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Round to nearest even, saturating at +-448; NaN stays NaN (a plain cast would make 449 a NaN)."""
    return values.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(weight: torch.Tensor, *, per_row: bool = True) -> FP8Tensor:
    """Quantise a weight [N, K]; scale = amax / 448 of each row or of the tensor.

    Raises:
        InputError: not a floating-point matrix, or not finite.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        got = (tuple(weight.shape), weight.dtype)
        raise InputError.at("fp8.quantize", "weight", got, "a floating-point [N, K]")
    if not torch.isfinite(weight).all():
        raise InputError.at("fp8.quantize", "weight", "NaN or Inf", "finite values")
    wide = weight.float()
    amax = wide.abs().amax(-1) if per_row else wide.abs().amax()
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    return FP8Tensor(encode_e4m3(wide / (scale.unsqueeze(-1) if per_row else scale)), scale)


def dequantize(tensor: FP8Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K] in ``dtype``."""
    scale = tensor.scale.unsqueeze(-1) if tensor.scale.ndim else tensor.scale
    return (tensor.values.float() * scale).to(dtype)


def power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """The least power of two ``s`` with ``amax / s <= 448``; NaN or Inf where amax is.

    E4M3 is a floating format: a power of two costs no precision above its subnormals, multiplies exactly, and needs
    no division in a kernel.
    """
    mantissa, exponent = torch.frexp(amax.float().nan_to_num(posinf=1.0))
    # amax = mantissa * 2**exponent, mantissa in [0.5, 1); 448 = 0.875 * 2**9. The least normal bounds it below.
    power = torch.where(mantissa == 0, -126, exponent - 9 + (mantissa > 0.875)).clamp(min=-126)
    scale = torch.ldexp(torch.ones_like(mantissa), power)
    return torch.where(torch.isfinite(amax), scale, amax)


def quantize_activation(x: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations by token, one power-of-two scale each group of ``group`` columns (all K if None).

    Args:
        x: [M, K] floating point. The last group may be short. A NaN stays NaN; an Inf makes its group's scale
            Inf: bad activations never turn into plausible numbers.

    Returns:
        (float8_e4m3fn [M, K], float32 scales [M, ceil(K / group)]).
    """
    m, k = x.shape
    group = k if group is None else group
    count = -(-k // group)
    wide = torch.nn.functional.pad(x.float(), (0, count * group - k)).reshape(m, count, group)
    scale = power_of_two_scale(wide.abs().amax(-1))
    divisor = torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))
    quantized = encode_e4m3(wide / divisor.unsqueeze(-1)).reshape(m, count * group)[:, :k]
    return quantized.contiguous(), scale


def dequantize_activation(values: torch.Tensor, scale: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """Float32 [M, K]; the inverse of :func:`quantize_activation` up to rounding."""
    k = values.shape[1]
    expanded = scale.repeat_interleave(k if group is None else group, dim=-1)[:, :k]
    return values.float() * expanded
