"""The loop kernel alone: correct against float64 first, then microseconds a layer, the flow's steps included, and where
they go.

python benchmarks/expert_loop.py --out results/
"""

from __future__ import annotations

import argparse
import csv
import json
import traceback
from pathlib import Path

import torch
from hybrid_policy.kernels import expert, fp8, nvfp4
from hybrid_policy.kernels.expert_loop import ExpertLoop
from hybrid_policy.kernels.expert_loop_packing import FEATURES, HEAD_DIM, HEADS, STAGES, WIDTH
from hybrid_policy.kernels.expert_reference import ReferenceLayer, layer_reference
from hybrid_policy.kernels.flow_step import FlowWeights, Guide, flow_step_reference
from hybrid_policy.kernels.qkv import rope_tables

DEVICE = torch.device("cuda")
ACTIONS = 32
RECIPES = {
    "h100": dict.fromkeys(STAGES, "w8a8"),
    "hybrid": {"qkv": "e4m3", "o": "e4m3", "gate_up": "nvfp4", "down": "e4m3"},
    "seed": {"qkv": "bf16", "o": "bf16", "gate_up": "nvfp4", "down": "e4m3"},
    "bf16": dict.fromkeys(STAGES, "bf16"),
    "fp8 weights": dict.fromkeys(STAGES, "e4m3"),
}
#: stretches of a layer, from one recorded clock to another
EVENTS = {
    "q k v: activations there": (0, 1), "q k v: product": (1, 2), "q k v: sums of the block": (2, 20),
    "q k v: sent to the pair": (20, 21), "q k v: posted": (21, 3),
    "attention: all there": (4, 16), "attention: scores": (16, 24), "attention: weights": (24, 25),
    "attention: products": (25, 17), "attention: posted": (17, 18),
    "attention: parts there": (18, 19), "attention: summed, posted": (19, 5), "o: activations there": (5, 6),
    "o: product": (6, 7), "o: partial sums posted": (7, 8), "o: parts there": (8, 27), "o: posted": (27, 9),
    "gate up: activations there": (9, 10), "gate up: product": (10, 11), "gate up: sums of the block": (11, 22),
    "gate up: posted": (22, 12), "down: activations there": (13, 14), "down: product": (14, 26),
    "down: partial sums posted": (26, 15), "down: parts there": (15, 28), "down: posted": (28, 29),
}  # fmt: skip


def weight_of(fmt: str, n: int, k: int):
    """A random weight in a format."""
    dense = torch.randn(n, k, device=DEVICE) / k**0.5
    if fmt == "bf16":
        return dense.bfloat16()
    return nvfp4.quantize(dense, rule="max") if fmt == "nvfp4" else fp8.quantize(dense, per_row=False)


def pick(pair, step):
    """Both tensors' row of a step."""
    return pair[0][step], pair[1][step]


class Flow:
    """A packed loop with random weights, its caches, and the same mathematics in float64.

    same: one layer's weights for all (quick).
    """

    def __init__(self, formats, layers, steps, tokens, valid, capacity, *, same=False, **options):
        self.loop = ExpertLoop(layers, steps, tokens, ACTIONS, capacity, formats, DEVICE, **options)
        self.valid = torch.tensor([valid], dtype=torch.int32, device=DEVICE)
        self.keys = torch.randn(layers, capacity, 1, HEAD_DIM, device=DEVICE).bfloat16()
        self.values = torch.randn_like(self.keys)
        self.keys[:, valid:], self.values[:, valid:] = float("nan"), float("nan")  # never to be looked at
        self.tables = rope_tables(capacity, HEAD_DIM, DEVICE)
        self.layers, self.steps = [], steps
        for i in range(layers):
            if not self.layers or not same:
                shapes = {"q": ("qkv", HEADS * HEAD_DIM), "k": ("qkv", HEAD_DIM), "v": ("qkv", HEAD_DIM)}
                shapes |= {"o": ("o", WIDTH), "gate": ("gate_up", FEATURES), "up": ("gate_up", FEATURES)}
                shapes["down"] = ("down", WIDTH)
                weights = {name: weight_of(formats[s], n, STAGES[s][1]) for name, (s, n) in shapes.items()}
                dense = {name: expert.decoded(*expert.stack([w])) for name, w in weights.items()}
            factors = tuple(1 + 0.3 * torch.randn(steps, WIDTH, device=DEVICE) for _ in range(2))
            shifts = tuple(0.3 * torch.randn(steps, WIDTH, device=DEVICE) for _ in range(2))
            gates = tuple(torch.randn(steps, WIDTH, device=DEVICE) for _ in range(2))
            self.loop.pack(i, "qkv", [weights["q"], weights["k"], weights["v"]], shifts[0], factors[0])
            self.loop.pack(i, "o", [weights["o"]])
            self.loop.pack(i, "gate_up", [weights["gate"], weights["up"]], shifts[1], factors[1])
            self.loop.pack(i, "down", [weights["down"]])
            self.loop.modulate(i, factors, gates, self.values[i, :valid].abs().max().item())
            self.layers.append(
                [
                    ReferenceLayer(**dense, factors=pick(factors, s), shifts=pick(shifts, s), gates=pick(gates, s))
                    for s in range(steps)
                ]
            )
        self.flow = FlowWeights(
            torch.randn(ACTIONS, WIDTH, device=DEVICE) / WIDTH**0.5, torch.randn(ACTIONS, device=DEVICE),
            torch.randn(WIDTH, ACTIONS, device=DEVICE) / ACTIONS**0.5, torch.randn(WIDTH, device=DEVICE),
        )  # fmt: skip
        self.norm = tuple(offset + 0.3 * torch.randn(steps, WIDTH, device=DEVICE) for offset in (1, 0))
        self.times = [1 - s / steps for s in range(steps)]
        self.loop.set_flow(self.flow, self.norm, self.times, [0.0] * steps)
        self.noise = torch.randn(tokens, ACTIONS, device=DEVICE)
        self.actions = torch.empty_like(self.noise)
        none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.guide = Guide(torch.zeros_like(self.noise), torch.zeros(tokens, device=DEVICE), none)

    def run(self):
        """The launch under test."""
        self.loop.start()
        self.loop(self.noise, self.actions, self.guide, self.keys, self.values, self.valid, self.tables)

    def expected(self):
        """Actions, float64."""
        wide = self.flow.double()
        valid, x = int(self.valid), self.noise.double()
        h = torch.empty(len(x), WIDTH, dtype=torch.float64, device=DEVICE)
        flow_step_reference(h, x, h, wide, self.guide, 0.0, 0.0, 0.0, first=True)
        for s in range(self.steps):
            for i, layer in enumerate(self.layers):
                h = layer_reference(h, layer[s], self.keys[i, :valid], self.values[i, :valid], self.tables)
            normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.norm[0][s] + self.norm[1][s]
            flow_step_reference(normed.double(), x, h, wide, self.guide, self.times[s], 1 / self.steps, 0.0)
        return x


