"""The action expert's launches one by one and as a chain: microseconds a stage, 18 layers' weights in turn.

Each figure is one CUDA graph of dependent launches (each reads what the one before wrote or must wait for it), so it
contains what a launch costs inside the loop; beside it the bytes of the weights over 3.0 TB/s.

    python benchmarks/expert_layer.py [--plans] [--out results/]
"""

from __future__ import annotations

import argparse
import csv
import math
import time
import traceback
from pathlib import Path

import torch
from hybrid_policy.kernels import expert, fp8, nvfp4
from hybrid_policy.kernels.qkv import rope_tables

LAYERS, TOKENS, VALID = 18, 50, 560
STAGES = {
    "qkv": (expert.QKV, [2048, 256, 256], 1024),
    "o": (expert.RESIDUAL, [1024], 2048),
    "gate_up": (expert.GEGLU, [4096, 4096], 1024),
    "down": (expert.RESIDUAL, [1024], 4096),
}
BYTES = {"bf16": 2, "e4m3": 1, "nvfp4": 0.625}
MORE_PLANS = {
    "qkv": [(64, 4, 2, 4), (64, 2, 2, 4), (32, 2, 2, 4), (64, 4, 4, 2), (32, 4, 2, 4)],
    "o": [(64, 8, 2, 4), (64, 8, 4, 2), (64, 4, 2, 4), (32, 4, 2, 4), (32, 8, 2, 4)],
    "gate_up": [(128, 2, 4, 2), (128, 2, 2, 4), (64, 2, 2, 4), (64, 2, 4, 2), (128, 4, 4, 2), (64, 1, 4, 2)],
    "down": [(64, 8, 2, 4), (64, 8, 4, 2), (32, 8, 2, 4), (32, 4, 2, 4)],
}


def weights(fmt: str, rows: list[int], k: int) -> list[expert.Weight]:
    """Random weights of one format."""
    dense = [torch.randn(n, k, device="cuda") / math.sqrt(k) for n in rows]
    if fmt == "bf16":
        return [w.bfloat16() for w in dense]
    return [fp8.quantize(w, per_row=False) if fmt == "e4m3" else nvfp4.quantize(w, rule="max") for w in dense]


class Buffers:
    """Activations, caches and vectors that the launches read and write."""

    def __init__(self) -> None:
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        self.h = torch.randn(TOKENS, 1024, **bf16)
        self.q = torch.randn(TOKENS, 8, 256, **bf16)
        self.seen = torch.randn(TOKENS, 8, 256, **bf16)
        self.act = torch.randn(TOKENS, 4096, **bf16)
        self.caches = tuple(torch.randn(VALID + 400, 1, 256, **bf16) for _ in range(2))
        self.tables = rope_tables(VALID + 400, 256, "cuda")
        self.valid = torch.tensor([VALID], dtype=torch.int32, device="cuda")
        self.factor = torch.ones(1024, **bf16)
        self.shift = torch.zeros(8192, device="cuda")
        self.gate = torch.full((1024,), 0.01, device="cuda")

    def launch(self, name: str, gemm: expert.ExpertGemm) -> None:
        """One product as the engine launches it."""
        if name == "qkv":
            gemm(self.h, self.q, factor=self.factor, shift=self.shift, caches=self.caches, tables=self.tables,
                 start=self.valid)  # fmt: skip
        elif name == "gate_up":
            gemm(self.h, self.act, factor=self.factor, shift=self.shift)
        else:
            gemm(self.seen.flatten(1) if name == "o" else self.act, self.h, gate=self.gate)


