"""compute-sanitizer over every kernel: memory errors and races in shared memory, on small odd shapes.

    PYTHONPATH=ros_ws/src/hybrid_policy python benchmarks/kernels/sanitize.py --out sanitizer.csv
    ... sanitize.py --group gate_up --group loop=test_expert_loop.py --tool racecheck

Each pair of a tool and a group is one process under compute-sanitizer, all at once; a pair that does not end within
``--timeout`` is reported so. A group is one of GROUPS, or NAME=FILE[:EXPRESSION]: the GPU tests of a file of
tests/kernels (pytest's -k EXPRESSION). Exit code 1 if a tool found something or a pair did not end.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from hybrid_policy.kernels import (
    activations,
    expert,
    expert_loop,
    expert_loop_packing,
    flow_step,
    fp8,
    nvfp4,
    qkv,
    tiles,
    wgmma_linear,
)  # fmt: skip
from hybrid_policy.kernels.nvfp4_activation import NVFP4Activation
from hybrid_policy.kernels.stream import StreamWeight
from hybrid_policy.kernels.stream_layers import interleaved
from hybrid_policy.kernels.wgmma import WgmmaWeight
from hybrid_policy.kernels.wgmma_tiles import LinearTile, WgmmaTile
from sanitized_stages import STAGES, Outputs, normal, poison

TESTS = Path(__file__).resolve().parents[2] / "ros_ws/src/hybrid_policy/tests/kernels"


def gate_up() -> Outputs:
    """wgmma_gate_up: every kind of tile, rings that turn over, several tiles a block."""
    outs: Outputs = {}
    small = WgmmaTile(mt=1, nt=24, stages=2, split=2, blocks=2)
    kinds = [
        small,
        replace(small, split=1, group=2),
        replace(small, split=1, nt=32, multicast=True, group=1),
        WgmmaTile(mt=2, nt=24, stages=3),
        WgmmaTile(mt=2, nt=80, stages=3, group=1, multicast=True),
    ]
    m, n, k = 37, 208, 384
    weight = WgmmaWeight(nvfp4.quantize(normal(n, k), rule="max"), torch.ones(n, device="cuda"))
    x, squares = normal(m, k).bfloat16(), torch.rand(4, m, device="cuda") * k
    for tile in kinds:
        for pdl in (False, True):
            out = poison(m, n // 2)
            weight.launch(x, out, tile, squares=squares if pdl else None, pdl=pdl)
            outs[f"{tile}, pdl {pdl}"] = out
    eight = torch.empty(m, n // 2, device="cuda", dtype=torch.float8_e4m3fn)
    shift = normal(n // 2)
    weight.launch(x, eight, small, out_scale=torch.ones((), device="cuda"), gate_shift=shift, up_shift=shift)
    outs["FP8"] = eight.float()
    return outs


def down() -> Outputs:
    """wgmma_linear: bf16 and FP8 activations, every cluster."""
    outs: Outputs = {}
    m, n = 37, 72
    for cluster, groups in ((1, 2), (2, 4), (4, 2), (8, 2)):
        k = 128 * cluster * groups
        weight, x = StreamWeight(fp8.quantize(normal(n, k)), None), normal(m, k).bfloat16()
        values, scale = fp8.quantize_activation(x)
        assert weight.row_scale is not None
        for pdl in (False, True):
            for operand, x_scale in ((x, None), (values, scale.reshape(-1))):
                out = poison(m, n)
                wgmma_linear.launch(
                    weight.weight, weight.row_scale, operand, out, LinearTile(40, cluster, groups), bias=normal(n),
                    residual=normal(m, n).bfloat16(), gate=normal(n), x_scale=x_scale, pdl=pdl,
                )  # fmt: skip
                outs[f"cluster {cluster}, {operand.dtype}, pdl {pdl}"] = out
    return outs


def stream() -> Outputs:
    """stream_gemm (Triton): the three formats, splits of K, bulk copies and pointers."""
    outs: Outputs = {}
    t = tiles.Tile
    cases = [
        ("expert gate/up", "nvfp4", True, 50, 128, 512, t(64, 64, 256, 4, 3, swap=True, tma_x=True, tma_w=True)),
        ("prefix gate/up", "nvfp4", True, 50, 128, 256, t(64, 128, 128, 8, 3, swap=True, tma_x=True)),
        ("many tokens", "nvfp4", True, 300, 128, 256, t(256, 128, 128, 8, 2, swap=True, bm2=32, tma_x=True)),
        ("pointers, ragged", "nvfp4", True, 37, 80, 272, t(64, 64, 128, 4, 2)),
        ("down, split", "fp8", False, 50, 64, 2048, t(64, 64, 512, 8, 1, split=4)),
        ("down, bulk", "fp8", False, 50, 64, 1024, t(64, 32, 256, 4, 2, split=4)),
        ("bf16", "bf16", False, 50, 96, 512, t(64, 32, 256, 4, 3, tma_x=True, tma_w=True)),
        ("bf16 ragged", "bf16", False, 9, 72, 200, t(16, 32, 128, 4, 2)),
    ]
    for name, fmt, geglu, m, n, k, tile in cases:
        wide = normal(n, k)
        weight = fp8.quantize(wide) if fmt == "fp8" else nvfp4.quantize(wide, rule="max") if fmt == "nvfp4" else wide
        packed = interleaved(weight, weight) if geglu else StreamWeight(weight, None)
        x = normal(m, k).bfloat16()
        for pdl in (False, True):
            out = poison(m, n)
            extra = {} if geglu else {"residual": normal(m, n).bfloat16(), "gate": normal(n), "bias": normal(n)}
            packed.launch(x, out, tile, geglu=geglu, pdl=pdl, **extra)
            outs[f"{name}, pdl {pdl}"] = out
    return outs


def rows() -> Outputs:
    """The quantisers, the norm and the epilogues behind a library's product (Triton)."""
    outs: Outputs = {}
    x, factor = normal(37, 272).bfloat16(), normal(272).bfloat16()
    for swizzled in (False, True):
        packed4 = NVFP4Activation.empty(37, 272, "cuda", swizzled=swizzled)
        activations.quantize_nvfp4(x, packed4, factor=factor, shift=normal(272))
        outs[f"to NVFP4, swizzled {swizzled}"] = packed4.row_scale
    values, scale = torch.empty(37, 272, device="cuda", dtype=torch.float8_e4m3fn), torch.empty(37, device="cuda")
    activations.quantize_fp8(x, values, scale)
    outs["to FP8"] = values.float()
    outs["norm"] = activations.rms_norm(x, torch.empty_like(x), factor=factor)
    y, out, half = normal(37, 272).bfloat16(), poison(37, 272), poison(37, 136)
    activations.finish_rows(y, out, bias=normal(272), gate=normal(272), residual=y)
    activations.finish_geglu(y, half)
    return outs | {"finish": out, "GeGLU": half}


