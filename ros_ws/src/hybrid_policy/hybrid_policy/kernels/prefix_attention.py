"""Attention of many tokens over the cache on Hopper: host side of prefix_attention.cu."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources

SOURCES = kernel_sources("expert_common", "prefix_attention")
THREADS = 256
HEAD_DIM = 256
#: rows (tokens x heads) of a block
TILE_ROWS = 128
#: queries, two tiles of keys, two of values, the rows' statistics, and what alignment to 1024 bytes may take
SHARED = 6 * 32768 + TILE_ROWS * 8 + 1024


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "valid", "out", "out_scale")),
        ("tokens", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
    ]


def fits(capability: tuple[int, int], heads: int, kv_heads: int, head_dim: int, cache: torch.dtype) -> bool:
    """Whether prefix_attention.cu takes these: Hopper (wgmma), one key/value head, a bf16 cache."""
    return (
        capability == (9, 0)
        and head_dim == HEAD_DIM
        and kv_heads == 1
        and heads in (1, 2, 4, 8)
        and cache == torch.bfloat16
    )


def plan_cluster(rows: int, processors: int) -> int:
    """Blocks that share out the keys of 128 of ``rows`` rows: as many as there are multiprocessors for, at most 4.

    A block fills a multiprocessor; clusters of more than two leave some of a GPU's processing clusters' over.
    """
    tiles = math.ceil(rows / TILE_ROWS)
    return max((c for c in (1, 2, 3, 4) if tiles * c <= processors * (1.0 if c <= 2 else 0.9)), default=1)


class PrefixAttention:
    """One shape of attention; called like `attention.Attention`, and can leave FP8 with a scale a token.

    rows: tokens. capacity: rows of the cache. pdl: launches may start before their predecessor ends.
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        capacity: int,
        device: torch.device,
        *,
        pdl: bool = False,
        cluster: int | None = None,
    ) -> None:
        self.shape = (rows, heads, HEAD_DIM)
        self.capacity = capacity
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.cluster = cluster or plan_cluster(rows * heads, processors)
        self._pdl = pdl
        self._kernels: dict[bool, Kernel] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor,
        extra: int,
        out: Tensor,
        *,
        out_scale: Tensor | None = None,
    ) -> None:
        """softmax(q kᵀ / 16) v over the first ``valid`` rows of the cache.

        Args:
            q: bf16 [rows, heads, 256]. k, v: bf16 [capacity, 1, 256]. valid: int32 [1] on the device.
            extra: 0; here so that the call is that of `attention.Attention`.
            out: bf16 like ``q``, or float8_e4m3fn with ``out_scale``.
            out_scale: float32 [rows], receives amax / 448 of each token.

        Raises:
            InputError: shapes or dtypes that do not fit.
        """
        rows, heads, _ = self.shape
        quantise = out_scale is not None
        cache = (self.capacity, 1, HEAD_DIM)
        wanted = {
            "q": (q, self.shape, torch.bfloat16),
            "k": (k, cache, torch.bfloat16),
            "v": (v, cache, torch.bfloat16),
            "out": (out, self.shape, torch.float8_e4m3fn if quantise else torch.bfloat16),
        }
        for name, (tensor, shape, dtype) in wanted.items():
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                got = (tuple(tensor.shape), tensor.dtype)
                raise InputError.at("prefix_attention", name, got, f"contiguous {list(shape)} {dtype}")
        if extra != 0:
            raise InputError.at("prefix_attention", "extra", extra, "0")
        if quantise not in self._kernels:
            macros = {"GROUP": heads, "CLUSTER": self.cluster, "QUANTISE": int(quantise), "PDL": int(self._pdl)}
            self._kernels[quantise] = Kernel(
                SOURCES, "prefix_attention", macros, threads=THREADS, shared=SHARED, pdl=self._pdl, specific=True
            )
        arguments = _Arguments(
            q=q.data_ptr(),
            keys=k.data_ptr(),
            values=v.data_ptr(),
            valid=valid.data_ptr(),
            out=out.data_ptr(),
            out_scale=out_scale.data_ptr() if out_scale is not None else None,
            tokens=rows,
            scale_log2=HEAD_DIM**-0.5 * math.log2(math.e),
        )
        tiles = math.ceil(rows * heads / TILE_ROWS)
        self._kernels[quantise]((tiles * self.cluster, 1), arguments)
