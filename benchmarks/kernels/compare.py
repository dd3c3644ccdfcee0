"""Our kernels beside cuBLAS bf16, cuBLAS FP8 and humming-kernels, at the shapes of pi0.5's MLPs, in one run.

    PYTHONPATH=ros_ws/src/hybrid_policy python benchmarks/kernels/compare.py --out kernels.csv

Ours is timed with everything fused (GeGLU, or quantisation, gate and residual), the others as a product alone: that
favours them. One CUDA graph a line, weights rotated beyond twice the L2 cache, median over 25 replays; "pdl" lines
launch each kernel as a programmatic dependent of the one before it. humming-kernels is left out, with the reason
printed, where it is not installed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import importlib.metadata
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import problems as p
import python_sequence
import torch
import triton
from hybrid_policy.kernels import activations, library, nvfp4, tiles, wgmma_linear, wgmma_tiles
from hybrid_policy.kernels.nvfp4_activation import NVFP4Activation
from hybrid_policy.kernels.stream import StreamWeight, capability_of
from hybrid_policy.kernels.wgmma_tiles import WgmmaTile
from timing import graph_time_us, weight_sets

Row = dict[str, object]


def swept_tiles(path: Path) -> dict[tuple[str, int], WgmmaTile]:
    """The fastest tile (of a dependent launch) of each gate/up problem in a CSV of sweep_wgmma.py."""
    best: dict[tuple[str, int], tuple[float, WgmmaTile]] = {}
    for row in csv.DictReader(path.open()):
        if row["tile"].startswith("WgmmaTile"):
            fields = dict(re.findall(r"(\w+)=(\w+)", row["tile"]))
            values = {k: v == "True" if v in ("True", "False") else int(v) for k, v in fields.items()}
            found = (float(row["us_pdl"]), WgmmaTile(**values))
            key = (row["problem"], int(row["m"]))
            best[key] = min(best.get(key, found), found, key=lambda pair: pair[0])
    return {key: tile for key, (_, tile) in best.items()}


def time_ours(problem: p.Problem, pdl: bool, swept: dict[tuple[str, int], WgmmaTile]) -> tuple[float, float, str]:
    """(us, relative error, the tile) of the route that a layer takes on this device."""
    if capability_of(torch.device("cuda")) != 90:
        return time_stream(problem, pdl)
    inputs, out = p.Inputs.random(problem, 0), p.output(problem)
    if problem.geglu and problem.fmt == "nvfp4":
        tile = wgmma_tiles.gate_up_tile(problem.m, problem.n, problem.k)
        tile = swept.get((problem.name, problem.m), tile)
        packs = [p.random_slabs(problem, seed) for seed in range(weight_sets(problem.n * problem.k * 9 // 16))]
        packs[-1].launch(inputs.x, out, tile)
        error = p.slabs_error(problem, packs[-1], inputs, out)
        return graph_time_us([lambda w=w: w.launch(inputs.x, out, tile, pdl=pdl) for w in packs]), error, str(tile)
    small = wgmma_tiles.linear_tile(problem.m, problem.n, problem.k)
    if problem.fmt != "fp8" or small is None:
        return time_stream(problem, pdl)
    weights = [p.random_weight(problem, seed) for seed in range(weight_sets(problem.n * problem.k))]

    def down(weight: StreamWeight, dependent: bool) -> None:
        assert weight.row_scale is not None
        wgmma_linear.launch(
            weight.weight, weight.row_scale, inputs.operand, out, small, residual=inputs.residual, gate=inputs.gate,
            x_scale=inputs.x_scale, pdl=dependent,
        )  # fmt: skip

    down(weights[-1], False)
    error = p.relative_error(problem, weights[-1], inputs, out, 128)
    return graph_time_us([lambda w=w: down(w, pdl) for w in weights]), error, str(small)


def time_stream(problem: p.Problem, pdl: bool) -> tuple[float, float, str]:
    """The same of the Triton kernel, the route of every other device."""
    bytes_each = int(problem.n * problem.k * {"bf16": 2, "fp8": 1, "nvfp4": 0.5625}[problem.fmt])
    packs = [p.random_weight(problem, seed) for seed in range(weight_sets(bytes_each))]
    inputs, out = p.Inputs.random(problem, 0), p.output(problem)
    capability = capability_of(out.device)
    pick = tiles.gate_up_tile if problem.geglu else tiles.linear_tile
    tile = pick(problem.fmt, problem.m, problem.n, problem.k, capability)
    arguments = p.launch_arguments(problem, inputs)
    packs[-1].launch(inputs.operand, out, tile, pdl=False, **arguments)
    error = p.relative_error(problem, packs[-1], inputs, out, tile.bk)
    calls = [lambda w=w: w.launch(inputs.operand, out, tile, pdl=pdl, **arguments) for w in packs]
    return graph_time_us(calls), error, str(tile)


def time_library(problem: p.Problem, fmt: str) -> float:
    """Microseconds of cuBLAS's product alone."""
    m, n, k = problem.m, problem.n, problem.k
    count = weight_sets(n * k * (2 if fmt == "bf16" else 1))
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(m, k, device="cuda").bfloat16()
    weights = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(count)]
    if fmt == "bf16":
        return graph_time_us([lambda w=w: library.bf16_product(x, w, out) for w in weights])
    x8, eight = x.to(torch.float8_e4m3fn), [w.to(torch.float8_e4m3fn) for w in weights]
    if fmt == "fp8 by row":
        ones_m, ones_n = torch.ones(m, device="cuda"), torch.ones(n, device="cuda")
        return graph_time_us([lambda w=w: library.fp8_product(x8, w, ones_m, ones_n, out) for w in eight])
    one = torch.ones((), device="cuda")

    def product(w: torch.Tensor) -> None:
        torch._scaled_mm(x8, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True, out=out)

    return graph_time_us([lambda w=w: product(w) for w in eight])


