"""Gate and up in NVFP4 W4A16 on Hopper's warpgroup products: the host side of wgmma_gate_up.cu."""

from __future__ import annotations

import ctypes
import functools

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import activations, library, nvfp4, packing, wgmma_linear, wgmma_packing, wgmma_tiles
from hybrid_policy.kernels.decode import NVFP4_ROW_FACTOR
from hybrid_policy.kernels.gate_up import NormPrologue, PackedGateUp
from hybrid_policy.kernels.nvfp4 import NVFP4Tensor
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources, multiprocessors
from hybrid_policy.kernels.tensor_map import tensor_map
from hybrid_policy.kernels.wgmma_tiles import WgmmaTile

SOURCES = kernel_sources("wgmma_common", "wgmma_gate_up")
ROUTE = "wgmma_gate_up (CUDA C++, sm_90a) at every size"


def product_source(nt: int) -> str:
    """C++ of ``product``: the asynchronous 64 x ``nt`` x 16 product of a register and a shared operand.

    The instruction names each of its nt / 2 accumulators, so its text depends on the width.
    """
    count = nt // 2
    d = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) + ', "l"(b)'
    a = ", ".join(f"%{count + i}" for i in range(4))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{nt}k16.f32.bf16.bf16 {{{d}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0;"
    return (
        f"__device__ __forceinline__ void product(float (&d)[{count}], const unsigned int (&a)[4], "
        "unsigned long long b) {\n"
        f'asm volatile("{{\\n.reg .pred p;\\nsetp.eq.u32 p, 0, 0;\\n{instruction}\\n}}" : {outputs} : {inputs});\n}}\n'
    )


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_ubyte * 128),
        *((name, ctypes.c_void_p) for name in ("w", "row_scale", "squares", "gate_shift", "up_shift", "out_scale")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("tokens", "features", "row_tiles", "token_tiles", "square_tiles")),
        *((name, ctypes.c_float) for name in ("columns", "eps")),
        ("pad", ctypes.c_ubyte * 44),  # to a multiple of 64
    ]


def macros(tile: WgmmaTile, chunks: int, *, fp8_out: bool, squares: bool, shifts: bool, pdl: bool) -> dict[str, int]:
    """What one configuration is compiled with."""
    return {
        "MT": tile.mt, "NT": tile.nt, "STAGES": tile.stages, "GROUP": tile.group, "BUFFERS": tile.buffers,
        "K_CHUNKS": chunks, "SPLIT": tile.split, "MULTICAST": int(tile.multicast),
        "SET_REGISTERS": int(tile.set_registers), "FP8_OUT": int(fp8_out), "SQUARES": int(squares),
        "SHIFTS": int(shifts), "PDL": int(pdl), "BLOCKS": tile.blocks, "TRIGGER": tile.trigger,
        "SHARED": wgmma_tiles.SHARED,
    }  # fmt: skip


@functools.cache
def _kernel(
    tile: WgmmaTile, chunks: int, fp8_out: bool, squares: bool, shifts: bool, pdl: bool, spin: int, device: int
) -> Kernel:
    options = macros(tile, chunks, fp8_out=fp8_out, squares=squares, shifts=shifts, pdl=pdl) | {"SPIN_LIMIT": spin}
    return Kernel(
        SOURCES, "wgmma_gate_up", options, threads=tile.threads,
        shared=tile.shared_bytes(fp8_out=fp8_out, squares=squares), pdl=pdl, specific=True,
        prelude=product_source(tile.nt),
    )  # fmt: skip


