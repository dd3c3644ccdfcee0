"""Vision's and the prefix's kernels one by one on a GPU: each checked against its reference first, then timed.

    python benchmarks/prefix_stages.py --out results/

Microseconds are medians over replays of a graph of several launches in a chain, buffers in turn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from hybrid_policy.kernels import gate_up_product as gate_up
from hybrid_policy.kernels import geglu_rows, norm, qkv
from hybrid_policy.kernels import hopper_product as hopper
from hybrid_policy.kernels import vision_attention as vision
from hybrid_policy.kernels.attention import Attention, AttentionPlan, attention_reference
from hybrid_policy.kernels.prefix_attention import PrefixAttention
from hybrid_policy.runtime import static_scales
from prefix_down import GRAPH_ROWS, prefixes, products
from prefix_projections import projections
from stage_rows import ROWS, chain, guarded, layers, note, relative, write

DEVICE = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
ONLY_OWN = "--only-own" in sys.argv


def check_attention(rows: int, capacity: int) -> None:
    """Every cluster size and both outputs, with NaN behind the valid keys."""
    for valid_keys in (rows, rows - 37, 130, 5):
        q = torch.randn(rows, 8, 256, device=DEVICE, dtype=BF16) * 2
        k = torch.randn(capacity, 1, 256, device=DEVICE, dtype=BF16)
        v = torch.randn(capacity, 1, 256, device=DEVICE, dtype=BF16)
        k[valid_keys:] = float("nan")
        v[valid_keys:] = float("nan")
        valid = torch.tensor([valid_keys], dtype=torch.int32, device=DEVICE)
        expected = torch.empty(q.shape, device=DEVICE)
        attention_reference(q, k.nan_to_num(), v.nan_to_num(), valid, 0, expected, 1 / 16)
        errors = []
        for cluster in (1, 2, 3, 4):
            call = PrefixAttention(rows, 8, capacity, DEVICE, cluster=cluster, pdl=cluster % 2 == 0)
            out = torch.full(q.shape, float("nan"), device=DEVICE, dtype=BF16)
            call(q, k, v, valid, 0, out)
            eight, scale = torch.empty(q.shape, device=DEVICE, dtype=FP8), torch.empty(rows, device=DEVICE)
            call(q, k, v, valid, 0, eight, out_scale=scale)
            torch.cuda.synchronize()
            errors += [relative(out, expected), relative(eight.float() * scale[:, None, None], expected)]
        print(f"  attention {rows} rows, {valid_keys} keys: " + " ".join(f"{e:.1e}" for e in errors), flush=True)


def time_attention(rows: int, capacity: int) -> None:
    """Ours at each cluster size against Triton's plans."""
    q = torch.randn(rows, 8, 256, device=DEVICE, dtype=BF16)
    caches = [torch.randn(2, capacity, 1, 256, device=DEVICE, dtype=BF16) for _ in range(4)]
    valid = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
    eight, scale = torch.empty(q.shape, device=DEVICE, dtype=FP8), torch.empty(rows, device=DEVICE)
    out = torch.empty_like(q)

    def ours(call, c):
        return lambda: call(q, c[0], c[1], valid, 0, eight, out_scale=scale)

    def triton_call(call, c):
        return lambda: call(q, c[0], c[1], valid, 0, out, pdl=True)

    shape = f"{rows}x8 rows"
    for cluster in (2, 3) if ONLY_OWN else (1, 2, 3, 4):
        call = PrefixAttention(rows, 8, capacity, DEVICE, cluster=cluster, pdl=True)
        note(f"attention wgmma, cluster {cluster}, FP8 out", shape, chain(*(ours(call, c) for c in caches)))
    for plan in () if ONLY_OWN else (AttentionPlan(64, 32, 1, 4, 3), AttentionPlan(64, 64, 1, 8, 2)):
        call = Attention(rows, 8, 1, 256, capacity, DEVICE, plan=plan)
        name = f"attention Triton {plan.block_m}x{plan.block_n}, {plan.warps} warps"
        note(name, shape, chain(*(triton_call(call, c) for c in caches)))


