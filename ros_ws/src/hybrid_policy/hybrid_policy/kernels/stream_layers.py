"""PackedLinear and PackedGateUp on a GPU in bf16, FP8 W8A8 and NVFP4 W4A16.

Few tokens take the streaming kernel with everything fused; many take cuBLAS where it is faster (``tiles.route``), with
our quantiser before it and our epilogue behind it.
"""

from __future__ import annotations

import torch

from hybrid_policy.kernels import activations, fp8, library, nvfp4, packing, tiles, wgmma_linear, wgmma_tiles
from hybrid_policy.kernels.gate_up import NormPrologue, PackedGateUp
from hybrid_policy.kernels.linear import PackedLinear, Precision, Weight
from hybrid_policy.kernels.norm_output import NormOutput
from hybrid_policy.kernels.stream import StreamWeight, capability_of, check_kernel_device, next_power_of_two


def _route_line(weight: StreamWeight, precision: Precision, capability: int) -> str:
    large = {"bf16": "cuBLAS bf16", "fp8": "cuBLAS FP8, quantised by token", "nvfp4": "the same kernel"}[weight.fmt]
    hopper = weight.fmt == "fp8" and tiles.route("fp8", 1, weight.n, weight.k, capability) == "wgmma"
    small = (
        "wgmma_linear (CUDA C++, sm_90a; stream_gemm where it writes for a norm)" if hopper else "stream_gemm (Triton)"
    )
    return f"{precision}: {small} up to 64 tokens; above: {large}"