def check(formats, layers=3, steps=2, tokens=50, valid=560, capacity=610, **options) -> float:
    """Relative error of what the flow adds to the noise, against float64."""
    torch.manual_seed(0)
    flow = Flow(formats, layers, steps, tokens, valid, capacity, **options)
    moved, first = flow.expected() - flow.noise, None
    for _ in range(3):
        flow.run()
        torch.cuda.synchronize()
        assert first is None or torch.equal(first, flow.actions), "two runs differ"
        first = flow.actions.clone()
    return ((first - flow.noise - moved).norm() / moved.norm()).item()


def measure(formats, valid, layers=18, steps=10, tokens=50, **options):
    """Microseconds a layer of a captured flow; and the loop, with the clocks of the last step where traced."""
    torch.manual_seed(0)
    flow = Flow(formats, layers, steps, tokens, valid, valid + tokens, same=True, **options)
    flow.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flow.run()
    times = []
    for _ in range(300):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3)
    times.sort()
    print(f"    max/p50 {times[-1] / times[len(times) // 2]:.3f}", flush=True)
    return times[len(times) // 2] / (layers * steps), flow.loop


def clocks_table(loop) -> None:
    """Nanoseconds (at 1.755 GHz) from stage to stage, median and 90 % over blocks and layers."""
    clocks = loop.clocks[:, 1:].double() / 1.755  # the first layer waits for the launch
    print("  nanoseconds, median (90 %) [largest median of a block]")
    for name, blocks in (
        ("projects, attends", slice(0, 80)),
        ("attends", slice(80, 104)),
        ("neither", slice(104, 128)),
    ):
        print(f"  blocks that {name}")
        for event, (begin, end) in EVENTS.items():
            part = clocks[blocks, :, end] - clocks[blocks, :, begin]
            part = part[((part > 0) & (part < 1e6)).all(1)]  # the blocks that pass there
            if len(part):
                worst = part.median(1).values.max().item()
                part = part.flatten()
                print(f"    {event:28s} {part.median().item():8.0f} ({part.quantile(0.9).item():.0f}) [{worst:.0f}]")
        part = (
            clocks[blocks, 1:, 1 if name[0] == "p" else 6] - clocks[blocks, :-1, 1 if name[0] == "p" else 6]
        ).flatten()
        print(f"    a layer {part.median().item():.0f}")


def main() -> None:
    """Print, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", action="store_true", help="also where the time of a layer goes")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--macros", nargs="+", default=[""], help="variants, each like A=0,B=1")
    parser.add_argument("--quick", action="store_true", help="one check and one timing a recipe")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    rows = []
    cases = {"2x48": {}, "3x200": {"valid": 968, "capacity": 1018}, "16 tokens": {"tokens": 16}}
    for name in arguments.recipes:
        formats = RECIPES[name]
        row = {"recipe": name}
        rows.append(row)
        try:
            for case, options in cases.items():
                if not arguments.quick or case == "2x48":
                    row[f"error {case}"] = check(formats, **options)
                    print(f"{name}, {case}: error {row[f'error {case}']:.2e}", flush=True)
            for case, valid in (("2x48", 560), ("3x200", 968)):
                if not arguments.quick or case == "2x48":
                    row[f"us a layer {case}"] = measure(formats, valid)[0]
                    print(f"{name}, {case}: {row[f'us a layer {case}']:.2f} us a layer", flush=True)
            for variant in filter(None, arguments.macros):
                macros = {key: int(value) for key, value in (item.split("=") for item in variant.split(","))}
                row[f"us a layer {variant}"] = measure(formats, 560, macros=macros)[0]
                print(f"{name} {variant}: {row[f'us a layer {variant}']:.2f} us a layer", flush=True)
            if arguments.trace:
                clocks_table(measure(formats, 560, trace=True)[1])
        except Exception:
            traceback.print_exc()
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                break  # a trap leaves nothing to go on with
    print(json.dumps(rows, indent=1))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "expert_loop_h100.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
