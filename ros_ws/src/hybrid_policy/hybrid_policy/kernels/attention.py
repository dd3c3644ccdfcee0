"""Attention of grouped query heads over a cache whose valid length lives on the device.

The cache of a layer holds the prefix's keys and values from row 0 and, right behind the valid ones, those of
the action tokens; so the keys that count are the first ``valid + extra`` rows, whatever the prompt's length,
and one captured launch serves every prompt. Query heads that share a key/value head are laid out as rows of
one matrix: with one key/value head (Gemma) the queries [M, heads, head_dim] are that matrix as they lie.

Few rows against many keys (the action tokens) are split over the keys; the last program of a row block adds
the parts up in a fixed order, so that replays are bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.norm import pdl_option


def attention_reference(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, extra: int, out: Tensor, scale: float) -> None:
    """The mathematics of `attention`; reads ``valid`` on the device only, as the kernel does."""
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    keys = torch.arange(k.shape[0], device=k.device) < valid + extra
    folded = q.float().view(rows, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("mkgd,nkd->kgmn", folded, k.float()) * scale
    probabilities = scores.masked_fill(~keys, float("-inf")).softmax(-1)
    values = v.float().masked_fill(~keys[:, None, None], 0.0)  # rows behind the valid ones may hold anything
    out.copy_(torch.einsum("kgmn,nkd->mkgd", probabilities, values).reshape(out.shape))


@dataclass(frozen=True)
class AttentionPlan:
    """Tile sizes: rows and keys of a tile, and over how many programs the keys of a row block are split."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int


