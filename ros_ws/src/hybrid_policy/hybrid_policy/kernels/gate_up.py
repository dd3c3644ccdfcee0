"""GeGLU's first half: ``gelu_tanh(x Wg^T) * (x Wu^T)``, both products in one pass over x.

The norm before it may be given too (NormPrologue). Where the linear before leaves its squares (NormOutput) the norm
costs no kernel of its own::

    x_hat = h * rsqrt(mean(h^2) + eps)
    y     = W (x_hat * (1 + s) + shift) = rsqrt(...) * W (h * (1 + s)) + W shift

the linear before writes h * (1 + s) and sums of h^2, this kernel applies the row factor and the additive row W shift
(computed once, at load, for each flow step) in its epilogue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import nvfp4
from hybrid_policy.kernels.linear import (
    Implementation,
    Precision,
    Weight,
    describe,
    device_of,
    prepare,
    quantized,
    rounded_activation,
)


@dataclass(frozen=True)
class NormPrologue:
    """An RMS norm folded into the product that follows it.

    Attributes:
        factor: [K] bf16, the column factor: 1 + w of a plain RMSNorm, 1 + scale of adaRMS. None if ``squares`` is
            given: then x has been multiplied by it already.
        squares: float32 [T, M], partial sums of the unscaled x^2 that the linear before wrote (NormOutput): the
            cheapest form, for x then goes to the tensor cores as it is.
        gate_shift, up_shift: [F] fp32 each, W shift of adaRMS; None for a plain norm. They may be rows of a table
            over flow steps (any storage offset, stride 1).
        eps: added to the mean square.
    """

    factor: torch.Tensor | None = None
    gate_shift: torch.Tensor | None = None
    up_shift: torch.Tensor | None = None
    eps: float = 1e-6
    squares: torch.Tensor | None = None


class PackedGateUp(torch.nn.Module, ABC):
    """Gate and up weights [F, K] each, in their final form.

    Attributes:
        features, in_features: F, K.
        precision, route: as :class:`hybrid_policy.kernels.linear.PackedLinear`.
    """

    precision: Precision
    route: str

    def __init__(self, features: int, in_features: int) -> None:
        super().__init__()
        self.features, self.in_features = features, in_features

    def forward(
        self,
        x: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        norm: NormPrologue | None = None,
        out_scale: torch.Tensor | None = None,
        pdl: bool = False,
    ) -> torch.Tensor:
        """``x`` [M, K] bf16, contiguous -> [M, F].

        Args:
            x: normalised activations, or the raw residual stream if ``norm`` is given.
            out: [M, F] contiguous, bf16, or float8_e4m3fn with ``out_scale``; a new bf16 tensor if None.
            norm: the norm to fold in.
            out_scale: float32 scalar tensor (down's ``input_scale``): out = e4m3(h / out_scale), saturating, NaN kept.
            pdl: as in PackedLinear.forward.

        Raises:
            InputError: a shape, dtype or layout that differs from the above.
        """
        self.check(x, out, norm, out_scale)
        if out is None:
            dtype = torch.bfloat16 if out_scale is None else torch.float8_e4m3fn
            out = torch.empty((x.shape[0], self.features), dtype=dtype, device=x.device)
        self.compute(x, out, norm, out_scale, pdl)
        return out

    @abstractmethod
    def compute(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        norm: NormPrologue | None,
        out_scale: torch.Tensor | None,
        pdl: bool,
    ) -> None:
        """Fill ``out``; the arguments have been checked."""

    @abstractmethod
    def effective_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 (gate, up), each [F, K]."""

    def shift_rows(self, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(W_gate shift, W_up shift)`` float32 [..., F], for :class:`NormPrologue`; ``shift`` [..., K]. At load."""
        gate, up = self.effective_weights()
        return shift.float() @ gate.T, shift.float() @ up.T

    def weight_bytes(self) -> int:
        """Bytes of all packed buffers."""
        return sum(b.nbytes for _, b in self.named_buffers() if b is not None)

    def check(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None,
        norm: NormPrologue | None,
        out_scale: torch.Tensor | None,
    ) -> None:
        """Raise InputError unless a call's arguments fit."""
        if x.ndim != 2 or x.shape[1] != self.in_features or not x.is_contiguous():
            raise InputError.at("gate_up", "x", describe(x), f"contiguous [M, {self.in_features}]")
        if x.dtype != torch.bfloat16:
            raise InputError.at("gate_up", "x.dtype", x.dtype, "bfloat16")
        expected = torch.bfloat16 if out_scale is None else torch.float8_e4m3fn
        if out is not None:
            if tuple(out.shape) != (x.shape[0], self.features) or not out.is_contiguous():
                raise InputError.at("gate_up", "out", describe(out), f"contiguous ({x.shape[0]}, {self.features})")
            if out.dtype != expected:
                raise InputError.at("gate_up", "out.dtype", out.dtype, f"{expected} (out_scale decides)")
        if norm is None:
            return
        if (norm.factor is None) == (norm.squares is None):
            raise InputError.at("gate_up", "norm.factor, norm.squares", "both or neither given", "one of them")
        if norm.squares is not None and (norm.squares.ndim != 2 or norm.squares.shape[1] != x.shape[0]):
            raise InputError.at("gate_up", "norm.squares", describe(norm.squares), f"float32 [T, {x.shape[0]}]")
        factor = norm.factor
        if factor is not None and (tuple(factor.shape) != (self.in_features,) or factor.dtype != torch.bfloat16):
            raise InputError.at("gate_up", "norm.factor", describe(factor), f"bf16 ({self.in_features},)")
        if (norm.gate_shift is None) != (norm.up_shift is None):
            raise InputError.at("gate_up", "norm", "one shift row of two", "both or none")
        for row in (norm.gate_shift, norm.up_shift):
            if row is not None and (tuple(row.shape) != (self.features,) or row.dtype != torch.float32):
                raise InputError.at("gate_up", "norm shift", describe(row), f"float32 ({self.features},)")


def geglu_reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    norm: NormPrologue | None,
    precision: Precision = "bf16",
) -> torch.Tensor:
    """The mathematics, in the dtype of ``gate``: [M, K], [F, K], [F, K] -> [M, F].

    Activations are rounded where ``precision`` quantises them: x (times the norm's column factor), before the row
    factor, which is a scalar of each token.
    """
    wide = x.to(gate.dtype)
    row = torch.ones((), dtype=gate.dtype, device=x.device)
    shifts: tuple[torch.Tensor | float, torch.Tensor | float] = (0.0, 0.0)
    if norm is not None:
        if norm.squares is not None:
            row = torch.rsqrt(norm.squares.to(gate.dtype).sum(0)[:, None] / x.shape[1] + norm.eps)
        elif norm.factor is not None:
            row = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
            wide = wide * norm.factor.to(gate.dtype)
        if norm.gate_shift is not None and norm.up_shift is not None:
            shifts = (norm.gate_shift.to(gate.dtype), norm.up_shift.to(gate.dtype))
    wide = (
        rounded_activation(wide.float(), precision).to(gate.dtype) if "a8" in precision or "a4" in precision else wide
    )
    g = (wide @ gate.T) * row + shifts[0]
    u = (wide @ up.T) * row + shifts[1]
    return torch.nn.functional.gelu(g, approximate="tanh") * u


class ReferenceGateUp(PackedGateUp):
    """Any precision in plain PyTorch, float32 arithmetic."""

    def __init__(self, gate: Weight, up: Weight, precision: Precision) -> None:
        super().__init__(gate.shape[0], gate.shape[1])
        self.precision = precision
        self.route = f"reference: PyTorch, {precision} arithmetic in float32"
        self.gate = prepare(gate, precision, implementation="reference")
        self.up = prepare(up, precision, implementation="reference")

    def compute(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        norm: NormPrologue | None,
        out_scale: torch.Tensor | None,
        pdl: bool,
    ) -> None:
        """See :func:`geglu_reference`."""
        h = geglu_reference(x, *self.effective_weights(), norm, self.precision)
        out.copy_(h if out_scale is None else (h / out_scale).clamp(-448.0, 448.0))

    def effective_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Held as they are."""
        return self.gate.effective_weight(), self.up.effective_weight()


def prepare_gate_up(
    gate: Weight,
    up: Weight,
    precision: Precision,
    *,
    implementation: Implementation = "auto",
    importance: torch.Tensor | None = None,
) -> PackedGateUp:
    """Pack gate and up [F, K]; done once, at load. Floating-point weights share one NVFP4 global scale.

    Args and errors: as :func:`hybrid_policy.kernels.linear.prepare`.
    """
    if tuple(gate.shape) != tuple(up.shape):
        raise InputError.at("gate_up", "up.shape", tuple(up.shape), f"the gate's {tuple(gate.shape)}")
    if precision.startswith("nvfp4") and isinstance(gate, torch.Tensor) and isinstance(up, torch.Tensor):
        shared = torch.maximum(nvfp4.global_scale_of(gate), nvfp4.global_scale_of(up))
        gate = nvfp4.quantize(gate, global_scale=shared, importance=importance)
        up = nvfp4.quantize(up, global_scale=shared, importance=importance)
    gate, up = quantized(gate, precision, importance), quantized(up, precision, importance)
    if implementation == "auto":
        implementation = "kernel" if device_of(gate).type == "cuda" else "reference"
    if implementation == "reference":
        return ReferenceGateUp(gate, up, precision)
    from hybrid_policy.kernels.capability import require
    from hybrid_policy.kernels.stream import capability_of
    from hybrid_policy.kernels.stream_layers import StreamGateUp
    from hybrid_policy.kernels.tiles import gate_up_route
    from hybrid_policy.kernels.w4a4 import W4A4GateUp
    from hybrid_policy.kernels.wgmma import WgmmaGateUp

    require(precision, device_of(gate))
    if precision == "nvfp4_w4a4":
        return W4A4GateUp(gate, up)
    device = device_of(gate)
    if device.type == "cuda" and gate_up_route(precision, capability_of(device)) == "wgmma":
        assert isinstance(gate, nvfp4.NVFP4Tensor)  # quantized() above
        assert isinstance(up, nvfp4.NVFP4Tensor)
        return WgmmaGateUp(gate, up)
    return StreamGateUp(gate, up, precision)