class StreamLinear(PackedLinear):
    """A linear layer; see :class:`hybrid_policy.kernels.linear.PackedLinear`."""

    def __init__(self, weight: Weight, precision: Precision, bias: torch.Tensor | None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.precision = precision
        self.packed = StreamWeight(weight, None)
        device = self.packed.weight.device
        check_kernel_device(device)
        self.capability = capability_of(device)
        self.scratch = library.Scratch(device)
        self.route = _route_line(self.packed, precision, self.capability)

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
        """One kernel, or quantiser + cuBLAS + epilogue."""
        m, n, k, fmt = x.shape[0], self.out_features, self.in_features, self.packed.fmt
        route = tiles.route(fmt, m, n, k, self.capability, norm_out=norm_out is not None)
        if route == "wgmma" and x.device.type == "cuda":  # Triton's interpreter stands in for 9.0, its kernels alone
            small = wgmma_tiles.linear_tile(m, n, k)
            assert small is not None  # the route says so
            assert self.packed.row_scale is not None
            wgmma_linear.launch(
                self.packed.weight, self.packed.row_scale, x, out, small,
                bias=self.bias, residual=residual, gate=gate, x_scale=x_scale, pdl=pdl,
            )  # fmt: skip
            return
        if route != "library":
            given = x_scale is not None
            tile = tiles.linear_tile(fmt, m, n, k, self.capability, x_fp8=given)
            self.packed.launch(
                x,
                out,
                tile,
                geglu=False,
                bias=self.bias,
                residual=residual,
                gate=gate,
                x_scale=x_scale,
                norm_out=norm_out,
                pdl=pdl,
            )
            return
        plain = self.bias is None and residual is None and norm_out is None and out.dtype == torch.bfloat16
        y = out if plain else self.scratch.get("y", (m, n), torch.bfloat16)
        if fmt == "bf16":
            library.bf16_product(x, self.packed.weight, y)
        else:
            library_fp8(x, x_scale, self.packed, y, self.scratch, pdl)
        if not plain:
            activations.finish_rows(y, out, bias=self.bias, gate=gate, residual=residual, norm_out=norm_out)

    def norm_tiles(self, m: int) -> int:
        """Row tiles of the kernel that ``m`` tokens take."""
        n, k, fmt = self.out_features, self.in_features, self.packed.fmt
        if tiles.route(fmt, m, n, k, self.capability, norm_out=True) == "library":
            return next_power_of_two(-(-n // activations.FINISH_COLUMNS))
        return next_power_of_two(-(-n // tiles.linear_tile(fmt, m, n, k, self.capability).bn))

    def effective_weight(self) -> torch.Tensor:
        """Unpacked from the kernel's order."""
        return self.packed.dequantized()


def library_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    packed: StreamWeight,
    y: torch.Tensor,
    scratch: library.Scratch,
    pdl: bool,
) -> None:
    """Quantise bf16 ``x`` by token unless it is FP8 already, and multiply."""
    m, k = x.shape
    assert packed.row_scale is not None
    if x_scale is None:
        values = scratch.get("x8", (m, k), torch.float8_e4m3fn)
        scale = scratch.get("x8_scale", (m,), torch.float32)
        activations.quantize_fp8(x, values, scale, pdl=pdl)
    else:
        values, scale = x, scratch.get("x8_scale", (m,), torch.float32)
        scale.copy_(x_scale.reshape(1).expand(m))
    library.fp8_product(values, packed.weight, scale, packed.row_scale, y)


class StreamGateUp(PackedGateUp):
    """Gate and up, rows interleaved; see :class:`hybrid_policy.kernels.gate_up.PackedGateUp`."""

    def __init__(self, gate: Weight, up: Weight, precision: Precision) -> None:
        super().__init__(gate.shape[0], gate.shape[1])
        self.precision = precision
        self.packed = interleaved(gate, up)
        device = self.packed.weight.device
        check_kernel_device(device)
        self.capability = capability_of(device)
        self.scratch = library.Scratch(device)
        self.route = _route_line(self.packed, precision, self.capability)

    def compute(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        norm: NormPrologue | None,
        out_scale: torch.Tensor | None,
        pdl: bool,
    ) -> None:
        """[Norm and] one kernel, or [norm +] [quantiser +] cuBLAS + GeGLU."""
        m, n, k, fmt = x.shape[0], 2 * self.features, self.in_features, self.packed.fmt
        shifts = (None, None) if norm is None else (norm.gate_shift, norm.up_shift)
        if norm is not None and norm.factor is not None:
            # A kernel of its own: folded into the product's loads it cost 7 us instead of some 2 (docs/performance).
            normed = self.scratch.get("normed", (m, k), torch.bfloat16)
            x = activations.rms_norm(x, normed, factor=norm.factor, eps=norm.eps, pdl=pdl)
        if tiles.route(fmt, m, n, k, self.capability) != "library":
            tile = tiles.gate_up_tile(fmt, m, n, k, self.capability)
            self.packed.launch(
                x, out, tile, geglu=True, out_scale=out_scale, gate_shift=shifts[0], up_shift=shifts[1],
                squares=None if norm is None else norm.squares, eps=0.0 if norm is None else norm.eps, pdl=pdl,
            )  # fmt: skip
            return
        rows = None if norm is None or norm.squares is None else self.row_factors(norm.squares, norm.eps)
        y = self.scratch.get("y", (m, n), torch.bfloat16)
        if fmt == "bf16":
            library.bf16_product(x, self.packed.weight, y)
        else:
            library_fp8(x, None, self.packed, y, self.scratch, pdl)
        activations.finish_geglu(y, out, row_scale=rows, gate_shift=shifts[0], up_shift=shifts[1], out_scale=out_scale)

    def row_factors(self, squares: torch.Tensor, eps: float) -> torch.Tensor:
        """[M] factors of a norm whose squares the linear before left; library route only."""
        rows = self.scratch.get("rows", (squares.shape[1],), torch.float32)
        torch.sum(squares, 0, out=rows)
        return rows.div_(self.in_features).add_(eps).rsqrt_()

    def effective_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Unpacked from the kernel's order."""
        return packing.separate_rows(self.packed.dequantized())


def interleaved(gate: Weight, up: Weight) -> StreamWeight:
    """One packed matrix of rows of gate and up by eights, each row with its own tensor's scale."""
    if isinstance(gate, nvfp4.NVFP4Tensor) and isinstance(up, nvfp4.NVFP4Tensor):
        n = gate.shape[0]
        globals_ = [tensor.global_scale.float().reshape(1, 1).expand(n, 1) for tensor in (gate, up)]
        rows = packing.interleave_rows(globals_[0], globals_[1]).reshape(-1)
        return StreamWeight(packing.interleave(gate, up), rows)
    if isinstance(gate, fp8.FP8Tensor) and isinstance(up, fp8.FP8Tensor):
        values = packing.interleave_rows(gate.values.view(torch.uint8), up.values.view(torch.uint8))
        scales = [tensor.scale.expand(tensor.shape[0]).reshape(-1, 1) for tensor in (gate, up)]
        rows = packing.interleave_rows(scales[0], scales[1]).reshape(-1)
        return StreamWeight(fp8.FP8Tensor(values.view(torch.float8_e4m3fn), rows), rows)
    assert isinstance(gate, torch.Tensor)  # prepare_gate_up has seen to both
    assert isinstance(up, torch.Tensor)
    return StreamWeight(packing.interleave_rows(gate, up), None)
