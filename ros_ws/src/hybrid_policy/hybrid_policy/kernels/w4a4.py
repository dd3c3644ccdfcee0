"""NVFP4 weights and activations on Blackwell's own block-scaled product (compute capability 10.0 and above).

The weight's codes go to the hardware as a checkpoint has them, its scales in the hardware's swizzled order; the
activations are quantised by one kernel of ours straight into that form. On other devices this precision is an error
at load, with the alternatives; its reference (``implementation="reference"``) runs anywhere.
"""

from __future__ import annotations

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import activations, library, nvfp4, packing
from hybrid_policy.kernels.gate_up import NormPrologue, PackedGateUp
from hybrid_policy.kernels.linear import PackedLinear, Weight
from hybrid_policy.kernels.norm_output import NormOutput
from hybrid_policy.kernels.nvfp4_activation import NVFP4Activation, swizzle
from hybrid_policy.kernels.stream import capability_of, next_power_of_two


class W4A4Weight(torch.nn.Module):
    """A weight [N, K] as the block-scaled product takes it."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: nvfp4.NVFP4Tensor) -> None:
        super().__init__()
        device = weight.codes.device
        capability = capability_of(device) if device.type == "cuda" else 0
        if capability < 100:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
            expected = "a Blackwell GPU (compute capability 10.0 or more); here take nvfp4_w4a16 or fp8_w8a8"
            raise InputError.at("nvfp4_w4a4", "device", name, expected)
        self.n, self.k = weight.shape
        if self.k % 32 or self.n % 16:
            raise InputError.at("nvfp4_w4a4", "shape", weight.shape, "K a multiple of 32, N of 16; take nvfp4_w4a16")
        self.unit = float(weight.global_scale)
        self.register_buffer("codes", weight.codes.contiguous(), persistent=False)
        self.register_buffer("scales", swizzle(weight.scales.view(torch.uint8)), persistent=False)
        self.scratch = library.Scratch(device)
        self.quantized: dict[int, NVFP4Activation] = {}

    def product(self, x: torch.Tensor, norm: NormPrologue | None, pdl: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(bf16 [M, N] still to be scaled, row scales [M]); buffers are made at the first call with this M."""
        m = x.shape[0]
        if m not in self.quantized:
            self.quantized[m] = NVFP4Activation.empty(m, self.k, x.device, swizzled=True)
        packed = self.quantized[m]
        if norm is None or norm.factor is None:
            activations.quantize_nvfp4(x, packed, pdl=pdl)
            if norm is not None and norm.squares is not None:
                rows = self.scratch.get("rows", (m,), torch.float32)
                torch.sum(norm.squares, 0, out=rows)
                packed.row_scale.mul_(rows.div_(self.k).add_(norm.eps).rsqrt_())
        else:
            activations.quantize_nvfp4(x, packed, factor=norm.factor, eps=norm.eps, pdl=pdl)
        y = self.scratch.get("y", (m, self.n), torch.bfloat16)
        library.nvfp4_product(packed.codes, self.codes, packed.scales, self.scales, y)
        return y, packed.row_scale

    def dequantized(self) -> torch.Tensor:
        """Float32 [N, K]."""
        unit = torch.tensor([self.unit], device=self.codes.device).expand(self.n)
        from hybrid_policy.kernels.nvfp4_activation import nvfp4_dequantize

        return nvfp4_dequantize(NVFP4Activation(self.codes, self.scales, unit, swizzled=True))


class W4A4Linear(PackedLinear):
    """A linear layer; see :class:`hybrid_policy.kernels.linear.PackedLinear`."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        assert isinstance(weight, nvfp4.NVFP4Tensor)  # linear.prepare has quantised it
        self.precision = "nvfp4_w4a4"
        self.route = "quantiser (Triton) + cuBLAS NVFP4 block-scaled product + epilogue (Triton)"
        self.packed = W4A4Weight(weight)

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
        """Quantise, multiply, finish."""
        y, rows = self.packed.product(x, None, pdl)
        unit = self.packed.unit
        activations.finish_rows(
            y, out, row_scale=rows, unit=unit, bias=self.bias, gate=gate, residual=residual, norm_out=norm_out
        )

    def norm_tiles(self, m: int) -> int:
        """Programs a row of the epilogue kernel."""
        return next_power_of_two(-(-self.out_features // activations.FINISH_COLUMNS))

    def effective_weight(self) -> torch.Tensor:
        """The dequantised weight."""
        return self.packed.dequantized()


class W4A4GateUp(PackedGateUp):
    """Gate and up; see :class:`hybrid_policy.kernels.gate_up.PackedGateUp`. Both share one global scale."""

    def __init__(self, gate: Weight, up: Weight) -> None:
        super().__init__(gate.shape[0], gate.shape[1])
        assert isinstance(gate, nvfp4.NVFP4Tensor)
        assert isinstance(up, nvfp4.NVFP4Tensor)
        if float(gate.global_scale) != float(up.global_scale):
            got = (float(gate.global_scale), float(up.global_scale))
            raise InputError.at("nvfp4_w4a4", "global scales of gate and up", got, "one shared scale")
        self.precision = "nvfp4_w4a4"
        self.route = "quantiser (Triton) + cuBLAS NVFP4 block-scaled product + GeGLU (Triton)"
        self.packed = W4A4Weight(packing.interleave(gate, up))

    def compute(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        norm: NormPrologue | None,
        out_scale: torch.Tensor | None,
        pdl: bool,
    ) -> None:
        """[Norm and] quantise, multiply, GeGLU."""
        y, rows = self.packed.product(x, norm, pdl)
        shifts = (None, None) if norm is None else (norm.gate_shift, norm.up_shift)
        activations.finish_geglu(
            y,
            out,
            row_scale=rows,
            unit=self.packed.unit,
            gate_shift=shifts[0],
            up_shift=shifts[1],
            out_scale=out_scale,
        )

    def effective_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised."""
        return packing.separate_rows(self.packed.dequantized())
