"""What sanitize.py launches of vision's and the prefix's kernels: small odd shapes of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hybrid_policy.kernels import (
    down_product,
    gate_up_product,
    hopper_product,
    norm_product,
    prefix_attention,
    qkv,
    qkv_product,
    vision_attention,
)

Outputs = dict[str, torch.Tensor]


def normal(*shape: int) -> torch.Tensor:
    """Gaussian, on the device."""
    return torch.randn(*shape, device="cuda")


def poison(*shape: int) -> torch.Tensor:
    """bf16 NaN."""
    return torch.full(shape, float("nan"), device="cuda", dtype=torch.bfloat16)


def vision() -> Outputs:
    """vision_attention: one and two tiles a block, clusters and none, head dimensions with and without a rest of eight
    columns, both outputs."""
    outs: Outputs = {}
    for tokens, heads, head_dim, views in ((256, 2, 72, 1), (256, 2, 72, 100), (64, 2, 64, 1), (192, 1, 40, 1)):
        stacked = normal(tokens, 3 * heads * head_dim).bfloat16()
        plan = vision_attention.plan_attention(views, 16, tokens, head_dim)
        for scale in (None, 0.02):
            name = f"{tokens} x {head_dim}, {plan.tiles} tiles, {'bf16' if scale is None else 'FP8'}"
            pdl = scale is not None
            outs[name] = vision_attention.vision_attention(stacked, heads, tokens, scale, pdl=pdl, plan=plan)
    return outs


def product() -> Outputs:
    """hopper_product: both formats, all epilogues, every cluster; rings that turn over; ragged rows and columns."""
    outs: Outputs = {}
    m, n = 150, 136
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        k = 5 * 128 // dtype.itemsize + 16
        x, w, bias = normal(m, k).to(dtype), normal(n, k).to(dtype), normal(n).bfloat16()
        for cm, cn in ((1, 1), (1, 2), (2, 1), (2, 2)):
            plan = hopper_product.ProductPlan(32 if cm == 1 else 64, cm, cn, 3)
            for gelu, scale in ((False, None), (True, None), (True, 0.02)):
                out = hopper_product.hopper_product(
                    x, w, bias=bias if gelu else None, gelu=gelu, out_scale=scale, plan=plan, pdl=gelu
                )
                outs[f"{dtype}, {cm}x{cn}, gelu {gelu}, {out.dtype}"] = out
    return outs


def normed() -> Outputs:
    """norm_product: a ring that turns over and a single stage, ragged rows."""
    outs: Outputs = {}
    n, eight = 256, torch.float8_e4m3fn
    for m, k in ((70, 8 * 128 + 16), (150, 64)):
        for pdl in (False, True):
            a, w, bias, x = normal(m, k).to(eight), normal(n, k).to(eight), normal(n), normal(m, n)
            h = norm_product.norm_product(a, w, 1.0, x, (normal(n), bias), bias, pdl=pdl)
            outs |= {f"{m} x {k}, pdl {pdl}": h, f"{m} x {k}, pdl {pdl}, x": x}
    return outs


def prefix() -> Outputs:
    """prefix_attention: tiles that turn over, ranks with one tile more than others and with none, a ragged row tile."""
    outs: Outputs = {}
    capacity = 330
    for tokens, heads, valid_keys, clusters in ((17, 8, 311, (1, 2, 3)), (5, 4, 3, (3,))):
        q, k, v = normal(tokens, heads, 256), normal(capacity, 1, 256), normal(capacity, 1, 256)
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        valid = torch.tensor([valid_keys], dtype=torch.int32, device="cuda")
        for cluster in clusters:
            call = prefix_attention.PrefixAttention(
                tokens, heads, capacity, q.device, cluster=cluster, pdl=cluster == 2
            )
            out, scale = poison(tokens, heads, 256), torch.full((tokens,), float("nan"), device="cuda")
            eight = torch.empty(out.shape, device="cuda", dtype=torch.float8_e4m3fn)
            call(q, k, v, valid, 0, out)
            call(q, k, v, valid, 0, eight, out_scale=scale)
            outs |= {f"{heads} heads, {cluster}": out, f"{heads} heads, {cluster}, FP8": eight}
            outs[f"{heads} heads, {cluster}, scale"] = scale
    return outs


def projected() -> Outputs:
    """qkv_product: both formats and caches, rings that turn over, ragged tokens."""
    outs: Outputs = {}
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        m, k = 53, 5 * 128 // dtype.itemsize + 16
        for heads, cache in ((2, torch.bfloat16), (0, torch.float8_e4m3fn)):
            x, w = normal(m, k).to(dtype), normal((heads + 2) * 256, k).to(dtype)
            tables, start = qkv.rope_tables(60, 256, "cuda"), torch.full((1,), 4, dtype=torch.int32, device="cuda")
            for nt in (24, 40):
                keys, values = torch.zeros(2, 60, 1, 256, device="cuda").to(cache)
                q, scale = poison(m, heads, 256), torch.rand(m, device="cuda")
                options = {"row_scale": scale, "scale": 0.1, "pdl": nt == 24, "plan": qkv_product.QkvPlan(nt, 3)}
                qkv_product.qkv_product(x, w, q, keys, values, tables, start, **options)
                name = f"{dtype}, {heads} heads, {nt}"
                outs |= {f"{name}, q": q, f"{name}, k": keys, f"{name}, v": values}
    return outs


def gated() -> Outputs:
    """gate_up_product: both formats, rings that turn over, one piece of staging and two, ragged tokens and features."""
    outs: Outputs = {}
    for eight in (True, False):
        dtype = torch.float8_e4m3fn if eight else torch.bfloat16
        for m, features, k, nt in ((37, 16, 144, 40), (70, 400, 400, 72), (150, 272, 784, 144)):
            x, w = normal(m, k).to(dtype), normal(2 * features, k).to(dtype)
            scales = {}
            if eight:
                squares = x.float().square().sum(1)
                scales = {"row_scale": torch.ones(m, device="cuda"), "squares": squares, "out_scale": squares.clone()}
            for cluster in (1, 2):
                plan = gate_up_product.make_plan(eight, nt, cluster=cluster)
                name = f"{dtype}, {m} x {features} x {k}, cluster {cluster}"
                outs[name] = gate_up_product.gate_up_product(x, w, **scales, pdl=cluster == 2, plan=plan)
    return outs


def paired() -> Outputs:
    """down_product: both formats, even and odd eights of tokens, ragged tokens, features and K."""
    outs: Outputs = {}
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for m, n, k, nt in ((53, 136, 2064, 24), (70, 256, 2608, 72)):
            x, w = normal(m, k).to(dtype), normal(n, k).to(dtype)
            plan = down_product.make_plan(nt)
            outs[f"{dtype}, {m} x {n} x {k}"] = down_product.down_product(x, w, pdl=nt == 24, plan=plan)
    return outs


STAGES: dict[str, Callable[[], Outputs]] = {
    "gated": gated, "normed": normed, "vision": vision, "prefix_attention": prefix, "product": product,
    "projected": projected, "paired": paired,
}  # fmt: skip