def expert_layer() -> Outputs:
    """expert_gemm in its three epilogues and formats, and expert_attention."""
    outs: Outputs = {}
    tokens, width, features, heads = 16, 512, 512, (4, 2, 128)
    capacity, start = 96, torch.tensor([33], dtype=torch.int32, device="cuda")
    tables = qkv.rope_tables(capacity, heads[2], "cuda")
    caches = (poison(capacity, heads[1], heads[2]).zero_(), poison(capacity, heads[1], heads[2]).zero_())
    h, factor = normal(tokens, width).bfloat16(), normal(width).bfloat16()
    q = poison(tokens, heads[0], heads[2])

    def weight(fmt: str, n: int, k: int) -> expert.Weight:
        dense = normal(n, k) / k**0.5
        if fmt == "bf16":
            return dense.bfloat16()
        return fp8.quantize(dense, per_row=False) if fmt == "e4m3" else nvfp4.quantize(dense, rule="max")

    for fmt in ("bf16", "e4m3", "nvfp4"):
        stream_ = h.clone()
        expert.ExpertGemm([weight(fmt, width, width)], expert.RESIDUAL, tokens)(h, stream_, gate=normal(width))
        product = expert.ExpertGemm([weight(fmt, features, width) for _ in range(2)], expert.GEGLU, tokens)
        mid = poison(tokens, features)
        product(h, mid, factor=factor, shift=product.shift_rows(normal(width)))
        outs[f"residual {fmt}"], outs[f"GeGLU {fmt}"] = stream_, mid
        if fmt != "nvfp4":
            parts = [weight(fmt, count * heads[2], width) for count in (heads[0], heads[1], heads[1])]
            product = expert.ExpertGemm(parts, expert.QKV, tokens, heads=heads)
            shift = product.shift_rows(normal(width))
            product(h, q, factor=factor, shift=shift, caches=caches, tables=tables, start=start)
            outs[f"qkv {fmt}"] = q.clone()
    out = poison(*q.shape)
    expert.ExpertAttention(tokens, *heads)(q, *caches, start, out)
    return outs | {"attention": out}


