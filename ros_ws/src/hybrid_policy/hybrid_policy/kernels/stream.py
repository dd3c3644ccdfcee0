"""Linears and gate/up pairs on ``stream_gemm``: buffers, configuration and launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import fp8, nvfp4, packing
from hybrid_policy.kernels.activations import interpreted
from hybrid_policy.kernels.decode import NVFP4_ROW_FACTOR
from hybrid_policy.kernels.norm_output import NormOutput, norm_operands
from hybrid_policy.kernels.stream_gemm import stream_gemm
from hybrid_policy.kernels.tiles import Format, Tile

#: Slabs are padded to this many rows, so that a tile's loads need no mask.
ROWS = 128


def capability_of(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; on a CPU (interpreter) 90, whose tiles are then taken."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class StreamWeight(torch.nn.Module):
    """A weight [N, K] in the kernel's own order.

    Attributes:
        fmt: bf16, fp8 or nvfp4.
        n, k: rows and columns of the matrix.
    """

    weight: torch.Tensor
    scales: torch.Tensor | None
    row_scale: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor | fp8.FP8Tensor | nvfp4.NVFP4Tensor, row_scale: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.n, self.k = weight.shape[0], weight.shape[1]
        scales: torch.Tensor | None = None
        self.fmt: Format
        if isinstance(weight, nvfp4.NVFP4Tensor):
            self.fmt = "nvfp4"
            if bool((weight.scales.view(torch.uint8) & 0x7F == 0x7F).any()) or bool(
                (weight.scales.view(torch.uint8) & 0x80).any()
            ):
                raise InputError.at("nvfp4", "scales", "NaN or negative", "positive E4M3 scales")
            packed, scales = packing.prepack(weight)
            packed = _pad_rows(packed)
            scales = _pad_rows(scales)
            global_ = weight.global_scale.float().expand(self.n) if row_scale is None else row_scale
            row_scale = global_ * NVFP4_ROW_FACTOR
        elif isinstance(weight, fp8.FP8Tensor):
            self.fmt = "fp8"
            packed = weight.values.contiguous()
            row_scale = weight.scale.float().expand(self.n) if row_scale is None else row_scale
        else:
            self.fmt = "bf16"
            packed = weight.to(torch.bfloat16).contiguous()
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("row_scale", None if row_scale is None else row_scale.contiguous(), persistent=False)
        # Filled by the first call of each tile that splits K: see workspace().
        self.partials: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def dequantized(self) -> torch.Tensor:
        """Float32 [N, K]."""
        if self.fmt == "nvfp4":
            assert self.scales is not None
            assert self.row_scale is not None
            unit = torch.ones((), device=self.weight.device)
            whole = packing.unprepack(self.weight[:, : self.n], self.scales[:, : self.n], unit, self.k)
            return nvfp4.dequantize(whole) * (self.row_scale / NVFP4_ROW_FACTOR)[:, None]
        if self.fmt == "fp8":
            assert self.row_scale is not None
            return self.weight.float() * self.row_scale[:, None]
        return self.weight.float()

    def workspace(self, tile: Tile, m: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Split-K's tiles and arrival counters; allocated at the first call that needs them, then kept.

        One pair for each split and grid: a counter stands at a multiple of its own split between launches. They make a
        packed weight usable by one stream at a time.
        """
        if tile.split == 1:
            return None, None
        tiles = -(-m // tile.bm) * -(-self.n // tile.bn)
        key = (tile.split, tile.bm, tile.bn, tiles)
        if key not in self.partials:
            device = self.weight.device
            self.partials[key] = (
                torch.empty(tile.split * tiles * tile.bm * tile.bn, dtype=torch.float32, device=device),
                torch.zeros(tiles, dtype=torch.int32, device=device),
            )
        return self.partials[key]

    def operands(self, x: torch.Tensor, tile: Tile, exact: bool) -> tuple[Any, Any, Any, Any]:
        """x, the second token tile's x, weights and scales: pointers, or descriptors for the bulk copy engine."""
        weight, scales = self.weight, self.scales
        if tile.tma_w and self.fmt == "nvfp4":
            assert scales is not None
            weight = TensorDescriptor.from_tensor(self.weight.view(-1, 32), [tile.bn, 32])
            scales = TensorDescriptor.from_tensor(scales.view(-1, 16), [tile.bn, 16])
        elif tile.tma_w:
            weight = TensorDescriptor.from_tensor(self.weight, [tile.bn, tile.bk])
        if not tile.tma_x:
            return x, x if tile.bm2 else None, weight, scales
        second = TensorDescriptor.from_tensor(x, [tile.bm2, tile.bk]) if tile.bm2 else None
        return TensorDescriptor.from_tensor(x, [tile.bm, tile.bk]), second, weight, scales

    def launch(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        tile: Tile,
        *,
        geglu: bool,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        x_scale: torch.Tensor | None = None,
        out_scale: torch.Tensor | None = None,
        gate_shift: torch.Tensor | None = None,
        up_shift: torch.Tensor | None = None,
        norm_out: NormOutput | None = None,
        squares: torch.Tensor | None = None,
        eps: float = 0.0,
        pdl: bool = False,
    ) -> None:
        """Run ``stream_gemm`` with ``tile``; the caller has checked the arguments."""
        m = x.shape[0]
        partial, counter = self.workspace(tile, m)
        exact = interpreted()
        read_tiles = 0 if squares is None else squares.shape[0]
        norm_factor, scaled, written = norm_operands(norm_out)
        squares = written if squares is None else squares
        x_operand, x2_operand, weight, scales = self.operands(x, tile, exact)
        stream_gemm[(tile.programs(m, self.n),)](
            x_operand, x2_operand, weight, scales, self.row_scale, x_scale, out, bias, residual, gate, out_scale,
            gate_shift, up_shift, norm_factor, scaled, squares, partial, counter, self.weight, self.scales, m, eps,
            **constants(self.fmt, self.n, self.k, tile, geglu=geglu, pdl=pdl, exact=exact), TILES=read_tiles,
            X_ROWS=x_scale is not None and x_scale.numel() > 1,
            num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
        )  # fmt: skip


def constants(fmt: Format, n: int, k: int, tile: Tile, *, geglu: bool, pdl: bool, exact: bool) -> dict[str, Any]:
    """The constexpr arguments of ``stream_gemm``."""
    weight_bytes = {"bf16": 2, "fp8": 1, "nvfp4": 0.5}[fmt]
    # Whole lines of this program's weights, a power of two of them; none where the last tile is ragged.
    lines = int(tile.bn * k // tile.split * weight_bytes // 128)
    ragged = n % tile.bn or (k // tile.split * weight_bytes) % 128 or k % (tile.split * tile.bk)
    prefetch = 0 if ragged or lines < 64 else min(tile.prefetch, 1 << (lines.bit_length() - 1))
    return {
        "N": n, "K": k, "FORMAT": fmt, "GEGLU": geglu, "BM": tile.bm, "BM2": tile.bm2, "BN": tile.bn, "BK": tile.bk,
        "TMA_X": tile.tma_x, "TMA_W": tile.tma_w, "TRIGGER": tile.trigger, "SPLIT": tile.split, "SWAP": tile.swap,
        "STAGES": 1 if exact else tile.stages, "PREFETCH": prefetch, "PDL": pdl, "EXACT": exact,
    }  # fmt: skip


def _pad_rows(slabs: torch.Tensor) -> torch.Tensor:
    missing = -slabs.shape[1] % ROWS
    return torch.nn.functional.pad(slabs, (0, 0, 0, missing)).contiguous()


def check_kernel_device(device: torch.device) -> None:
    """Raise InputError unless kernels can run on ``device`` in this process."""
    if device.type == "cuda" or interpreted():
        return
    raise InputError.at(
        "kernels", "device", device, "a CUDA device (or implementation='reference', or TRITON_INTERPRET=1)"
    )


def next_power_of_two(value: int) -> int:
    """Triton's, typed."""
    return int(triton.next_power_of_2(value))