def plan_attention(rows: int, keys: int, head_dim: int, processors: int = 132) -> AttentionPlan:
    """Tiles for ``rows`` query rows (tokens × heads of a group) against at most ``keys`` keys.

    Many rows: 64-row tiles, no split; with long heads 32 keys (560 rows on an H100: 19.1 µs, against 24.1 with 64).
    Few rows: 16-row tiles, split until the device is full, but no split shorter than 64 keys: below that the partial
    results cost more than the keys.
    """
    if rows >= 1024:
        return AttentionPlan(64, 32, 1, 4, 3) if head_dim > 128 else AttentionPlan(64, 64, 1, 4, 2)
    blocks = triton.cdiv(rows, 16)
    splits = max(1, min(processors // blocks, triton.cdiv(keys, 64), 16))
    return AttentionPlan(16, 64, splits, 4, 2)


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, stat_ptr, count_ptr, valid_ptr,
    rows, extra, scale_log2,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    split = tl.program_id(1)
    kv_head = tl.program_id(2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, PADDED)
    inside_d = d < HEAD_DIM
    inside_r = r < rows
    # row r is token r // GROUP, head kv_head * GROUP + r % GROUP
    row_offset = ((r // GROUP) * KV_HEADS + kv_head) * GROUP + r % GROUP
    q_mask = inside_r[:, None] & inside_d[None, :]
    q = tl.load(q_ptr + row_offset[:, None] * HEAD_DIM + d[None, :], mask=q_mask, other=0.0).to(COMPUTE)
    total = tl.load(valid_ptr) + extra
    share = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_N) * BLOCK_N
    start = split * share
    end = tl.minimum(start + share, total)
    # exact where tests compute in float32; bf16 operands do not look at it
    PRECISION: tl.constexpr = "ieee" if tl.float32 == COMPUTE else "tf32"
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        key = first + n
        mask = (key < end)[:, None] & inside_d[None, :]
        offset = (key[:, None] * KV_HEADS + kv_head) * HEAD_DIM + d[None, :]
        k = tl.load(k_ptr + offset, mask=mask, other=0.0).to(COMPUTE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where((key < end)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        correction = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        weight = weight * correction + tl.sum(p, 1)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(COMPUTE)
        acc = tl.dot(p.to(COMPUTE), v, acc * correction[:, None], input_precision=PRECISION)
        top = new_top
    out_offset = row_offset[:, None] * HEAD_DIM + d[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + out_offset, (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        # part_ptr [kv_heads, blocks, SPLITS, BLOCK_M, HEAD_DIM], stat_ptr [..., BLOCK_M, 2]
        base = ((kv_head * tl.num_programs(0) + block) * SPLITS).to(tl.int64)
        m = tl.arange(0, BLOCK_M)
        tile = m[:, None] * HEAD_DIM + d[None, :]
        tl.store(part_ptr + (base + split) * BLOCK_M * HEAD_DIM + tile, acc, mask=inside_d[None, :])
        tl.store(stat_ptr + (base + split) * BLOCK_M * 2 + m * 2, top)
        tl.store(stat_ptr + (base + split) * BLOCK_M * 2 + m * 2 + 1, weight)
        tl.debug_barrier()  # every thread's part is written before the count says so
        counter = count_ptr + kv_head * tl.num_programs(0) + block
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            best = tl.full([BLOCK_M], float("-inf"), tl.float32)
            for s in tl.static_range(SPLITS):
                best = tl.maximum(best, tl.load(stat_ptr + (base + s) * BLOCK_M * 2 + m * 2, cache_modifier=".cg"))
            sum_weight = tl.zeros([BLOCK_M], tl.float32)
            sum_acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
            for s in tl.static_range(SPLITS):
                stat = stat_ptr + (base + s) * BLOCK_M * 2 + m * 2
                factor = tl.exp2(tl.load(stat, cache_modifier=".cg") - best)
                sum_weight += factor * tl.load(stat + 1, cache_modifier=".cg")
                part = tl.load(
                    part_ptr + (base + s) * BLOCK_M * HEAD_DIM + tile,
                    mask=inside_d[None, :], other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                sum_acc += factor[:, None] * part
            result = sum_acc / sum_weight[:, None]
            tl.store(out_ptr + out_offset, result.to(out_ptr.dtype.element_ty), mask=q_mask)
            tl.store(counter, 0)  # ready for the next replay


class Attention:
    """One attention shape: its plan and the scratch that its splits need, allocated once.

    rows: tokens. heads, kv_heads, head_dim: of the model. capacity: rows of the cache.
    compute: the tensor core's input dtype (float32 under the interpreter).
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        device: torch.device | str,
        *,
        compute: torch.dtype = torch.bfloat16,
        plan: AttentionPlan | None = None,
    ) -> None:
        group = heads // kv_heads
        self.shape = (rows, heads, kv_heads, head_dim)
        self.capacity = capacity
        self.plan = plan or plan_attention(rows * group * kv_heads, capacity, head_dim)
        blocks = triton.cdiv(rows * group, self.plan.block_m)
        self._grid = (blocks, self.plan.splits, kv_heads)
        parts = kv_heads * blocks * self.plan.splits if self.plan.splits > 1 else 0
        self._part = torch.empty(parts * self.plan.block_m * head_dim, dtype=torch.float32, device=device)
        self._stat = torch.empty(parts * self.plan.block_m * 2, dtype=torch.float32, device=device)
        self._count = torch.zeros(kv_heads * blocks, dtype=torch.int32, device=device)
        self._compute = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[compute]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, extra: int, out: Tensor, *, pdl: bool = False
    ) -> None:
        """softmax(q kᵀ / sqrt(head_dim)) v over the first ``valid + extra`` rows of the cache.

        Args:
            q, out: [rows, heads, head_dim], contiguous.
            k, v: [capacity, kv_heads, head_dim], contiguous; bf16, or float8_e4m3fn.
            valid: int32 [1] on the device.

        Raises:
            InputError: shapes that do not fit.
        """
        rows, heads, kv_heads, head_dim = self.shape
        expected = {"q": (rows, heads, head_dim), "out": (rows, heads, head_dim)}
        expected |= dict.fromkeys(("k", "v"), (self.capacity, kv_heads, head_dim))
        for name, tensor in (("q", q), ("out", out), ("k", k), ("v", v)):
            if tuple(tensor.shape) != expected[name] or not tensor.is_contiguous():
                raise InputError.at("attention", name, tuple(tensor.shape), f"contiguous {list(expected[name])}")
        group = heads // kv_heads
        plan = self.plan
        _attention_kernel[self._grid](
            q, k, v, out, self._part, self._stat, self._count, valid,
            rows * group, extra, head_dim**-0.5 * 1.4426950408889634,
            GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PADDED=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, SPLITS=plan.splits, STAGES=plan.stages,
            COMPUTE=self._compute, PDL=pdl, num_warps=plan.warps, **pdl_option(pdl),
        )  # fmt: skip