def loop() -> Outputs:
    """expert_loop: two steps of two layers, so that rings, mail and parcels turn over; every format."""
    outs: Outputs = {}
    tokens, actions, capacity, layers, steps = 16, 32, 40, 2, 2
    hybrid = {"qkv": "e4m3", "o": "e4m3", "gate_up": "nvfp4", "down": "e4m3"}
    for formats in (hybrid, *(dict.fromkeys(expert_loop_packing.STAGES, fmt) for fmt in ("bf16", "w8a8"))):
        call = expert_loop.ExpertLoop(
            layers, steps, tokens, actions, capacity, formats, torch.device("cuda"), macros={"PATIENCE": 1 << 30}
        )
        width = expert_loop_packing.WIDTH
        for i in range(layers):
            for stage, (rows, k, _) in expert_loop_packing.STAGES.items():
                dense, fmt = normal(rows, k) / k**0.5, formats[stage]
                packed = dense.bfloat16() if fmt == "bf16" else fp8.quantize(dense, per_row=False)
                weight = nvfp4.quantize(dense, rule="max") if fmt == "nvfp4" else packed
                norm = (normal(steps, k), normal(steps, k)) if stage in ("qkv", "gate_up") else ()
                call.pack(i, stage, [weight], *norm)
            call.modulate(i, *(tuple(normal(steps, width) for _ in range(2)) for _ in range(2)), most_value=6.0)
        weights = flow_step.FlowWeights(normal(actions, width), normal(actions), normal(width, actions), normal(width))
        call.set_flow(weights, (normal(steps, width), normal(steps, width)), [1.0, 0.5], [1.0, 2.0])
        guide = flow_step.Guide(
            normal(tokens, actions), normal(tokens), torch.ones(1, device="cuda", dtype=torch.int32)
        )
        keys, values = (normal(layers, capacity, 1, expert_loop_packing.HEAD_DIM).bfloat16() for _ in range(2))
        valid, noise = torch.full((1,), 19, device="cuda", dtype=torch.int32), normal(tokens, actions)
        tables, out = qkv.rope_tables(capacity, expert_loop_packing.HEAD_DIM, "cuda"), torch.empty_like(noise)
        call.start()
        call(noise, out, guide, keys, values, valid, tables)
        outs[formats["gate_up"]] = out
    return outs


