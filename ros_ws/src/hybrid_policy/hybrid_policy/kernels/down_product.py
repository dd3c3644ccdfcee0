"""A product of a few hundred rows with a long K on Hopper, bf16 or FP8: host side of down_product.cu."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.hopper_product import product_instruction, product_source
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources, multiprocessors
from hybrid_policy.kernels.tensor_map import tensor_map

SOURCES = kernel_sources("wgmma_common", "down_product")
THREADS = 288
#: features of a block's tile; bytes of shared memory of a block on compute capability 9.0
FEATURES = 128
SHARED = 232448
#: the most tokens whose sums a thread's registers hold
MOST_TOKENS = 248
#: > 0: a wait gives up after so many polls, with wrong results instead of none (tests)
SPIN_LIMIT = 0
_TYPES = (torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class DownPlan:
    """A launch of down_product.cu.

    Attributes:
        nt: tokens of a tile, a multiple of 8.
        stages: of 128 bytes of K in flight.
        ahead: stages of W that are asked for before the kernel in front has ended.
    """

    nt: int
    stages: int
    ahead: int = 3

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.stages * (_stage_bytes(self.nt) + 16) + 72

    def pairs(self, m: int, n: int) -> int:
        """Pairs of blocks for an [M, N]."""
        return math.ceil(m / self.nt) * math.ceil(n / FEATURES)

    def macros(self, size: int, *, pdl: bool) -> dict[str, int]:
        """Of the source."""
        return {
            "SIZE": size, "NT": self.nt, "STAGES": self.stages, "AHEAD": self.ahead, "PDL": int(pdl), "SHARED": SHARED,
        }  # fmt: skip


def _stage_bytes(nt: int) -> int:
    return (FEATURES + nt) * 128


def make_plan(nt: int) -> DownPlan:
    """With four stages, or what there is memory for; five and six were slower, by 0.8 and 1.5 µs of 31."""
    return DownPlan(nt, min(4, (SHARED - 72) // (_stage_bytes(nt) + 16)))


def plan_down(m: int, n: int, processors: int = 132) -> DownPlan | None:
    """The launch for x [M, K] and W [N, K]: as many tiles as one wave of pairs has; None where that is too few."""
    tiles = processors // 2 // math.ceil(n / FEATURES)
    if tiles == 0 or m > tiles * MOST_TOKENS:
        return None
    return make_plan(max(24, math.ceil(m / tiles / 8) * 8))


#: bytes of an element -> the fewest rows of x from which on this is faster than the library with the prefix's W on an
#: H100, and the rows behind them at which it is not: those of the engine's graphs for one to three views were measured
MEASURED: dict[int, tuple[int, frozenset[int]]] = {1: (400, frozenset()), 2: (448, frozenset({560}))}


def pays_in_pairs(dtype: torch.dtype, m: int, n: int, k: int, processors: int = 132) -> bool:
    """Whether x [M, K] and W [N, K] are better taken here than by the library: where that was measured.

    The library's time jumps with the rows (FP8: 608 rows 42 µs, 816 rows 40), this one's does not (32, 38).
    """
    if dtype not in _TYPES or (n, k, processors) != (2048, 16384, 132) or plan_down(m, n) is None:
        return False
    first, slower = MEASURED[dtype.itemsize]
    return m >= first and m not in slower


def prelude(size: int, nt: int) -> str:
    """C++ of ``product`` onto the sums of all ``nt`` tokens, which lie in two halves, and onto either half."""
    own = nt // 16 * 4
    others = nt // 2 - own
    halves = sorted({others, own})
    names = [f"d[{i}]" for i in range(others)] + [f"e[{i}]" for i in range(own)]
    whole = f"void product(float (&d)[{others}], float (&e)[{own}], unsigned long long a, unsigned long long b)"
    return "\n".join([product_source(size, 2 * n) for n in halves] + [
        f"__device__ __forceinline__ {whole} {{\n{product_instruction(size, names)}\n}}\n"
    ])  # fmt: skip


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_ubyte * 128) for name in ("w", "x", "middle")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("tokens", "features", "token_tiles", "chunks")),
        ("scale", ctypes.c_float),
        ("pad", ctypes.c_ubyte * 36),  # to a multiple of 64
    ]


def fits(capability: tuple[int, int], n: int, k: int) -> bool:
    """Whether down_product.cu takes W [N, K] there: Hopper, whole 16-byte rows of FP8, eight stages in half of K."""
    return capability == (9, 0) and n % 8 == 0 and k % 16 == 0 and k >= 2048


@functools.cache
def _kernel(plan: DownPlan, size: int, pdl: bool, spin_limit: int, device: int) -> Kernel:
    return Kernel(
        SOURCES, "down_product", plan.macros(size, pdl=pdl) | {"SPIN_LIMIT": spin_limit}, threads=THREADS,
        shared=plan.shared, pdl=pdl, specific=True, prelude=prelude(size, plan.nt),
    )  # fmt: skip


def down_product(
    x: Tensor, weight: Tensor, scale: float = 1.0, *, pdl: bool = False, plan: DownPlan | None = None
) -> Tensor:
    """y = x W.T * scale, in bf16.

    Args:
        x: [M, K], weight: [N, K], both bfloat16 or both float8_e4m3fn, contiguous.
        plan: instead of `plan_down`'s.

    Returns:
        [M, N], bf16.

    Raises:
        InputError: shapes or dtypes that do not fit, or more tiles than one wave has.
    """
    (m, k), n = x.shape, weight.shape[0]
    whole = x.is_contiguous() and weight.is_contiguous()
    if weight.shape[1] != k or x.dtype != weight.dtype or x.dtype not in _TYPES or not whole or not fits((9, 0), n, k):
        got = (tuple(x.shape), x.dtype, tuple(weight.shape), weight.dtype)
        expected = "contiguous [M, K] and [N, K] of bf16 or float8_e4m3fn, N a multiple of 8, K of 16 and >= 2048"
        raise InputError.at("down_product", "x, weight", got, expected)
    plan = plan or plan_down(m, n, multiprocessors(x.device))
    if plan is None:
        raise InputError.at("down_product", "rows", m, "as many as one wave of tiles has (`plan_down`)")
    out = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    size = x.dtype.itemsize
    arguments = _Arguments(
        out=out.data_ptr(), tokens=m, features=n, token_tiles=math.ceil(m / plan.nt),
        chunks=math.ceil(k * size / 128), scale=scale,
    )  # fmt: skip
    ctypes.memmove(arguments.w, tensor_map(weight, FEATURES), 128)
    ctypes.memmove(arguments.x, tensor_map(x, plan.nt // 16 * 8), 128)
    ctypes.memmove(arguments.middle, tensor_map(x, 8), 128)
    kernel = _kernel(plan, size, pdl, SPIN_LIMIT, torch.cuda.current_device())
    kernel((2 * plan.pairs(m, n), 1), arguments)
    return out


def down_reference(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """The mathematics of `down_product`, in float64."""
    return x.double() @ weight.double().T * scale
