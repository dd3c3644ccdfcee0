"""Accuracy of each precision on a GeGLU MLP (1024 -> 4096 -> 1024) against the unquantised one, on a CPU.

    python benchmarks/kernels/quality.py --out results/quality.csv          (some minutes)

Weights: Gaussian, and Student t with five degrees of freedom. Inputs: white, and "model-like": channels of log-normal
size (sigma 1) mixed by a random rotation of rank 64, drawn afresh for calibration and for the test. Columns: signal to
rounding noise of the gate weight (dB), cosine and relative error of the MLP's output, mean over 256 tokens.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from hybrid_policy.kernels import nvfp4
from hybrid_policy.kernels.gate_up import prepare_gate_up
from hybrid_policy.kernels.linear import prepare
from hybrid_policy.kernels.nvfp4_gptq import hessian, quantize_gptq

WIDTH, HIDDEN, TOKENS = 1024, 4096, 256
Row = dict[str, object]


def draws(kind: str, g: torch.Generator) -> Callable[[int, int], torch.Tensor]:
    """A sampler of weights of unit-variance rows / sqrt(K)."""

    def gaussian(n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k, generator=g) / k**0.5

    def student(n: int, k: int) -> torch.Tensor:
        chi = torch.randn(5, n, k, generator=g).square().mean(0)
        return torch.randn(n, k, generator=g) / chi.sqrt() / (5 / 3) ** 0.5 / k**0.5

    return gaussian if kind == "Gaussian" else student


def inputs(kind: str, g: torch.Generator) -> Callable[[int], torch.Tensor]:
    """A sampler of activations [M, WIDTH] from one distribution."""
    if kind == "white":
        return lambda m: torch.randn(m, WIDTH, generator=g).bfloat16()
    size = torch.randn(WIDTH, generator=g).exp()
    mix = torch.randn(64, WIDTH, generator=g) / 8

    def sample(m: int) -> torch.Tensor:
        x = (torch.randn(m, WIDTH, generator=g) + torch.randn(m, 64, generator=g) @ mix) * size
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True))).bfloat16()

    return sample


def geglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Unquantised."""
    return torch.nn.functional.gelu(x.float() @ gate.T, approximate="tanh") * (x.float() @ up.T)


def measure(weights: str, activations: str) -> list[Row]:
    """Every method on one combination."""
    g = torch.Generator().manual_seed(3)
    draw, sample = draws(weights, g), inputs(activations, g)
    gate, up, down = draw(HIDDEN, WIDTH), draw(HIDDEN, WIDTH), draw(WIDTH, HIDDEN)
    calibration, x = sample(2048), sample(TOKENS)
    expected = geglu(x, gate, up) @ down.T
    moments = hessian(calibration)
    importance = moments.diagonal().float()
    four = {
        "max/6 scales": lambda w: nvfp4.quantize(w, rule="max"),
        "sweep": nvfp4.quantize,
        "sweep weighted by mean x^2": lambda w: nvfp4.quantize(w, importance=importance),
        "GPTQ": lambda w: quantize_gptq(w, moments),
    }
    rows: list[Row] = []

    def add(method: str, precision: str, first: str, second: str, pair: tuple | None) -> None:
        layer = prepare_gate_up(*(pair or (gate, up)), first, implementation="reference")
        h = layer(x)
        out = prepare(down, second, implementation="reference")(h, out=torch.empty(TOKENS, WIDTH))
        seen = layer.effective_weights()[0]
        rows.append({
            "weights": weights, "inputs": activations, "precision": precision, "method": method,
            "weight_db": f"{10 * torch.log10(gate.square().sum() / (gate - seen).square().sum()):.2f}",
            "cosine": f"{torch.nn.functional.cosine_similarity(out, expected, dim=-1).mean():.5f}",
            "relative_error": f"{(out - expected).norm() / expected.norm():.4f}",
        })  # fmt: skip
        print(rows[-1], flush=True)

    for method, quantize in four.items():
        add(
            method,
            "hybrid: gate, up NVFP4 W4A16, down FP8 W8A8",
            "nvfp4_w4a16",
            "fp8_w8a8",
            (quantize(gate), quantize(up)),
        )
    add("sweep", "NVFP4 W4A4 throughout", "nvfp4_w4a4", "nvfp4_w4a4", None)
    add("amax by row", "FP8 W8A8 throughout", "fp8_w8a8", "fp8_w8a8", None)
    return rows


def main() -> int:
    """Measure all four combinations and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quality.csv"))
    args = parser.parse_args()
    rows = [row for w in ("Gaussian", "Student t") for a in ("white", "model-like") for row in measure(w, a)]
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