def flow() -> Outputs:
    """flow_step at the model's width, its norm in and out, first and later steps."""
    tokens, actions, width = 3, 32, 1024
    weights = flow_step.FlowWeights(normal(actions, width), normal(actions), normal(width, actions), normal(width))
    guide = flow_step.Guide(normal(tokens, actions), normal(tokens), torch.ones(1, device="cuda", dtype=torch.int32))
    x, h = normal(tokens, actions), normal(tokens, width)
    for first in (True, False):
        for norm in (None, (normal(width), normal(width))):
            flow_step.flow_step(h, x, h, weights, guide, 0.5, 0.1, 1.0, first=first, norm=norm, pdl=not first)
    return {"actions": x, "next": h}


GROUPS: dict[str, Callable[[], Outputs]] = {
    "gate_up": gate_up, "down": down, "stream": stream, "rows": rows, "expert": expert_layer, "loop": loop,
    "flow": flow, **STAGES,
}  # fmt: skip
#: Kernels that have their own GPU tests, sanitised through these.
TEST_GROUPS = (
    "glue=test_glue.py",
    "inputs=test_prefix_kernels.py:TestGe or cut_patches or gather_rows",
)


def launch(group: str) -> int:
    """In the sanitised process: run a group; every output must be finite."""
    if "=" in group:
        import pytest

        file, _, expression = group.partition("=")[2].partition(":")
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "-m", "gpu or not gpu", str(TESTS / file)]
        return int(pytest.main(arguments + (["-k", expression] if expression else [])))
    outs = GROUPS[group]()
    torch.cuda.synchronize()
    bad = [name for name, out in outs.items() if not bool(torch.isfinite(out.float()).all())]
    print(f"{len(outs)} outputs, not finite: {bad or 'none'}")
    return 1 if bad else 0


def sanitise(tool: str, group: str, timeout: float, logs: Path) -> dict[str, object]:
    """One process under compute-sanitizer, and what it said."""
    log = logs / f"{tool}_{re.sub(r'[^a-z_]', '_', group)}.log"
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", sys.executable, __file__, "--launch", group]
    begin = time.monotonic()
    with log.open("w") as file:
        try:
            code: int | str = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = "did not end"
    text = log.read_text(errors="replace")
    found = re.findall(r"(?:ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)", text)
    said = re.findall(r"\d+ outputs, not finite: .*|\d+ passed.*|\d+ failed.*", text)
    summary = found[-1] if found else "no summary"
    clean = code == 0 and bool(re.search(r": 0 (errors|hazards)", summary))
    return {
        "tool": tool, "group": group, "clean": clean, "exit": code, "summary": summary,
        "launched": said[-1] if said else "", "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip


def main() -> int:
    """Run, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", help=argparse.SUPPRESS)
    parser.add_argument("--group", action="append", help=f"of {', '.join(GROUPS)}, or NAME=FILE[:EXPRESSION]")
    parser.add_argument("--tool", action="append", choices=["memcheck", "racecheck", "synccheck", "initcheck"])
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each process")
    parser.add_argument("--out", type=Path, default=Path("sanitizer.csv"))
    parser.add_argument("--logs", type=Path, help="a folder for what each process printed")
    args = parser.parse_args()
    if args.launch:
        return launch(args.launch)
    tested = [g for g in TEST_GROUPS if (TESTS / re.split("[=:]", g)[1]).exists()]
    groups = args.group or [*GROUPS, *tested]
    logs = args.logs or Path(tempfile.mkdtemp())
    logs.mkdir(parents=True, exist_ok=True)
    pairs = [(tool, group) for tool in args.tool or ["memcheck", "racecheck"] for group in groups]
    with ThreadPoolExecutor(len(pairs)) as pool:
        table = list(pool.map(lambda pair: sanitise(*pair, args.timeout, logs), pairs))
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*table[0], "device", "date"])
        writer.writeheader()
        for row in table:
            writer.writerow(row | {"device": device, "date": today})
            state = "clean" if row["clean"] else "NOT CLEAN"
            line = f"{row['tool']:10} {row['group']:32} {state:10} {row['seconds']:>6} s"
            print(f"{line}  {row['summary']}  {row['launched']}")
    return 0 if all(row["clean"] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
