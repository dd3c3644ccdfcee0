"""Queries, keys and values with RoPE, each to its place, in one launch on Hopper: host side of qkv_product.cu."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.hopper_product import SHARED_LIMIT, product_source
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources, multiprocessors
from hybrid_policy.kernels.qkv import rope_split_reference
from hybrid_policy.kernels.tensor_map import halves_map, tensor_map

SOURCES = kernel_sources("wgmma_common", "qkv_product")
THREADS = 288
HEAD_DIM = 256
#: the most tokens whose sums and angles a thread's registers hold
MOST_TOKENS = 176
#: > 0: a wait gives up after so many polls, with wrong results instead of none (tests)
SPIN_LIMIT = 0
_TILE_ROWS = 128  # of W: 32 dims of both halves of two heads
_TYPES = (torch.bfloat16, torch.float8_e4m3fn)
_CACHES = (torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class QkvPlan:
    """Tokens of a tile, a multiple of 8; stages of 128 bytes of K in flight."""

    nt: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return self.stages * _stage_bytes(self.nt) + 1024

    def blocks(self, m: int, n: int) -> int:
        """For [M, N]; N is whole pairs of heads."""
        return math.ceil(m / self.nt) * (n // _TILE_ROWS)

    def macros(self, size: int, *, cache8: bool, pdl: bool) -> dict[str, int]:
        """Of the source."""
        return {"SIZE": size, "NT": self.nt, "STAGES": self.stages, "CACHE8": int(cache8), "PDL": int(pdl)}


def _stage_bytes(nt: int) -> int:
    return (_TILE_ROWS + nt) * 128


def make_plan(nt: int, k_bytes: int) -> QkvPlan:
    """As many stages as there is memory for, and use; the sums need the room of three."""
    return QkvPlan(nt, min(8, SHARED_LIMIT // _stage_bytes(nt), max(3, math.ceil(k_bytes / 128))))


def plan_qkv_product(m: int, n: int, k_bytes: int, processors: int = 132) -> QkvPlan:
    """The launch for x [M, K] and W [N, K] with ``k_bytes`` bytes of K.

    The fewest tokens a tile whose blocks take one turn (many rows: the fewest turns) on 120 of an H100's 132
    multiprocessors: so were the tiles of the prefix's shapes measured, up to 2560 features of 968 tokens.
    """
    features, room = n // _TILE_ROWS, processors * 10 // 11
    turns = next(t for t in itertools.count(1) if t * room // features * MOST_TOKENS >= m)
    return make_plan(math.ceil(m / (turns * room // features) / 8) * 8, k_bytes)


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_ubyte * 128) for name in ("x", "w")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "cosines", "sines", "start", "q", "k", "v")),
        *((name, ctypes.c_int) for name in ("rows", "heads", "kv_heads", "chunks")),
        ("scale", ctypes.c_float),
        ("pad", ctypes.c_ubyte * 52),  # to a multiple of 64
    ]


def fits(
    capability: tuple[int, int], heads: int, kv_heads: int, head_dim: int, k: int, cache: torch.dtype = torch.bfloat16
) -> bool:
    """Whether qkv_product.cu takes such heads there: Hopper, 256 dims, pairs of heads, whole sixteens of bytes."""
    whole = head_dim == HEAD_DIM and heads % 2 == 0 and kv_heads > 0 and k % 16 == 0
    return capability == (9, 0) and whole and cache in _CACHES


@functools.cache
def _kernel(plan: QkvPlan, size: int, cache8: bool, pdl: bool, spin_limit: int, device: int) -> Kernel:
    return Kernel(
        SOURCES, "qkv_product", plan.macros(size, cache8=cache8, pdl=pdl) | {"SPIN_LIMIT": spin_limit},
        threads=THREADS, shared=plan.shared, pdl=pdl, specific=True, prelude=product_source(size, plan.nt),
    )  # fmt: skip


def qkv_product(
    x: Tensor,
    weight: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: tuple[Tensor, Tensor],
    start: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    scale: float = 1.0,
    pdl: bool = False,
    plan: QkvPlan | None = None,
) -> None:
    """`qkv.rope_split` of x W.T * scale, which is never rounded or written.

    Args:
        x: [M, K], weight: [(heads + 2 * kv_heads) * 256, K], both bfloat16 or both float8_e4m3fn, contiguous.
        q: bf16 [M, heads, 256], contiguous; heads even, 0 for keys and values alone.
        k_cache, v_cache: [capacity, kv_heads, 256], contiguous, both bf16 or both float8_e4m3fn (saturating).
        tables: from `qkv.rope_tables`, for the whole capacity.
        start: int32 [1] on the device, position of the first row; None for 0.
        row_scale: float32 [M], factor of the rows of x.
        plan: instead of `plan_qkv_product`'s.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    (m, k), (_, heads, _), (capacity, kv_heads, _) = x.shape, q.shape, k_cache.shape
    n = (heads + 2 * kv_heads) * HEAD_DIM
    if x.dtype not in _TYPES or not fits((9, 0), heads, kv_heads, HEAD_DIM, k, k_cache.dtype):
        given = (tuple(x.shape), x.dtype, heads, kv_heads, k_cache.dtype)
        raise InputError.at("qkv_product", "x, heads, kv_heads, cache", given, "bf16 or float8_e4m3fn, pairs of heads")
    wanted = {
        "weight": (weight, (n, k), x.dtype),
        "x": (x, (m, k), x.dtype),
        "q": (q, (m, heads, HEAD_DIM), torch.bfloat16),
        "k_cache": (k_cache, (capacity, kv_heads, HEAD_DIM), k_cache.dtype),
        "v_cache": (v_cache, (capacity, kv_heads, HEAD_DIM), k_cache.dtype),
        "cosines": (tables[0], (capacity, HEAD_DIM // 2), torch.float32),
        "sines": (tables[1], (capacity, HEAD_DIM // 2), torch.float32),
        "start": (start, (1,), torch.int32),
        "row_scale": (row_scale, (m,), torch.float32),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            got = (tuple(tensor.shape), tensor.dtype)
            raise InputError.at("qkv_product", name, got, f"contiguous {list(shape)} {dtype}")
    if m > capacity:
        raise InputError.at("qkv_product", "rows", m, f"at most the caches' {capacity}")
    size = x.dtype.itemsize
    plan = plan or plan_qkv_product(m, n, k * size, multiprocessors(x.device))
    arguments = _Arguments(
        row_scale=None if row_scale is None else row_scale.data_ptr(),
        cosines=tables[0].data_ptr(), sines=tables[1].data_ptr(),
        start=None if start is None else start.data_ptr(),
        q=q.data_ptr(), k=k_cache.data_ptr(), v=v_cache.data_ptr(),
        rows=m, heads=heads, kv_heads=kv_heads, chunks=math.ceil(k * size / 128), scale=scale,
    )  # fmt: skip
    ctypes.memmove(arguments.x, tensor_map(x, plan.nt), 128)
    ctypes.memmove(arguments.w, halves_map(weight, HEAD_DIM), 128)
    eight = k_cache.dtype == torch.float8_e4m3fn
    kernel = _kernel(plan, size, eight, pdl, SPIN_LIMIT, torch.cuda.current_device())
    kernel((plan.blocks(m, n), 1), arguments)


def qkv_product_reference(
    x: Tensor,
    weight: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: tuple[Tensor, Tensor],
    start: Tensor | None,
    *,
    row_scale: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """The mathematics of `qkv_product`: the product in float64, then `qkv.rope_split_reference` in float32."""
    product = (x.double() @ weight.double().T * scale).float()
    rope_split_reference(product, q, k_cache, v_cache, tables, start, row_scale=row_scale)
