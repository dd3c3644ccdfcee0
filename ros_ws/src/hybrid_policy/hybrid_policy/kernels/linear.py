"""Linear layers by precision: one table from a precision's name to what computes it.

``prepare(weight, precision)`` packs a weight once, at load; the result is called in the forward pass::

    y = x @ W.T (+ bias)
    out = y | residual + y | residual + gate * y        (in float32, rounded once, to ``out``'s dtype)

The implementation is chosen here, once, by where the weight lies: a kernel on a GPU, the plain PyTorch reference
on a CPU (or by name). It never changes later: a shape or a device that a kernel cannot take is an error.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import fp8, nvfp4
from hybrid_policy.kernels.norm_output import NormOutput
from hybrid_policy.kernels.nvfp4_activation import nvfp4_dequantize, nvfp4_reference

Precision = Literal["bf16", "fp8_w8a8", "nvfp4_w4a16", "nvfp4_w4a4"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8_w8a8", "nvfp4_w4a16", "nvfp4_w4a4")
Implementation = Literal["auto", "kernel", "reference"]
#: A weight still to be quantised, or one that a checkpoint brought quantised.
Weight = torch.Tensor | nvfp4.NVFP4Tensor | fp8.FP8Tensor

logger = logging.getLogger(__name__)


class PackedLinear(torch.nn.Module, ABC):
    """A weight [N, K] in its final form. Subclasses hold buffers only; nothing is allocated in a call with ``out``.

    Attributes:
        out_features, in_features: N, K.
        precision: the table's name.
        route: one line that names what computes it, for logs and ``hybrid-policy doctor``.
    """

    precision: Precision
    route: str

    def __init__(self, out_features: int, in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise InputError.at("linear", "bias.shape", tuple(bias.shape), f"({out_features},)")
        self.bias: torch.Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        x_scale: torch.Tensor | None = None,
        norm_out: NormOutput | None = None,
        pdl: bool = False,
    ) -> torch.Tensor:
        """``x`` [M, K] (contiguous) -> [M, N].

        Args:
            x: bf16 activations; or, with precision fp8_w8a8 only, float8_e4m3fn ones with ``x_scale``.
            out: written and returned if given (bf16 or fp32, [M, N], contiguous; may be ``residual`` itself);
                else a new bf16 tensor.
            residual: [M, N] bf16 or fp32, added in fp32.
            gate: [N] fp32 or bf16 (adaRMS's gate row), multiplies y before the residual is added; needs ``residual``.
            x_scale: float32 scalar tensor, the scale of FP8 activations (gate_up's ``out_scale``).
            norm_out: also write what the norm of the next block needs (see NormOutput).
            pdl: launch as a stage of a programmatic-dependent-launch chain: weights are fetched before the wait
                for the preceding kernel, and dependents may start early. On a route of a library's (cuBLAS) and
                on the reference it changes nothing.

        Raises:
            InputError: a shape, dtype or layout that differs from the above.
        """
        self.check(x, out, residual, gate, x_scale, norm_out)
        if out is None:
            out = torch.empty((x.shape[0], self.out_features), dtype=torch.bfloat16, device=x.device)
        self.compute(x, out, residual, gate, x_scale, norm_out, pdl)
        return out

    @abstractmethod
    def compute(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None,
        gate: torch.Tensor | None,
        x_scale: torch.Tensor | None,
        norm_out: NormOutput | None,
        pdl: bool,
    ) -> None:
        """Fill ``out``; the arguments have been checked."""

    def norm_tiles(self, m: int) -> int:
        """T of ``NormOutput.squares`` [T, M] for ``m`` tokens; a power of two."""
        return 1

    @abstractmethod
    def effective_weight(self) -> torch.Tensor:
        """The float32 [N, K] that the packed weight stands for."""

    def weight_bytes(self) -> int:
        """Bytes of all packed buffers but the bias."""
        return sum(b.nbytes for name, b in self.named_buffers() if name != "bias" and b is not None)

    def check(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None,
        residual: torch.Tensor | None,
        gate: torch.Tensor | None,
        x_scale: torch.Tensor | None,
        norm_out: NormOutput | None,
    ) -> None:
        """Raise InputError unless a call's arguments fit."""
        if x.ndim != 2 or x.shape[1] != self.in_features or not x.is_contiguous():
            raise InputError.at("linear", "x", describe(x), f"contiguous [M, {self.in_features}]")
        if x_scale is None and x.dtype != torch.bfloat16:
            raise InputError.at("linear", "x.dtype", x.dtype, "bfloat16")
        if x_scale is not None and (self.precision != "fp8_w8a8" or x.dtype != torch.float8_e4m3fn):
            got = f"{x.dtype} in a {self.precision} layer"
            raise InputError.at("linear", "x with x_scale", got, "float8_e4m3fn in an fp8_w8a8 layer")
        if gate is not None and residual is None:
            raise InputError.at("linear", "residual", None, "a residual with the gate")
        shape = (x.shape[0], self.out_features)
        for name, tensor in (("out", out), ("residual", residual)):
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape or not tensor.is_contiguous():
                raise InputError.at("linear", name, describe(tensor), f"contiguous {shape}")
            if tensor.dtype not in (torch.bfloat16, torch.float32):
                raise InputError.at("linear", f"{name}.dtype", tensor.dtype, "bfloat16 or float32")
        if norm_out is not None:
            wanted = (self.norm_tiles(x.shape[0]), x.shape[0])
            if tuple(norm_out.squares.shape) != wanted or tuple(norm_out.scaled.shape) != shape:
                got = f"squares {tuple(norm_out.squares.shape)}, scaled {tuple(norm_out.scaled.shape)}"
                raise InputError.at("linear", "norm_out", got, f"squares {wanted}, scaled {shape}")
        if gate is not None and (tuple(gate.shape) != (self.out_features,) or not gate.is_contiguous()):
            raise InputError.at("linear", "gate", describe(gate), f"contiguous ({self.out_features},)")


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype and strides of a tensor that does not fit, for an error."""
    return f"{tuple(tensor.shape)} {tensor.dtype} strides {tensor.stride()}"


def epilogue(
    y: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    norm_out: NormOutput | None = None,
) -> None:
    """The reference of every kernel's epilogue, on a float32 ``y`` [M, N]."""
    if bias is not None:
        y = y + bias.float()
    if gate is not None:
        y = y * gate.float()
    if residual is not None:
        y = y + residual.float()
    out.copy_(y)
    if norm_out is not None:
        norm_out.scaled.copy_(out.float() * norm_out.factor.float())
        norm_out.squares.zero_()
        norm_out.squares[0] = out.float().square().sum(-1)


class ReferenceLinear(PackedLinear):
    """Any precision in plain PyTorch: the mathematics that the kernels are held against, and the CPU's route."""

    def __init__(self, weight: Weight, precision: Precision, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.precision = precision
        self.route = f"reference: PyTorch, {precision} arithmetic in float32"
        if isinstance(weight, nvfp4.NVFP4Tensor):
            wide = nvfp4.dequantize(weight)
        elif isinstance(weight, fp8.FP8Tensor):
            wide = fp8.dequantize(weight)
        else:
            wide = weight.float()
        self.register_buffer("weight", wide, persistent=False)

    def compute(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None,
        gate: torch.Tensor | None,
        x_scale: torch.Tensor | None,
        norm_out: NormOutput | None,
        pdl: bool,
    ) -> None:
        """Float32 throughout; activations quantised first where the precision says so."""
        wide = x.float() * x_scale if x_scale is not None else rounded_activation(x.float(), self.precision)
        epilogue(wide @ self.effective_weight().T, out, self.bias, residual, gate, norm_out)

    def effective_weight(self) -> torch.Tensor:
        """Held as it is."""
        return self.get_buffer("weight")


def rounded_activation(x: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Float32 [M, K] as ``precision`` sees it: quantised and dequantised where it quantises activations."""
    if precision == "fp8_w8a8":
        return fp8.dequantize_activation(*fp8.quantize_activation(x, ACTIVATION_GROUP), ACTIVATION_GROUP)
    if precision == "nvfp4_w4a4":
        return nvfp4_dequantize(nvfp4_reference(x))
    return x


#: FP8 activations have one scale a token and this many k (the small-M kernel quantises as it loads).
ACTIVATION_GROUP = 128


def quantized(weight: Weight, precision: Precision, importance: torch.Tensor | None = None) -> Weight:
    """``weight`` in the format that ``precision`` wants; one that has it already is returned as it is.

    Raises:
        InputError: the weight is quantised in another format.
    """
    wanted = {"bf16": torch.Tensor, "fp8_w8a8": fp8.FP8Tensor}.get(precision, nvfp4.NVFP4Tensor)
    if isinstance(weight, wanted):
        return weight.to(torch.bfloat16) if isinstance(weight, torch.Tensor) else weight
    if not isinstance(weight, torch.Tensor):
        raise InputError.at("linear.prepare", "weight", type(weight).__name__, f"a tensor or a {wanted.__name__}")
    if precision == "fp8_w8a8":
        return fp8.quantize(weight)
    return nvfp4.quantize(weight, importance=importance)


def device_of(weight: Weight) -> torch.device:
    """Where a weight lies."""
    if isinstance(weight, nvfp4.NVFP4Tensor):
        return weight.codes.device
    return weight.values.device if isinstance(weight, fp8.FP8Tensor) else weight.device


Builder = Callable[[Weight, torch.Tensor | None], PackedLinear]


def kernel_table() -> dict[Precision, Builder]:
    """precision -> the builder of its GPU implementation. A new precision is a line here and a file."""
    from hybrid_policy.kernels.stream_layers import StreamLinear
    from hybrid_policy.kernels.w4a4 import W4A4Linear

    return {
        "bf16": lambda weight, bias: StreamLinear(weight, "bf16", bias),
        "fp8_w8a8": lambda weight, bias: StreamLinear(weight, "fp8_w8a8", bias),
        "nvfp4_w4a16": lambda weight, bias: StreamLinear(weight, "nvfp4_w4a16", bias),
        "nvfp4_w4a4": W4A4Linear,
    }


def prepare(
    weight: Weight,
    precision: Precision,
    *,
    bias: torch.Tensor | None = None,
    implementation: Implementation = "auto",
    importance: torch.Tensor | None = None,
) -> PackedLinear:
    """Pack a weight [N, K] for ``precision``; done once, at load.

    Args:
        weight: floating point (quantised here) or quantised already, on the device it will run on.
        precision: one of PRECISIONS.
        bias: [N], kept in float32.
        implementation: "auto" takes the kernel on a GPU and the reference on a CPU; "kernel" and "reference" insist
            ("kernel" on a CPU runs under TRITON_INTERPRET=1 only).
        importance: see :func:`hybrid_policy.kernels.nvfp4.quantize`.

    Raises:
        InputError: unknown precision, a weight that does not fit, or a device that cannot run the precision
            (the message names the alternative).
    """
    if precision not in PRECISIONS:
        raise InputError.at("linear.prepare", "precision", precision, f"one of {', '.join(PRECISIONS)}")
    weight = quantized(weight, precision, importance)
    device = device_of(weight)
    if implementation == "auto":
        implementation = "kernel" if device.type == "cuda" else "reference"
        logger.debug("%s %s on %s: %s", precision, tuple(weight.shape), device, implementation)
    if implementation == "reference":
        return ReferenceLinear(weight, precision, bias)
    from hybrid_policy.kernels.capability import require

    require(precision, device)
    return kernel_table()[precision](weight, bias)