class WgmmaWeight(torch.nn.Module):
    """Rows of gate and up by eights, in the kernel's order.

    Attributes:
        n, k: 2F and K.
    """

    slabs: torch.Tensor
    row_scale: torch.Tensor

    def __init__(self, weight: NVFP4Tensor, row_scale: torch.Tensor) -> None:
        super().__init__()
        self.n, self.k = weight.shape
        scales = weight.scales.view(torch.uint8)
        if bool((scales & 0x7F == 0x7F).any()) or bool((scales & 0x80).any()):
            raise InputError.at("nvfp4", "scales", "NaN or negative", "positive E4M3 scales")
        missing = -self.n % wgmma_packing.PADDED_ROWS
        rows = torch.nn.functional.pad(row_scale.float() * NVFP4_ROW_FACTOR, (0, missing))
        self.register_buffer("slabs", wgmma_packing.pack(weight), persistent=False)
        self.register_buffer("row_scale", rows.contiguous(), persistent=False)

    def dequantized(self) -> torch.Tensor:
        """Float32 [N, K]."""
        unit = torch.ones((), device=self.slabs.device)
        whole = wgmma_packing.unpack(self.slabs, self.n, self.k, unit)
        return nvfp4.dequantize(whole) * (self.row_scale[: self.n] / NVFP4_ROW_FACTOR)[:, None]

    def launch(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        tile: WgmmaTile,
        *,
        out_scale: torch.Tensor | None = None,
        gate_shift: torch.Tensor | None = None,
        up_shift: torch.Tensor | None = None,
        squares: torch.Tensor | None = None,
        eps: float = 0.0,
        pdl: bool = False,
    ) -> None:
        """Run the kernel with ``tile``; the caller has checked the arguments."""
        m = x.shape[0]
        chunks = self.slabs.shape[1]
        fused = (out_scale is not None, squares is not None, gate_shift is not None)
        kernel = _kernel(tile, chunks, *fused, pdl, wgmma_linear.SPIN_LIMIT, torch.cuda.current_device())
        box = tile.nt // 2 if tile.multicast else tile.nt

        def at(tensor: torch.Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        arguments = _Arguments(
            w=at(self.slabs), row_scale=at(self.row_scale), squares=at(squares), gate_shift=at(gate_shift),
            up_shift=at(up_shift), out_scale=at(out_scale), out=at(out), tokens=m, features=self.n // 2,
            row_tiles=self.row_scale.shape[0] // (128 * tile.mt), token_tiles=-(-m // tile.nt),
            square_tiles=0 if squares is None else squares.shape[0], columns=self.k, eps=eps,
        )  # fmt: skip
        ctypes.memmove(arguments.x, tensor_map(x, box), 128)
        clusters = tile.tiles(m, self.n)
        if tile.split == 1:  # a cluster takes several tiles in turn
            clusters = min(clusters, multiprocessors(x.device) * tile.blocks // tile.cluster)
        kernel((clusters * tile.cluster, 1), arguments)


class WgmmaGateUp(PackedGateUp):
    """NVFP4 gate and up on compute capability 9.0; see :class:`hybrid_policy.kernels.gate_up.PackedGateUp`."""

    def __init__(self, gate: NVFP4Tensor, up: NVFP4Tensor) -> None:
        super().__init__(gate.shape[0], gate.shape[1])
        self.precision = "nvfp4_w4a16"
        n = gate.shape[0]
        globals_ = [tensor.global_scale.float().reshape(1, 1).expand(n, 1) for tensor in (gate, up)]
        rows = packing.interleave_rows(globals_[0], globals_[1]).reshape(-1)
        self.packed = WgmmaWeight(packing.interleave(gate, up), rows)
        self.scratch = library.Scratch(self.packed.slabs.device)
        self.route = ROUTE

    def compute(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        norm: NormPrologue | None,
        out_scale: torch.Tensor | None,
        pdl: bool,
    ) -> None:
        """[Norm and] one kernel."""
        m, n, k = x.shape[0], 2 * self.features, self.in_features
        shifts = (None, None) if norm is None else (norm.gate_shift, norm.up_shift)
        if norm is not None and norm.factor is not None:
            normed = self.scratch.get("normed", (m, k), torch.bfloat16)
            x = activations.rms_norm(x, normed, factor=norm.factor, eps=norm.eps, pdl=pdl)
        tile = wgmma_tiles.gate_up_tile(m, n, k, multiprocessors(x.device))
        self.packed.launch(
            x, out, tile, out_scale=out_scale, gate_shift=shifts[0], up_shift=shifts[1],
            squares=None if norm is None else norm.squares, eps=0.0 if norm is None else norm.eps, pdl=pdl,
        )  # fmt: skip

    def effective_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Unpacked from the kernel's order."""
        return packing.separate_rows(self.packed.dequantized())
