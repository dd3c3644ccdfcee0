"""Vision's out and fc2 with the residual and the LayerNorm behind them: launches apart, and in one (norm_product.cu).

    python benchmarks/vision_norms.py --out results/

Every plan is checked first, with waits that give up, and timed only where it is right. Microseconds are medians over
replays of a graph of one launch (or one pair) a layer, more layers' weights in turn than the L2 cache holds.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from hybrid_policy.kernels import norm, norm_product
from hybrid_policy.kernels.hopper_product import hopper_product
from hybrid_policy.kernels.norm_product import NormPlan, norm_product_reference, plan_norm
from prefix_stages import BF16, DEVICE, FP8, ROWS, chain, guarded, layers, note, relative
from torch import Tensor

WIDTH = 1152
PLANS = (
    *(NormPlan(64, spread, 8, halves) for halves in (1, 2) for spread in (False, True)),
    NormPlan(64, False, 4, 2), NormPlan(64, True, 4, 1), NormPlan(128, True),
)  # fmt: skip


@dataclass
class Case:
    """One product of one layer: its operands, in layers' turns, and what comes behind it."""

    name: str
    a: Tensor
    weights: list[Tensor]
    scale: float
    x: Tensor
    norm: tuple[Tensor, Tensor]
    bias: Tensor

    @property
    def shape(self) -> str:
        """For the table."""
        return f"{self.name} {self.a.shape[0]}x{WIDTH}x{self.a.shape[1]}"


def make_case(name: str, rows: int, k: int, dtype: torch.dtype) -> Case:
    """Random operands whose product has values of about one."""
    eight = dtype == FP8
    count = layers(WIDTH * k * dtype.itemsize)
    weights = [(torch.randn(WIDTH, k, device=DEVICE) * (8 if eight else k**-0.5)).to(dtype) for _ in range(count)]
    weight, shift, bias = torch.randn(3, WIDTH, device=DEVICE)
    a, x = torch.randn(rows, k, device=DEVICE).to(dtype), torch.randn(rows, WIDTH, device=DEVICE)
    return Case(
        f"{name} {'FP8' if eight else 'bf16'}", a, weights, k**-0.5 / 8 if eight else 1.0, x, (weight, shift), bias
    )  # fmt: skip


def apart(case: Case, own: bool) -> None:
    """The product by the library or hopper_product.py, and add_norm behind it."""
    one, factor = torch.ones((), device=DEVICE), torch.full((), case.scale, device=DEVICE)
    stream = case.x.clone()

    def product(w: Tensor) -> Tensor:
        if own:
            return hopper_product(case.a, w, case.scale, pdl=True)
        if case.a.dtype == BF16:
            return F.linear(case.a, w)
        return torch._scaled_mm(case.a, w.t(), one, factor, out_dtype=BF16, use_fast_accum=True)

    def call(w: Tensor) -> Tensor:
        h = torch.empty(case.x.shape, dtype=case.a.dtype, device=DEVICE)
        norm.add_norm(
            stream, h, case.norm[0], shift=case.norm[1], addend=product(w), bias=case.bias, layer_norm=True, pdl=True
        )  # fmt: skip
        return h

    _, expected = norm_product_reference(
        case.a, case.weights[0], case.scale, case.x, case.norm, case.bias
    )  # fmt: skip
    error = relative(call(case.weights[0]).float(), expected)
    microseconds = chain(*(lambda w=w: call(w) for w in case.weights), launches=len(case.weights), replays=41)
    note(f"{'wgmma' if own else 'library'}, then add + LayerNorm", case.shape, microseconds, error)


def product_alone(case: Case) -> None:
    """hopper_product.py without what comes behind."""
    calls = [lambda w=w: hopper_product(case.a, w, case.scale, pdl=True) for w in case.weights]
    note("wgmma, the product alone", case.shape, chain(*calls, launches=len(calls), replays=41))


def together(case: Case, plan: NormPlan, chosen: bool) -> None:
    """norm_product.py in one plan: against float64, the same bits again, then its time."""

    def call(w: Tensor, stream: Tensor) -> Tensor:
        return norm_product.norm_product(
            case.a, w, case.scale, stream, case.norm, case.bias, case.a.dtype, pdl=True, plan=plan
        )  # fmt: skip

    total, expected = norm_product_reference(case.a, case.weights[0], case.scale, case.x, case.norm, case.bias)
    norm_product.SPIN_LIMIT = 1 << 15
    streams = [case.x.clone() for _ in range(4)]
    results = [call(case.weights[0], stream) for stream in streams]
    torch.cuda.synchronize()
    norm_product.SPIN_LIMIT = 0
    error, of_x = relative(results[0].float(), expected), relative(streams[0], total)
    same = all(torch.equal(r.view(torch.uint8), results[0].view(torch.uint8)) for r in results)
    same = same and all(torch.equal(stream, streams[0]) for stream in streams)
    text = f"in one, {plan.rows} rows, {plan.halves} halves, {plan.stages} stages{', spread' if plan.spread else ''}"
    text += "*" if chosen else ""
    if not (error < 5e-2 and of_x < 5e-3 and same):
        bad = (results[0].double() - expected).norm(dim=1) > 0.1 * expected.norm(dim=1)
        print(
            f"WRONG, not timed: {text}: {case.shape}: x {of_x:.1e}, h {error:.1e}, the same again: {same}", flush=True
        )
        print(f"  rows: {bad.nonzero().flatten().tolist()[:40]} of {int(bad.sum())}", flush=True)
        blocks = (results[0].double() - expected).view(-1, 8, WIDTH // 8).norm(dim=(0, 2))
        print(f"  error by block of columns: {[f'{float(e):.2e}' for e in blocks]}", flush=True)
        return
    calls = [lambda w=w: call(w, streams[0]) for w in case.weights]
    note(text, case.shape, chain(*calls, launches=len(calls), replays=41), error)


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for vision_norms.csv")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 768], help="256 a view")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for rows in args.rows:
            for name, k, dtype in (("out", 1152, FP8), ("fc2", 4352, FP8), ("out", 1152, BF16), ("fc2", 4352, BF16)):
                case = make_case(name, rows, k, dtype)
                chosen = plan_norm(rows, k * dtype.itemsize)
                guarded(product_alone, case)
                for own in (False, True):
                    guarded(apart, case, own)
                for plan in dict.fromkeys([chosen, *PLANS]):
                    guarded(together, case, plan, plan == chosen)
                guarded(apart, case, True)
    if args.out and ROWS:
        args.out.mkdir(parents=True, exist_ok=True)
        about = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        with (args.out / "vision_norms.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*ROWS[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in ROWS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