def geglu(rows: int) -> None:
    """GeGLU into FP8: the plan, others, and Triton."""
    width = 16384
    both = [torch.randn(rows, 2 * width, device=DEVICE, dtype=BF16) for _ in range(3)]
    row_scale = torch.rand(rows, device=DEVICE) + 0.5
    out, scale = torch.empty(rows, width, device=DEVICE, dtype=FP8), torch.empty(rows, device=DEVICE)
    expected, expected_scale = torch.empty_like(out), torch.empty_like(scale)
    norm.geglu_reference(both[0], expected, row_scale=row_scale, out_scale=expected_scale)
    wide = expected.float() * expected_scale[:, None]
    plan = geglu_rows.plan_geglu
    for threads, blocks in ((512, 3), (512, 2), (256, 4), (1024, 1)):
        geglu_rows.plan_geglu = lambda _, pair=(threads, blocks): pair
        geglu_rows._kernel.cache_clear()
        geglu_rows.launch(both[0], out, row_scale, scale, pdl=True)
        error = relative(out.float() * scale[:, None], wide)
        calls = [lambda b=b: geglu_rows.launch(b, out, row_scale, scale, pdl=True) for b in both]
        note(f"GeGLU CUDA, {threads} threads x {blocks}", f"{rows}x{width}", chain(*calls), error)
        note(f"GeGLU CUDA, {threads} threads x {blocks}, one buffer", f"{rows}x{width}", chain(calls[0]), error)
    geglu_rows.plan_geglu = plan
    geglu_rows._kernel.cache_clear()


