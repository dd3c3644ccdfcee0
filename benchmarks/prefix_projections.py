"""The prefix's queries, keys and values with RoPE: by the library and a pass behind it, and in one launch.

Run by ``prefix_stages.py --parts projections``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hybrid_policy.kernels import norm
from hybrid_policy.kernels import qkv as rope
from hybrid_policy.kernels import qkv_product as fused
from hybrid_policy.kernels.prefix_attention import PrefixAttention
from stage_rows import chain, guarded, layers, note, relative

DEVICE = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
WIDTH, HEAD_DIM = 2048, 256


def weights(n: int, eight: bool) -> tuple[list[torch.Tensor], float]:
    """[N, 2048] of several layers, and their scale."""
    dense = (torch.randn(n, WIDTH, device=DEVICE) for _ in range(layers(n * WIDTH * (1 if eight else 2))))
    if eight:
        return [(w * 32).to(FP8) for w in dense], WIDTH**-0.5 / 32
    return [(w * WIDTH**-0.5).to(BF16) for w in dense], 1.0


def library(x: torch.Tensor, w: torch.Tensor, one: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The library's product, as the engine calls it."""
    if x.dtype == BF16:
        return F.linear(x, w)
    return torch._scaled_mm(x, w.t(), one, factor, out_dtype=BF16, use_fast_accum=True)


def qkv(rows: int, heads: int, eight: bool) -> None:
    """The library's product and RoPE behind it, one launch, and the library's again; ``heads`` queries, k and v."""
    n = (heads + 2) * HEAD_DIM
    x = torch.randn(rows, WIDTH, device=DEVICE)
    x = (x * 32).to(FP8) if eight else x.to(BF16)
    row_scale = torch.rand(rows, device=DEVICE).add(0.5).div(32) if eight else None
    ws, scale = weights(n, eight)
    one, factor = (torch.full((), value, device=DEVICE) for value in (1.0, scale))
    tables = rope.rope_tables(rows, HEAD_DIM, DEVICE)

    def new_places(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full((rows, h, HEAD_DIM), float("nan"), device=DEVICE, dtype=dtype) for h in (heads, 1, 1))

    def by_library(w: torch.Tensor) -> None:
        rope.rope_split(library(x, w, one, factor), *places, tables, None, row_scale=row_scale, pdl=True)

    def own(w: torch.Tensor) -> None:
        fused.qkv_product(x, w, *places, tables, None, row_scale=row_scale, scale=scale, pdl=True)

    exact = new_places(torch.float32)
    fused.qkv_product_reference(x, ws[0], *exact, tables, None, row_scale=row_scale, scale=scale)
    for what, call in (("library + RoPE", by_library), ("one launch", own), ("library + RoPE, again", by_library)):
        places = new_places(BF16)
        call(ws[0])
        error = relative(*(torch.cat([part.flatten() for part in each]) for each in (places, exact)))
        text = f"qkv {'FP8' if eight else 'bf16'}, {what}"
        note(text, f"{rows}x{n}x{WIDTH}", chain(*(lambda w=w, c=call: c(w) for w in ws), launches=len(ws)), error)


class Block:
    """Norm, q, k, v, attention and output of several layers, one after the other as in the engine."""

    def __init__(self, rows: int, eight: bool) -> None:
        self.rows, self.eight = rows, eight
        (self.qkv, self.scale), (self.out, _) = weights(2560, eight), weights(WIDTH, eight)
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

    def layer(self, i: int, own: bool) -> torch.Tensor:
        """One layer; what its output product gives."""
        h = torch.empty(self.rows, WIDTH, device=DEVICE, dtype=FP8 if self.eight else BF16)
        scale, seen_scale = torch.empty(2, self.rows, device=DEVICE) if self.eight else (None, None)
        addend, row_scale = self.first if i == 0 else self.before
        norm.add_norm(self.x, h, self.vector, addend=addend, row_scale=row_scale, out_scale=scale, pdl=True)
        q = torch.empty(self.rows, 8, HEAD_DIM, device=DEVICE, dtype=BF16)
        places = (q, self.keys, self.values, self.tables, None)
        if own:
            fused.qkv_product(h, self.qkv[i], *places, row_scale=scale, scale=self.scale, pdl=True)
        else:
            rope.rope_split(library(h, self.qkv[i], self.one, self.factor), *places, row_scale=scale, pdl=True)
        seen = torch.empty(q.shape, device=DEVICE, dtype=h.dtype)
        self.attention(q, self.keys, self.values, self.valid, 0, seen, out_scale=seen_scale)
        product = library(seen.flatten(1), self.out[i], self.one, self.factor)
        self.before = product, seen_scale
        return product


def block(rows: int, eight: bool) -> None:
    """Norm to output, both ways; the error is against the library's."""
    case, kind = Block(rows, eight), "FP8" if eight else "bf16"
    expected = case.layer(0, False).clone()
    for own in (False, True, False):
        case.x.copy_(case.begin)
        error = relative(case.layer(0, own), expected)
        case.x.copy_(case.begin)
        calls = [lambda i=i, own=own: case.layer(i, own) for i in range(min(len(case.qkv), len(case.out)))]
        text = f"norm to o {kind}, qkv {'own' if own else 'library'}"
        note(text, f"{rows}x{WIDTH}", chain(*calls, launches=len(calls)), error)


def projections(rows: int) -> None:
    """All of them, the engine's sequence first."""
    for eight in (True, False):
        guarded(block, rows, eight)
    for eight in (True, False):
        for heads in (8, 0):
            guarded(qkv, rows, heads, eight)
