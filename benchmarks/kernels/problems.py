"""The products that the comparison and the sweep time, as packed random weights, and their float64 references."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hybrid_policy.kernels import fp8, nvfp4, wgmma_packing
from hybrid_policy.kernels.gate_up import geglu_reference
from hybrid_policy.kernels.packing import separate_rows
from hybrid_policy.kernels.stream import StreamWeight
from hybrid_policy.kernels.tiles import Format
from hybrid_policy.kernels.wgmma import WgmmaWeight


@dataclass(frozen=True)
class Problem:
    """One product: rows of W (both halves if GeGLU), columns, tokens, what is fused."""

    name: str
    m: int
    n: int
    k: int
    fmt: Format
    geglu: bool = False
    gated_residual: bool = False
    quantised: bool = False  # x comes in FP8, one scale a token


EXPERT = Problem("expert gate+up+GeGLU", 50, 8192, 1024, "nvfp4", geglu=True)
PREFIX_SMALL = Problem("prefix-size gate+up+GeGLU", 50, 32768, 2048, "nvfp4", geglu=True)
PREFIX = Problem("prefix-size gate+up+GeGLU", 560, 32768, 2048, "nvfp4", geglu=True)
DOWN = Problem("expert down, quantise, gated residual", 50, 1024, 4096, "fp8", gated_residual=True)
DOWN_GIVEN = replace(DOWN, name="expert down on FP8 activations, gated residual", quantised=True)
DOWN_NVFP4 = replace(DOWN, name="expert down in NVFP4 W4A16, gated residual", fmt="nvfp4")
QKV = Problem("expert qkv", 50, 2560, 1024, "bf16")
OUT = Problem("expert o, gated residual", 50, 1024, 2048, "bf16", gated_residual=True)


def random_weight(problem: Problem, seed: int, device: str = "cuda") -> StreamWeight:
    """Packed weights of random bits: every code and a middle range of scales, Gaussian for bf16 and FP8."""
    generator = torch.Generator(device).manual_seed(seed)
    n, k = problem.n, problem.k
    if problem.fmt != "nvfp4":
        wide = torch.randn(n, k, generator=generator, device=device)
        return StreamWeight(fp8.quantize(wide) if problem.fmt == "fp8" else wide, None)
    small = nvfp4.quantize(torch.randn(128, k, generator=generator, device=device), rule="max")
    packed = StreamWeight(small, None)
    packed.n = n
    slabs = packed.weight.shape[0]
    shape = (slabs, n, 32)
    packed.weight = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, device=device, dtype=torch.int32)
    scales = torch.randint(0x60, 0x78, (slabs, n, 16), generator=generator, device=device, dtype=torch.int32)
    packed.scales = scales.to(torch.uint8)
    assert packed.row_scale is not None
    packed.row_scale = packed.row_scale[:1].expand(n).contiguous()
    return packed


@dataclass
class Inputs:
    """Activations and epilogue operands of a problem."""

    x: torch.Tensor
    residual: torch.Tensor | None
    gate: torch.Tensor | None
    operand: torch.Tensor  # x as the kernel takes it
    x_scale: torch.Tensor | None

    @classmethod
    def random(cls, problem: Problem, seed: int, device: str = "cuda") -> Inputs:
        """Gaussian."""
        g = torch.Generator(device).manual_seed(1000 + seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, device=device)

        residual = normal(problem.m, problem.n).bfloat16() if problem.gated_residual else None
        gate = normal(problem.n) if problem.gated_residual else None
        x = normal(problem.m, problem.k).bfloat16()
        if not problem.quantised:
            return cls(x, residual, gate, x, None)
        values, scale = fp8.quantize_activation(x)
        return cls(x, residual, gate, values, scale.reshape(-1))


def output(problem: Problem, device: str = "cuda") -> torch.Tensor:
    """A poisoned output."""
    width = problem.n // 2 if problem.geglu else problem.n
    return torch.full((problem.m, width), float("nan"), dtype=torch.bfloat16, device=device)


def launch_arguments(problem: Problem, inputs: Inputs) -> dict[str, object]:
    """Keyword arguments of ``StreamWeight.launch`` beside x, out and tile."""
    return {
        "geglu": problem.geglu,
        "residual": inputs.residual,
        "gate": inputs.gate,
        "x_scale": inputs.x_scale,
    }


def relative_error(problem: Problem, packed: StreamWeight, inputs: Inputs, out: torch.Tensor, group: int) -> float:
    """||out - reference|| / ||reference|| in float64, over the first and the last 256 weight rows.

    FP8 activations are rounded in the reference as the kernel rounds them: one scale a token and ``group`` columns.
    """
    worst = 0.0
    count = min(256, problem.n)
    for begin in (0, problem.n - count):
        rows = slice(begin, begin + count)
        wide = dequantized_rows(packed, rows).double()
        if problem.geglu:
            half = slice(begin // 2, (begin + count) // 2)
            reference = geglu_reference(inputs.x, *separate_rows(wide), None)
            got = out[:, half]
        else:
            x = inputs.x.float()
            if problem.fmt == "fp8":
                group = problem.k if problem.quantised else group
                x = fp8.dequantize_activation(*fp8.quantize_activation(inputs.x, group), group)
            reference = x.double() @ wide.T
            if inputs.gate is not None and inputs.residual is not None:
                reference = reference * inputs.gate[rows] + inputs.residual[:, rows]
            got = out[:, rows]
        worst = max(worst, float((got.double() - reference).norm() / reference.norm()))
        if not bool(torch.isfinite(got).all()):
            return float("nan")
    return worst


def dequantized_rows(packed: StreamWeight, rows: slice) -> torch.Tensor:
    """Float32 of a slice of rows, without unpacking the rest."""
    part = StreamWeight(torch.zeros(1, 16, device=packed.weight.device), None)
    part.fmt, part.k = packed.fmt, packed.k
    part.n = rows.stop - rows.start
    if packed.fmt == "nvfp4":
        assert packed.scales is not None
        part.weight, part.scales = packed.weight[:, rows], packed.scales[:, rows]
    else:
        part.weight = packed.weight[rows]
    part.row_scale = None if packed.row_scale is None else packed.row_scale[rows]
    return part.dequantized()


def random_slabs(problem: Problem, seed: int, device: str = "cuda") -> WgmmaWeight:
    """The same kind of random weights in the order of wgmma_gate_up."""
    generator = torch.Generator(device).manual_seed(seed)
    n, k = problem.n, problem.k
    small = nvfp4.quantize(torch.randn(128, k, generator=generator, device=device), rule="max")
    packed = WgmmaWeight(small, small.global_scale.expand(128))
    shape = (n // wgmma_packing.ROWS, k // wgmma_packing.COLUMNS, wgmma_packing.SLAB)
    slabs = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    slabs[..., 4096:] = 112 + slabs[..., 4096:] % 24  # scales from 2**5 to 2**8
    packed.n, packed.slabs = n, slabs
    packed.row_scale = packed.row_scale[:1].expand(n).contiguous()
    return packed


def slabs_error(problem: Problem, packed: WgmmaWeight, inputs: Inputs, out: torch.Tensor) -> float:
    """As :func:`relative_error`, for gate and up in slabs: over the first and the last 512 rows."""
    worst = 0.0
    for rows in (slice(0, 512), slice(problem.n - 512, problem.n)):
        part = packed.slabs[rows.start // 128 : rows.stop // 128]
        scale = packed.row_scale[0] / 128
        wide = nvfp4.dequantize(wgmma_packing.unpack(part, 512, problem.k, scale)).double()
        reference = geglu_reference(inputs.x, *separate_rows(wide), None)
        got = out[:, rows.start // 2 : rows.stop // 2]
        if not bool(torch.isfinite(got).all()):
            return float("nan")
        worst = max(worst, float((got.double() - reference).norm() / reference.norm()))
    return worst