def vision_product(rows: int, name: str, n: int, k: int) -> None:
    """One product by the library in bf16 and FP8, as many layers' weights in turn as L2 does not hold."""
    one = torch.ones((), device=DEVICE)
    x = torch.randn(rows, k, device=DEVICE, dtype=BF16)
    ws = [torch.randn(n, k, device=DEVICE, dtype=BF16) * k**-0.5 for _ in range(layers(n * k * 2))]
    x8, w8 = x.to(FP8), [w.to(FP8) for w in ws]
    bias = torch.randn(n, device=DEVICE, dtype=BF16) if name in ("qkv", "fc1") else None

    def eight(w: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(x8, w.t(), one, one, bias=bias, out_dtype=BF16, use_fast_accum=True)

    shape = f"{rows}x{n}x{k}"
    if name == "fc1":
        bf16 = [lambda w=w: torch._addmm_activation(bias, x, w.t(), use_gelu=True) for w in ws]
    else:
        bf16 = [lambda w=w: F.linear(x, w, bias) for w in ws]
    note(f"vision {name} bf16", shape, chain(*bf16, launches=len(ws)))
    error = relative(eight(w8[0]), F.linear(x8.float(), w8[0].float(), None if bias is None else bias.float()))
    note(f"vision {name} FP8", shape, chain(*(lambda w=w: eight(w) for w in w8), launches=len(ws)), error)


def own_product(rows: int, name: str, n: int, k: int, dtype: torch.dtype) -> None:
    """hopper_product.cu: the plan, and others near it; fc1 with its GELU, against float64."""
    size, eight = dtype.itemsize, dtype == FP8
    x = torch.randn(rows, k, device=DEVICE).to(dtype)
    ws = [(torch.randn(n, k, device=DEVICE) * (8 if eight else k**-0.5)).to(dtype) for _ in range(layers(n * k * size))]
    scale = k**-0.5 / 8 if eight else 1.0
    bias = torch.randn(n, device=DEVICE, dtype=BF16) if name in ("qkv", "fc1") else None
    expected = x.double() @ ws[0].double().T * scale + (0 if bias is None else bias.double())
    gelu = name == "fc1"
    out_scale = 0.02 if gelu and eight else None
    if gelu:
        expected = F.gelu(expected, approximate="tanh")
    plan = hopper.plan_product(rows, n, k, size)
    plans = [plan, *(hopper.make_plan(plan.nt, cm, cn, k * size) for cm, cn in ((1, 1), (2, 1), (2, 2)))]
    plans += [hopper.make_plan(nt, plan.cm, plan.cn, k * size) for nt in (plan.nt - 16, plan.nt + 16) if nt >= 32]
    for each in dict.fromkeys(plans):

        def call(w, each=each):
            return hopper.hopper_product(
                x, w, scale, bias=bias, gelu=gelu, out_scale=out_scale, pdl=True, plan=each
            )  # fmt: skip

        error = relative(call(ws[0]).double() * (out_scale or 1.0), expected)
        again = all(torch.equal(call(ws[0]).view(torch.uint8), call(ws[0]).view(torch.uint8)) for _ in range(3))
        mark = "*" if each == plan else ""
        mark += "" if again else " DIFFERS"
        form = "FP8" if eight else "bf16"
        text = f"vision {name} {form} wgmma {each.nt}, {each.cm}x{each.cn}, {each.stages} stages{mark}"
        calls = [lambda w=w, c=call: c(w) for w in ws]
        note(text, f"{rows}x{n}x{k}", chain(*calls, launches=len(ws)), error)


def own_attention(rows: int) -> None:
    """vision_attention.cu against the library, in bf16 and FP8."""
    stacked = [torch.randn(rows, 3 * 1152, device=DEVICE, dtype=BF16) * 1.5 for _ in range(4)]
    expected = torch.empty(rows, 1152, device=DEVICE)
    views = rows // 256
    q, k, v = (t.transpose(1, 2).float() for t in stacked[0].view(views, 256, 3, 16, 72).unbind(2))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, 1152)
    for name, call, scale in (
        ("library", vision.vision_attention_reference, None),
        ("wgmma", vision.vision_attention, None),
        ("wgmma, FP8 out", vision.vision_attention, 0.02),
    ):
        options = {"pdl": True} if call is vision.vision_attention else {}
        error = relative(call(stacked[0], 16, 256, scale, **options).float() * (scale or 1.0), expected)
        calls = [lambda s=s, c=call, f=scale, p=options: c(s, 16, 256, f, **p) for s in stacked]
        note(f"vision attention {name}", f"{views}x16x256x72", chain(*calls), error)


