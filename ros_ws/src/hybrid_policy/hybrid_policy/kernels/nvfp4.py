"""NVFP4: E2M1 values, one E4M3 scale a group of 16 along K, one float32 scale a tensor.

``weight[n, k] = e2m1(code[n, k]) * e4m3(scale[n, k // 16]) * global_scale``

A code is ``sign << 3 | index``; index 0..7 stands for 0, 0.5, 1, 1.5, 2, 3, 4, 6. Two codes share a byte, the
even k in the low nibble (ModelOpt, compressed-tensors and the hardware agree on this). Magnitudes are rounded
to nearest, ties to the even code, as ModelOpt and ``cvt.rn.satfinite.e2m1x2.f32`` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hybrid_policy.errors import InputError

GROUP = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
#: Magnitude of each 3-bit index.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Midpoints between neighbours. A magnitude on one goes to the even index (see ``encode_e2m1``).
E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

ScaleRule = Literal["sweep", "max"]


@dataclass(frozen=True)
class NVFP4Tensor:
    """A quantised matrix [N, K].

    Attributes:
        codes: uint8 [N, K / 2], two E2M1 codes a byte, even k in the low nibble.
        scales: float8_e4m3fn [N, K / 16].
        global_scale: float32 scalar tensor (ModelOpt's ``weight_scale_2``).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor

    def __post_init__(self) -> None:
        n, half = self.codes.shape
        if self.codes.dtype != torch.uint8:
            raise InputError.at("nvfp4", "codes.dtype", self.codes.dtype, "uint8")
        if (half * 2) % GROUP:
            raise InputError.at("nvfp4", "codes.shape", tuple(self.codes.shape), "[N, K/2] with K % 16 == 0")
        if self.scales.dtype != torch.float8_e4m3fn or tuple(self.scales.shape) != (n, half * 2 // GROUP):
            got = (tuple(self.scales.shape), self.scales.dtype)
            raise InputError.at("nvfp4", "scales", got, f"float8_e4m3fn [{n}, {half * 2 // GROUP}]")
        if self.global_scale.numel() != 1:
            raise InputError.at("nvfp4", "global_scale", tuple(self.global_scale.shape), "one float32")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix that this stands for."""
        return self.codes.shape[0], self.codes.shape[1] * 2

    def to(self, device: torch.device | str) -> NVFP4Tensor:
        """The same tensor on ``device``."""
        return NVFP4Tensor(self.codes.to(device), self.scales.to(device), self.global_scale.to(device))


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 code of each float, ties to the even code, saturating at 6; uint8, same shape.

    NaN has no code: it becomes the code of 6 (callers that must carry NaN do so in the group's scale).
    """
    # Ties to even: a midpoint below an even index belongs to that index, so compare with >= there and > elsewhere.
    magnitude = values.abs().float()
    index = torch.zeros_like(magnitude, dtype=torch.uint8)
    for position, midpoint in enumerate(E2M1_MIDPOINTS):
        upper_is_even = (position + 1) % 2 == 0
        index += (magnitude >= midpoint) if upper_is_even else (magnitude > midpoint)
    index = torch.where(magnitude.isnan(), torch.full_like(index, 7), index)
    return index | (torch.signbit(values).to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of E2M1 codes (one code an element, bits 0..3)."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    return table[codes.long() & 15]


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[..., K] codes -> [..., K/2] bytes, even k in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """[..., K/2] bytes -> [..., K] codes; the inverse of :func:`pack_codes`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def global_scale_of(weight: torch.Tensor) -> torch.Tensor:
    """amax / (6 * 448): the largest group scale then is E4M3's largest value (ModelOpt's rule)."""
    amax = weight.abs().amax().float()
    return torch.where(amax > 0, amax / (E2M1_MAX * E4M3_MAX), torch.ones_like(amax))


def quantize(
    weight: torch.Tensor,
    *,
    rule: ScaleRule = "sweep",
    global_scale: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> NVFP4Tensor:
    """Quantise a matrix.

    Args:
        weight: [N, K] floating point, K a multiple of 16, finite.
        rule: "max" takes each group's scale as amax / 6; "sweep" takes the E4M3 scale of least (weighted) squared
            error among those from 0.4 to 2 times it (a wider sweep finds nothing better; a test holds that).
        global_scale: shared by several matrices (gate and up); from the weight's amax if not given.
        importance: [K] or [N, K] non-negative weights of the squared error, e.g. the mean of x_k ** 2 over
            calibration activations (the Hessian's diagonal).

    Raises:
        InputError: wrong rank, K, dtype, or a weight that is not finite.
    """
    if weight.ndim != 2 or weight.shape[1] % GROUP or not weight.is_floating_point():
        got = (tuple(weight.shape), weight.dtype)
        raise InputError.at("nvfp4.quantize", "weight", got, "a floating-point [N, K] with K % 16 == 0")
    if not torch.isfinite(weight).all():
        raise InputError.at("nvfp4.quantize", "weight", "NaN or Inf", "finite values")
    global_ = (global_scale_of(weight) if global_scale is None else global_scale).to(weight.device, torch.float32)
    codes, scales = [], []
    # Row blocks bound the memory of the sweep: a dozen float32 copies of the block.
    rows = max(1, (1 << 22) // weight.shape[1])
    weights = None if importance is None else importance.float().to(weight.device).expand(weight.shape)
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows].float() / global_
        groups = block.reshape(block.shape[0], -1, GROUP)
        error_weights = None
        if weights is not None:
            error_weights = weights[start : start + rows].reshape(groups.shape)
        scale = search_scales(groups, rule, error_weights)
        divisor = torch.where(scale.float() > 0, scale.float(), torch.ones((), device=weight.device))
        code = encode_e2m1(groups / divisor.unsqueeze(-1))
        codes.append(pack_codes(code.reshape(block.shape)))
        scales.append(scale)
    return NVFP4Tensor(torch.cat(codes), torch.cat(scales), global_.reshape(()))


def search_scales(groups: torch.Tensor, rule: ScaleRule, weights: torch.Tensor | None) -> torch.Tensor:
    """E4M3 scale [N, G] of groups [N, G, 16] in units of the global scale; ``weights`` of their errors."""
    start = (groups.abs().amax(-1) / E2M1_MAX).clamp(max=E4M3_MAX)
    best = start.to(torch.float8_e4m3fn)
    if rule == "max":
        return best
    # Positive E4M3 values in the order of their bytes, so neighbouring candidates are neighbouring bytes.
    # 0.4..2 times amax/6 spans at most 8 mantissa steps an octave: 11 below, 8 above.
    centre = best.view(torch.uint8).to(torch.int16)
    best_error = torch.full_like(start, float("inf"))
    for step in range(-11, 9):
        byte = (centre + step).clamp(0, 0x7E).to(torch.uint8)
        scale = byte.view(torch.float8_e4m3fn).float()
        safe = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
        difference = _round_e2m1(groups / safe) * scale.unsqueeze(-1) - groups
        squared = difference.square()
        error = (squared if weights is None else squared * weights).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, byte, best.view(torch.uint8)).view(torch.float8_e4m3fn)
    return best


def _round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """``decode(encode(values))`` by arithmetic: spacing 0.5 below 2, 1 below 4, 2 up to 6; ties to even."""
    magnitude = values.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, values)


def dequantize(tensor: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, K] in ``dtype``; float32 holds e2m1 * e4m3 exactly, the product with the global scale is rounded."""
    values = decode_e2m1(unpack_codes(tensor.codes))
    scales = tensor.scales.float().repeat_interleave(GROUP, dim=-1)
    return (values * scales * tensor.global_scale.float()).to(dtype)
