"""The products around the prefix's attention: q, k, v with RoPE and the output, by the library and in own launches.

Run by ``prefix_stages.py --parts projections``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hybrid_policy.kernels import hopper_product as hopper
from hybrid_policy.kernels import norm
from hybrid_policy.kernels import qkv as rope
from hybrid_policy.kernels import qkv_product as fused
from hybrid_policy.kernels.prefix_attention import PrefixAttention
from stage_rows import chain, guarded, layers, note, relative

DEVICE = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
WIDTH, HEAD_DIM = 2048, 256


def weights(n: int, eight: bool, count: int) -> tuple[list[torch.Tensor], float]:
    """``count`` of [N, 2048], and their scale."""
    dense = (torch.randn(n, WIDTH, device=DEVICE) for _ in range(count))
    if eight:
        return [(w * 32).to(FP8) for w in dense], WIDTH**-0.5 / 32
    return [(w * WIDTH**-0.5).to(BF16) for w in dense], 1.0


def library(x: torch.Tensor, w: torch.Tensor, one: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The library's product, as the engine calls it."""
    if x.dtype == BF16:
        return F.linear(x, w)
    return torch._scaled_mm(x, w.t(), one, factor, out_dtype=BF16, use_fast_accum=True)


@dataclass
class Qkv:
    """Inputs and places of one projection to ``heads`` queries, a key and a value; weights of several layers."""

    rows: int
    heads: int
    eight: bool

    def __post_init__(self) -> None:
        n = (self.heads + 2) * HEAD_DIM
        x = torch.randn(self.rows, WIDTH, device=DEVICE)
        self.x = (x * 32).to(FP8) if self.eight else x.to(BF16)
        self.row_scale = torch.rand(self.rows, device=DEVICE).add(0.5).div(32) if self.eight else None
        self.w, self.scale = weights(n, self.eight, layers(n * WIDTH * (1 if self.eight else 2)))
        self.one, self.factor = (torch.full((), value, device=DEVICE) for value in (1.0, self.scale))
        self.tables = rope.rope_tables(self.rows + 50, HEAD_DIM, DEVICE)
        self.shape = f"{self.rows}x{n}x{WIDTH}"
        self.places = self.new_places(BF16)
        places = self.new_places(torch.float32)
        options = {"row_scale": self.row_scale, "scale": self.scale}
        fused.qkv_product_reference(self.x, self.w[0], *places, self.tables, None, **options)
        self.expected = self.filled(places)

    def new_places(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """q, and caches with more rows than are filled; NaN."""
        shapes = [(self.rows, self.heads, HEAD_DIM), *[(self.rows + 50, 1, HEAD_DIM)] * 2]
        return tuple(torch.full(shape, float("nan"), device=DEVICE, dtype=dtype) for shape in shapes)

    def filled(self, places: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What a call writes, as one vector."""
        return torch.cat([part[: self.rows].flatten() for part in places])

    def by_library(self, w: torch.Tensor) -> None:
        """Two launches."""
        product = library(self.x, w, self.one, self.factor)
        rope.rope_split(product, *self.places, self.tables, None, row_scale=self.row_scale, pdl=True)

    def own(self, w: torch.Tensor, plan: fused.QkvPlan) -> None:
        """One."""
        fused.qkv_product(
            self.x, w, *self.places, self.tables, None, row_scale=self.row_scale, scale=self.scale, pdl=True, plan=plan
        )

    def time(self, what: str, call) -> None:
        """Check, then time."""
        results = []
        for _ in range(4):
            for part in self.places:
                part.fill_(float("nan"))
            call(self.w[0])
            results.append(self.filled(self.places))
        error = relative(results[0], self.expected)
        what += "" if all(torch.equal(results[0], again) for again in results[1:]) else " DIFFERS"
        note(what, self.shape, chain(*(lambda w=w: call(w) for w in self.w), launches=len(self.w)), error)


def qkv(rows: int, heads: int, eight: bool) -> None:
    """The library's product and RoPE behind it, then one launch by several plans, then the library's again."""
    case, kind = Qkv(rows, heads, eight), "FP8" if eight else "bf16"
    guarded(case.time, f"qkv {kind}, library + RoPE", case.by_library)
    k_bytes = WIDTH * (1 if eight else 2)
    chosen = fused.plan_qkv_product(rows, (heads + 2) * HEAD_DIM, k_bytes)
    clusters = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4)) if heads else ((1, 1),)
    plans = [chosen, *(fused.make_plan(chosen.nt, *cluster, k_bytes) for cluster in clusters)]
    plans.append(fused.QkvPlan(chosen.nt, chosen.ct, chosen.cf, 4))
    if heads and rows > 900:  # two waves
        plans.append(fused.make_plan(80, chosen.ct, chosen.cf, k_bytes))
    for plan in dict.fromkeys(plans):
        text = f"qkv {kind}, one launch, {plan.nt}, {plan.ct}x{plan.cf}, {plan.stages} stages"
        guarded(case.time, text + ("*" if plan == chosen else ""), lambda w, p=plan: case.own(w, p))
    guarded(case.time, f"qkv {kind}, library + RoPE, again", case.by_library)


def output(rows: int, eight: bool) -> None:
    """The product behind attention: the library's and hopper_product.cu by several plans."""
    size, kind = 1 if eight else 2, "FP8" if eight else "bf16"
    x = torch.randn(rows, WIDTH, device=DEVICE).to(FP8 if eight else BF16)
    ws, scale = weights(WIDTH, eight, layers(WIDTH * WIDTH * size))
    one, factor = (torch.full((), value, device=DEVICE) for value in (1.0, scale))
    expected = x.double() @ ws[0].double().T * scale

    def time(what: str, call) -> None:
        error = relative(call(ws[0]), expected)
        note(what, f"{rows}x{WIDTH}x{WIDTH}", chain(*(lambda w=w: call(w) for w in ws), launches=len(ws)), error)

    guarded(time, f"o {kind}, library", lambda w: library(x, w, one, factor))
    chosen = hopper.plan_product(rows, WIDTH, WIDTH, size)
    tiles = ((80, 1, 1), (80, 1, 2), (104, 1, 2), (96, 2, 1), (128, 2, 2))
    if rows > 640:
        tiles = ((128, 1, 1), (128, 1, 2), (128, 2, 1), (160, 2, 2))
    plans = [chosen, *(hopper.make_plan(*tile, WIDTH * size) for tile in tiles)]
    for plan in dict.fromkeys(plans):
        text = f"o {kind}, wgmma {plan.nt}, {plan.cm}x{plan.cn}, {plan.stages} stages" + ("*" if plan == chosen else "")
        guarded(time, text, lambda w, p=plan: hopper.hopper_product(x, w, scale, pdl=True, plan=p))


class Block:
    """Norm, q, k, v, attention and output of several layers, one after the other as in the engine."""

    def __init__(self, rows: int, eight: bool) -> None:
        self.rows, self.eight = rows, eight
        self.count = layers(2 * WIDTH * WIDTH * (1 if eight else 2))
        (self.qkv, self.scale), (self.out, _) = (weights(n, eight, self.count) for n in (2560, WIDTH))
        self.one, self.factor = (torch.full((), value, device=DEVICE) for value in (1.0, self.scale))
        capacity = rows + 50
        self.keys, self.values = torch.zeros(2, capacity, 1, HEAD_DIM, device=DEVICE, dtype=BF16)
        self.tables = rope.rope_tables(capacity, HEAD_DIM, DEVICE)
        self.valid = torch.full((1,), rows, dtype=torch.int32, device=DEVICE)
        self.attention = PrefixAttention(rows, 8, capacity, DEVICE, pdl=True)
        self.vector = torch.ones(WIDTH, device=DEVICE)
        self.begin = torch.randn(rows, WIDTH, device=DEVICE)
        self.x = self.begin.clone()
        # what the first layer adds; the others add what the one before gave
        self.first = torch.zeros(rows, WIDTH, device=DEVICE, dtype=BF16), torch.ones(rows, device=DEVICE)
        self.before: tuple[torch.Tensor, torch.Tensor | None] = self.first

    def reset(self) -> None:
        """The residual stream as it was at first."""
        self.x.copy_(self.begin)

    def layer(self, i: int, own_qkv: bool, own_out: bool) -> torch.Tensor:
        """One layer; what its output product gives."""
        h = torch.empty(self.rows, WIDTH, device=DEVICE, dtype=FP8 if self.eight else BF16)
        scale, seen_scale = torch.empty(2, self.rows, device=DEVICE) if self.eight else (None, None)
        addend, row_scale = self.first if i == 0 else self.before
        norm.add_norm(self.x, h, self.vector, addend=addend, row_scale=row_scale, out_scale=scale, pdl=True)
        q = torch.empty(self.rows, 8, HEAD_DIM, device=DEVICE, dtype=BF16)
        places = (q, self.keys, self.values, self.tables, None)
        if own_qkv:
            fused.qkv_product(h, self.qkv[i], *places, row_scale=scale, scale=self.scale, pdl=True)
        else:
            rope.rope_split(library(h, self.qkv[i], self.one, self.factor), *places, row_scale=scale, pdl=True)
        seen = torch.empty(q.shape, device=DEVICE, dtype=h.dtype)
        self.attention(q, self.keys, self.values, self.valid, 0, seen, out_scale=seen_scale)
        rows, w = seen.flatten(1), self.out[i]
        if own_out:
            product = hopper.hopper_product(rows, w, self.scale, pdl=True)
        else:
            product = library(rows, w, self.one, self.factor)
        self.before = product, seen_scale
        return product


def block(rows: int, eight: bool) -> None:
    """Norm to output, each of the four ways; the error is against the library's."""
    case, kind = Block(rows, eight), "FP8" if eight else "bf16"
    expected = case.layer(0, False, False).clone()
    for own_qkv, own_out in ((False, False), (True, False), (False, True), (True, True), (False, False)):
        case.reset()
        error = relative(case.layer(0, own_qkv, own_out), expected)
        case.reset()
        calls = [lambda i=i, q=own_qkv, o=own_out: case.layer(i, q, o) for i in range(case.count)]
        text = f"norm to o {kind}, qkv {'own' if own_qkv else 'library'}, o {'own' if own_out else 'library'}"
        note(text, f"{rows}x{WIDTH}", chain(*calls, launches=case.count), error)


def projections(rows: int) -> None:
    """All of them, the engine's sequence first."""
    for eight in (True, False):
        guarded(block, rows, eight)
    for eight in (True, False):
        for heads in (8, 0):
            guarded(qkv, rows, heads, eight)
        guarded(output, rows, eight)