def prefix_product(m: int, name: str, n: int, k: int) -> None:
    """One FP8 product, three layers' weights in turn."""
    one = torch.ones((), device=DEVICE)
    w8 = [(torch.randn(n, k, device=DEVICE) * 8).to(FP8) for _ in range(3)]
    x8 = torch.randn(m, k, device=DEVICE).to(FP8)

    def eight(w: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(x8, w.t(), one, one, out_dtype=BF16, use_fast_accum=True)

    note(f"prefix {name} FP8", f"{m}x{n}x{k}", chain(*(lambda w=w: eight(w) for w in w8)))


def gated_inputs(m: int, eight: bool, layers: int = 3):
    """x, and ``layers`` weights of gate and up stacked, as the prefix has them; E4M3 or bf16."""
    x = torch.randn(m, 2048, device=DEVICE)
    ws = [torch.randn(32768, 2048, device=DEVICE) * 2048**-0.5 for _ in range(layers)]
    if not eight:
        return x.to(BF16), [w.to(BF16) for w in ws], None, 1.0
    scale = 2.0**-10
    return (x * 64).to(FP8), [(w / scale).to(FP8) for w in ws], torch.full((m,), 1 / 64, device=DEVICE), scale


def gate_up_library(m: int, eight: bool) -> None:
    """The library's product, and with GeGLU behind it."""
    x, ws, row_scale, scale = gated_inputs(m, eight)
    shape, kind = f"{m}x2x16384x2048", "FP8" if eight else "bf16"
    out = torch.empty(m, 16384, device=DEVICE, dtype=FP8 if eight else BF16)
    out_scale = torch.empty(m, device=DEVICE) if eight else None
    one, factor = torch.ones((), device=DEVICE), torch.full((), scale, device=DEVICE)

    def product(w: torch.Tensor) -> torch.Tensor:
        if not eight:
            return F.linear(x, w)
        return torch._scaled_mm(x, w.t(), one, factor, out_dtype=BF16, use_fast_accum=True)

    def whole(w: torch.Tensor) -> None:
        norm.geglu(product(w), out, row_scale=row_scale, out_scale=out_scale, pdl=True)

    whole(ws[0])
    expected = gate_up.gate_up_reference(x, ws[0], row_scale=row_scale, weight_scale=scale)
    error = relative(out.float() * (1.0 if out_scale is None else out_scale[:, None]), expected)
    note(f"gate, up {kind}, library", shape, chain(*(lambda w=w: product(w) for w in ws)))
    note(f"gate, up {kind}, library, then GeGLU", shape, chain(*(lambda w=w: whole(w) for w in ws)), error)


def gate_up_own(m: int, eight: bool, plans: list[gate_up.GateUpPlan | None]) -> None:
    """gate_up_product.cu, each plan checked against float64 first."""
    x, ws, row_scale, scale = gated_inputs(m, eight)
    shape, kind = f"{m}x2x16384x2048", "FP8" if eight else "bf16"
    expected = gate_up.gate_up_reference(x, ws[0], row_scale=row_scale, weight_scale=scale)
    scales = {"row_scale": row_scale, "weight_scale": scale}
    if row_scale is not None:
        gate, up = (ws[0].float() * scale).chunk(2)
        scales |= {
            "squares": (x.float() * row_scale[:, None]).square().sum(1),
            "out_scale": torch.empty_like(row_scale),
        }
        scales["out_factor"] = static_scales.gated_row_factor(gate, up)
    chosen = gate_up.plan_gate_up(eight, m, 16384, 2048)
    for plan in dict.fromkeys(p or chosen for p in plans):
        guarded(time_gate_up, f"gate, up {kind}", shape, plan, plan == chosen, expected, x, ws, scales)


def time_gate_up(what, shape, plan, chosen, expected, x, ws, scales) -> None:
    """One plan."""

    def call(w):
        return gate_up.gate_up_product(x, w, **scales, pdl=True, plan=plan)

    first = call(ws[0])
    factor = scales.get("out_scale")
    error = relative(first.float() if factor is None else first.float() * factor[:, None], expected)
    again = all(torch.equal(first.view(torch.uint8), call(ws[0]).view(torch.uint8)) for _ in range(3))
    text = f"{what}, nt {plan.nt}, {plan.stages} stages, cluster {plan.cluster}"
    text += ("*" if chosen else "") + ("" if again else " DIFFERS")
    note(text, shape, chain(*(lambda w=w: call(w) for w in ws)), error)


def gated(rows: int) -> None:
    """Gate and up with GeGLU: the library and gate_up_product.cu."""
    for eight in (True, False):
        make = gate_up.make_plan
        plans = [None, make(eight, 192, cluster=1), *(make(eight, nt) for nt in (136, 168, 192, 200))]
        guarded(gate_up_own, rows, eight, plans)
        if not ONLY_OWN:
            guarded(gate_up_library, rows, eight)
        guarded(gate_up_own, rows, eight, [None])


def vision_layer(rows: int) -> None:
    """The four products of a vision layer in bf16 and FP8, GELU with FP8 output, the norm."""
    features = 4352  # 4304, and zeros up to whole lines (projection.padded_between)
    for name, n, k in (("qkv", 3456, 1152), ("out", 1152, 1152), ("fc1", features, 1152), ("fc2", 1152, features)):
        if not ONLY_OWN:
            guarded(vision_product, rows, name, n, k)
            if features in (n, k):
                guarded(vision_product, rows, name, min(n, 4304), min(k, 4304))
        for dtype in (BF16, FP8):
            guarded(own_product, rows, name, n, k, dtype)
    guarded(own_attention, rows)
    y = torch.randn(rows, 4304, device=DEVICE, dtype=BF16)
    out = torch.empty(y.shape, device=DEVICE, dtype=FP8)
    expected = torch.empty_like(out)
    norm.gelu_quantise_reference(y, expected, 0.02)
    norm.gelu_quantise(y, out, 0.02)
    error = relative(out, expected)
    note("vision GELU to FP8", f"{rows}x4304", chain(lambda: norm.gelu_quantise(y, out, 0.02, pdl=True)), error)
    x, h = torch.zeros(rows, 1152, device=DEVICE), torch.empty(rows, 1152, device=DEVICE, dtype=FP8)
    vector, addend = torch.randn(1152, device=DEVICE), torch.randn(rows, 1152, device=DEVICE, dtype=BF16)
    note("vision add + LayerNorm to FP8", f"{rows}x1152", chain(
        lambda: norm.add_norm(x, h, vector, shift=vector, addend=addend, bias=vector, layer_norm=True, pdl=True)
    ))  # fmt: skip


def prefix(rows: int) -> None:
    """The prefix's products in FP8 at a bucket's rows and at rows that tiles divide; norm and RoPE."""
    for name, n, k in (("qkv", 2560, 2048), ("o", 2048, 2048), ("gate_up", 32768, 2048), ("down", 2048, 16384)):
        for m in (rows, -(-rows // 64) * 64, -(-rows // 128) * 128):
            guarded(prefix_product, m, name, n, k)
    x, h = torch.zeros(rows, 2048, device=DEVICE), torch.empty(rows, 2048, device=DEVICE, dtype=FP8)
    vector, addend = torch.randn(2048, device=DEVICE), torch.randn(rows, 2048, device=DEVICE, dtype=BF16)
    scale, out_scale = torch.ones(rows, device=DEVICE), torch.empty(rows, device=DEVICE)
    note("prefix add + RMSNorm to FP8", f"{rows}x2048", chain(
        lambda: norm.add_norm(x, h, vector, addend=addend, row_scale=scale, out_scale=out_scale, pdl=True)
    ))  # fmt: skip
    product = torch.randn(rows, 2560, device=DEVICE, dtype=BF16)
    q, cache = (
        torch.empty(rows, 8, 256, device=DEVICE, dtype=BF16),
        torch.empty(2, rows, 1, 256, device=DEVICE, dtype=BF16),
    )
    tables = qkv.rope_tables(rows, 256, DEVICE)
    note("prefix RoPE and split", f"{rows}x2560", chain(
        lambda: qkv.rope_split(product, q, cache[0], cache[1], tables, None, row_scale=scale, pdl=True)
    ))  # fmt: skip


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="attention,geglu,gate_up,vision,prefix,projections,down")
    parser.add_argument("--only-own", action="store_true", help="leave the library's and Triton's out")
    args = parser.parse_args()
    torch.manual_seed(0)
    parts = args.parts.split(",")
    with torch.inference_mode():
        for rows, patches, capacity in ((560, 512, 762), (968, 768, 1018)):
            if "attention" in parts:
                guarded(check_attention, rows, capacity)
                guarded(time_attention, rows, capacity)
            for name, call, size in (
                ("geglu", geglu, rows),
                ("gate_up", gated, rows),
                ("vision", vision_layer, patches),
                ("prefix", prefix, rows),
                ("projections", projections, rows),
            ):
                if name in parts:
                    guarded(call, size)
        if "down" in parts:
            for rows in GRAPH_ROWS:
                products(rows)
            prefixes()
    if args.out and ROWS:
        write(args.out / "prefix_stages.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