def time_humming(problem: p.Problem, use_pdl: bool) -> float:
    """Microseconds of humming-kernels' NVFP4 W4A16 product alone."""
    from humming.layer import HummingLayer

    n, k = problem.n, problem.k
    layers = []
    base = nvfp4.quantize(torch.randn(n, k, device="cuda"), rule="max")
    layer = HummingLayer(
        shape_n=n, shape_k=k, weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
        torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    layer.load_from_tensors(
        {"weight": base.codes, "weight_scale": base.scales, "weight_scale_2": base.global_scale.reshape(1)}
    )
    layer.transform()
    layers = [layer.cuda()]
    layers += [copy.deepcopy(layer) for _ in range(weight_sets(n * k * 9 // 16) - 1)]
    x = torch.randn(problem.m, k, device="cuda").bfloat16()
    out = torch.empty(problem.m, n, dtype=torch.bfloat16, device="cuda")
    layers[0](x, outputs=out)
    reference = x.double() @ nvfp4.dequantize(base).double().T
    error = float((out.double() - reference).norm() / reference.norm())
    if not error < 1e-2:
        raise RuntimeError(f"humming's result is off by {error:.1e}")
    return graph_time_us([lambda y=y: y(x, outputs=out, use_pdl=use_pdl) for y in layers])


def wall_us(call: Callable[[], object], repeats: int = 20) -> float:
    """Median wall-clock microseconds of one call that launches many kernels, synchronised."""
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def quantiser_rows() -> list[Row]:
    """bf16 -> NVFP4 (560 x 2048) and FP8, ours and the Python sequence."""
    m, k = 560, 2048
    inputs = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(48)]
    packed = NVFP4Activation.empty(m, k, "cuda", swizzled=True)
    factor = torch.randn(k, device="cuda").bfloat16()
    values = torch.empty(m, k, dtype=torch.float8_e4m3fn, device="cuda")
    scale = torch.empty(m, device="cuda")
    rows: list[Row] = []

    def add(what: str, us: float) -> None:
        rows.append({"problem": "bf16 -> NVFP4, quantise and pack", "m": m, "n": "", "k": k, "what": what, "us": us})

    for pdl in (False, True):
        tag = " pdl" if pdl else ""
        add(
            "ours" + tag,
            graph_time_us([lambda x=x, on=pdl: activations.quantize_nvfp4(x, packed, pdl=on) for x in inputs]),
        )
        add(
            "ours behind RMSNorm" + tag,
            graph_time_us(
                [lambda x=x, on=pdl: activations.quantize_nvfp4(x, packed, factor=factor, pdl=on) for x in inputs]
            ),
        )
        add(
            "ours to FP8" + tag,
            graph_time_us([lambda x=x, on=pdl: activations.quantize_fp8(x, values, scale, pdl=on) for x in inputs]),
        )
    add(
        "Python sequence, in a CUDA graph", graph_time_us([lambda x=x: python_sequence.quantize(x) for x in inputs[:4]])
    )
    add("Python sequence, as called", wall_us(lambda: python_sequence.quantize(inputs[0])))
    return rows


def other_versions() -> str:
    """The driver's and humming-kernels', where they can be had."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0] or "unknown"
    try:
        humming = importlib.metadata.version("humming-kernels")
    except importlib.metadata.PackageNotFoundError:
        humming = "absent"
    return f"driver {driver}, humming-kernels {humming}"


def main() -> int:
    """Time every line that runs here; a line that fails prints why and is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels.csv"))
    parser.add_argument("--no-humming", action="store_true")
    parser.add_argument("--only", default="", help="time only lines whose name contains this")
    parser.add_argument("--problem", default="", help="time only problems whose name contains this")
    parser.add_argument("--tiles", type=Path, help="a CSV of sweep_wgmma.py whose winners replace the rules' tiles")
    args = parser.parse_args()
    swept = {} if args.tiles is None else swept_tiles(args.tiles)
    rows: list[Row] = []
    shapes = [p.EXPERT, p.PREFIX_SMALL, p.PREFIX, p.DOWN, p.DOWN_GIVEN, p.DOWN_NVFP4, p.QKV, p.OUT]
    for problem in [q for q in shapes if args.problem in q.name]:
        lines: list[tuple[str, Callable[[], object]]] = [
            ("ours", lambda q=problem: time_ours(q, False, swept)),
            ("ours pdl", lambda q=problem: time_ours(q, True, swept)),
        ]
        if problem.fmt == "fp8" or problem.geglu:
            lines.append(("ours in Triton", lambda q=problem: time_stream(q, False)))
            lines.append(("ours in Triton pdl", lambda q=problem: time_stream(q, True)))
        alone = not problem.quantised and problem is not p.DOWN_NVFP4
        if alone:
            lines += [(f"cuBLAS {f}", lambda q=problem, f=f: time_library(q, f)) for f in ("bf16", "fp8 by row", "fp8")]
        if problem.fmt != "bf16" and alone and not args.no_humming:
            lines.append(("humming W4A16", lambda q=problem: time_humming(q, False)))
            lines.append(("humming W4A16 pdl", lambda q=problem: time_humming(q, True)))
        for what, measure in lines:
            if args.only not in what:
                continue
            row: Row = {"problem": problem.name, "m": problem.m, "n": problem.n, "k": problem.k, "what": what}
            try:
                result = measure()
                if isinstance(result, tuple):
                    row["us"], row["relative_error"], row["tile"] = result
                else:
                    row["us"] = result
                rows.append(row)
                print(f"{problem.name} M={problem.m} {what}: {row['us']:.2f}", flush=True)
            except Exception as error:
                print(f"{problem.name} M={problem.m} {what}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            torch.cuda.empty_cache()
    if not args.problem:
        rows += quantiser_rows()
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}, {other_versions()}"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    keys = ["problem", "m", "n", "k", "what", "us", "relative_error", "tile", "device", "versions", "date"]
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys)
        writer.writeheader()
        for row in rows:
            row.update(device=torch.cuda.get_device_name(), versions=versions, date=today)
            row["us"] = f"{row['us']:.2f}"
            if "relative_error" in row:
                row["relative_error"] = f"{row['relative_error']:.2e}"
            writer.writerow(row)
            error = row.get("relative_error", "")
            print(f"{row['problem']:42} M={row['m']:<4} {row['what']:32} {row['us']:>9} us {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