def microseconds(launch, count: int, replays: int = 30) -> float:
    """Median time of one graph of ``launch()`` over ``count`` stages."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            launch()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / count)
    return sorted(times)[len(times) // 2]


def stage(name: str, fmt: str, buffers: Buffers, plan: tuple[int, int, int, int] | None, pdl: bool) -> float:
    """Microseconds of one product in a chain of its like."""
    epilogue, rows, k = STAGES[name]
    chosen = None if plan is None else expert.GemmPlan(*plan)
    gemms = [
        expert.ExpertGemm(weights(fmt, rows, k), epilogue, TOKENS, heads=(8, 1, 256), pdl=pdl, plan=chosen)
        for _ in range(LAYERS)
    ]

    def launch() -> None:
        for _ in range(4):
            for gemm in gemms:
                buffers.launch(name, gemm)

    return microseconds(launch, 4 * LAYERS)


def layer(formats: dict[str, str], buffers: Buffers, pdl: bool, attention: bool = True) -> float:
    """Microseconds of a whole layer in a chain of 18 layers."""
    made = [
        {
            name: expert.ExpertGemm(weights(formats[name], rows, k), epilogue, TOKENS, heads=(8, 1, 256), pdl=pdl)
            for name, (epilogue, rows, k) in STAGES.items()
        }
        for _ in range(LAYERS)
    ]
    attend = expert.ExpertAttention(TOKENS, 8, 1, 256, pdl=pdl)

    def launch() -> None:
        for _ in range(4):
            for gemms in made:
                buffers.launch("qkv", gemms["qkv"])
                if attention:
                    attend(buffers.q, *buffers.caches, buffers.valid, buffers.seen)
                for name in ("o", "gate_up", "down"):
                    buffers.launch(name, gemms[name])

    return microseconds(launch, 4 * LAYERS)


def main() -> None:
    """Measure and print; write a CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", action="store_true", help="every plan, not only the chosen one")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    buffers = Buffers()
    rows: list[tuple[str, str, str, str, float, float]] = []

    def note(name: str, fmt: str, plan: str, pdl: bool, measure, size: float) -> None:
        try:
            us = measure()
        except Exception:
            traceback.print_exc()
            return
        floor = size / 3.0e6
        rows.append((name, fmt, plan, "pdl" if pdl else "plain", us, floor))
        print(
            f"{name:10} {fmt:28} {plan:16} {'pdl' if pdl else 'plain':6} {us:7.2f} us  (weights {floor:5.2f})",
            flush=True,
        )

    for name, (_, n, k) in STAGES.items():
        for fmt, each in BYTES.items():
            if name == "qkv" and fmt == "nvfp4":
                continue
            size = sum(n) * k * each
            plans = [None, *MORE_PLANS[name]] if args.plans and fmt != "bf16" else [None]
            for plan in plans:
                note(
                    name,
                    fmt,
                    str(plan or "chosen"),
                    True,
                    lambda n=name, f=fmt, p=plan: stage(n, f, buffers, p, True),
                    size,
                )
            note(name, fmt, "chosen", False, lambda n=name, f=fmt: stage(n, f, buffers, None, False), size)
    attend = {pdl: expert.ExpertAttention(TOKENS, 8, 1, 256, pdl=pdl) for pdl in (True, False)}
    for pdl, run in attend.items():

        def chain(run=run) -> None:
            for _ in range(72):
                run(buffers.q, *buffers.caches, buffers.valid, buffers.seen)

        note(
            "attention",
            "bf16 cache",
            "chosen",
            pdl,
            lambda c=chain: microseconds(c, 72),
            (VALID + TOKENS) * 1024,
        )
    mixes = {
        "bf16": dict.fromkeys(STAGES, "bf16"),
        "h100": {"qkv": "e4m3", "o": "e4m3", "gate_up": "nvfp4", "down": "e4m3"},
        "fp8": dict.fromkeys(STAGES, "e4m3"),
    }
    for mix, formats in mixes.items():
        size = sum(sum(n) * k * BYTES[formats[name]] for name, (_, n, k) in STAGES.items())
        for pdl in (True, False):
            note("layer", mix, "chosen", pdl, lambda f=formats, p=pdl: layer(f, buffers, p), size)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        about = [torch.cuda.get_device_name(), torch.__version__, time.strftime("%Y-%m-%d")]
        with (args.out / "expert_layer.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                [
                    "stage",
                    "format",
                    "plan",
                    "launch",
                    "microseconds",
                    "weights_floor",
                    "device",
                    "torch",
                    "date",
                ]
            )
            writer.writerows([*row, *about] for row in rows)


if __name__ == "__main__":
    main()
