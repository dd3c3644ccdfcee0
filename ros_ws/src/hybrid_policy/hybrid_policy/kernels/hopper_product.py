"""Products of a few hundred rows on Hopper, bf16 or FP8: host side of hopper_product.cu."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources, multiprocessors
from hybrid_policy.kernels.tensor_map import tensor_map

SOURCES = kernel_sources("wgmma_common", "hopper_product")
THREADS = 288
ROWS = 128
#: shared memory of a block on compute capability 9.0, less what barriers, bias and alignment take
SHARED_LIMIT = 224 * 1024
_ALIGN = 1024
_TYPES = (torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class ProductPlan:
    """Columns of a tile, row and column tiles of a cluster (1 or 2 each), stages of 128 bytes of K in flight."""

    nt: int
    cm: int
    cn: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: the stages, or the sums that follow them in the same place."""
        return max(self.stages * _stage_bytes(self.nt), ROWS * (self.nt + 4) * 4) + 1024

    def blocks(self, m: int, n: int) -> int:
        """Of an [M, N], whole clusters."""
        rows, columns = math.ceil(m / ROWS), math.ceil(n / self.nt)
        return math.ceil(rows / self.cm) * math.ceil(columns / self.cn) * self.cm * self.cn


def _stage_bytes(nt: int) -> int:
    return ROWS * 128 + math.ceil(nt * 128 / _ALIGN) * _ALIGN


def make_plan(nt: int, cm: int, cn: int, k_bytes: int) -> ProductPlan:
    """As many stages as there is memory for, and use."""
    return ProductPlan(nt, cm, cn, min(8, SHARED_LIMIT // _stage_bytes(nt), max(2, math.ceil(k_bytes / 128))))


#: (bytes of an element, rows, columns, K) -> what was fastest in the whole vision stage of two and of three views, for
#: a GPU of 132 multiprocessors. bf16 products that are not here the library does faster, or they were not measured.
#: FP8's first product leaves shared memory over for the first blocks of attention behind it; none leaves enough for
#: two of its own blocks where another multiprocessor would have none.
MEASURED = {
    (1, 512, 3456, 1152): ProductPlan(112, 1, 1, 4),
    (1, 512, 1152, 1152): ProductPlan(64, 1, 1, 8),
    (1, 512, 4352, 1152): ProductPlan(136, 1, 1, 6),
    (1, 512, 1152, 4352): ProductPlan(40, 1, 1, 8),
    (1, 768, 3456, 1152): ProductPlan(160, 1, 1, 3),
    (1, 768, 1152, 1152): ProductPlan(64, 1, 1, 8),
    (1, 768, 4352, 1152): ProductPlan(200, 2, 1, 5),
    (1, 768, 1152, 4352): ProductPlan(64, 1, 1, 8),
    (2, 512, 3456, 1152): ProductPlan(112, 2, 1, 7),
    (2, 512, 1152, 1152): ProductPlan(64, 1, 1, 8),
    (2, 512, 4352, 1152): ProductPlan(136, 2, 1, 6),
    (2, 768, 3456, 1152): ProductPlan(160, 2, 1, 6),
    (2, 768, 1152, 1152): ProductPlan(64, 1, 1, 8),
    (2, 768, 4352, 1152): ProductPlan(200, 2, 1, 5),
    (2, 768, 1152, 4352): ProductPlan(64, 2, 2, 8),
}


def plan_product(m: int, n: int, k: int, size: int, processors: int = 132) -> ProductPlan:
    """The tile for an [M, N, K] of elements of ``size`` bytes: the measured one, else by what an H100 showed.

    With a short K a block's time goes with its columns: the fewest that one wave of blocks covers, from 64, below which
    a block's rows are the larger part of what it reads. With a long K the L2's rate bounds it: clusters of four, which
    leave some of a GPU's multiprocessors over, and the plan with the least of bytes (at 3100 a clock) or products.
    """
    if processors == 132 and (size, m, n, k) in MEASURED:
        return MEASURED[size, m, n, k]
    k_bytes = k * size
    if k_bytes <= 2304:
        plans = (make_plan(nt, 1, 1, k_bytes) for nt in range(64, 241, 8))
        return min(plans, key=lambda plan: (math.ceil(plan.blocks(m, n) / processors), plan.nt))
    cm, cn = (2 if m > ROWS else 1), 2
    room = int(processors * 0.91) // (cm * cn) * (cm * cn)

    def clocks(plan: ProductPlan) -> float:
        blocks = plan.blocks(m, n)
        bytes_ = min(blocks, room) * (ROWS / cn + plan.nt / cm) * 128
        stage = max(bytes_ / 3100, 4 * plan.nt, 200)
        return math.ceil(blocks / room) * (math.ceil(k_bytes / 128) * stage + 8 * plan.nt)

    return min((make_plan(nt, cm, cn, k_bytes) for nt in range(32, 241, 16)), key=clocks)


def pays(dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether to take this and not the library's product: in bf16 where it was measured to be faster."""
    return dtype != torch.bfloat16 or (2, m, n, k) in MEASURED


def product_source(size: int, nt: int) -> str:
    """C++ of ``product``: the asynchronous product of 64 rows, ``nt`` columns and 32 bytes of K of two shared operands,
    bf16 (``size`` 2) or E4M3 (1).

    The instruction names each of its nt / 2 accumulators, so its text depends on the width.
    """
    count = nt // 2
    instruction = product_instruction(size, [f"d[{i}]" for i in range(count)])
    return (
        f"__device__ __forceinline__ void product(float (&d)[{count}], unsigned long long a, unsigned long long b) "
        f"{{\n{instruction}\n}}\n"
    )


def product_instruction(size: int, sums: list[str]) -> str:
    """C++ statement: the product of shared operands ``a`` and ``b`` onto ``sums``, the names of half as many floats as
    ``b`` has columns; see `product_source`."""
    count = len(sums)
    d = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"({name})' for name in sums)
    kind, majors = ("k16.f32.bf16.bf16", ", 0, 0") if size == 2 else ("k32.f32.e4m3.e4m3", "")
    text = f"wgmma.mma_async.sync.aligned.m64n{2 * count}{kind} {{{d}}}, %{count}, %{count + 1}, p, 1, 1{majors};"
    return f'asm volatile("{{\\n.reg .pred p;\\nsetp.eq.u32 p, 0, 0;\\n{text}\\n}}" : {outputs} : "l"(a), "l"(b));'


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_ubyte * 128),
        ("w", ctypes.c_ubyte * 128),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("rows", "columns", "chunks")),
        *((name, ctypes.c_float) for name in ("scale", "out_inverse")),
        ("pad", ctypes.c_ubyte * 28),  # to a multiple of 64
    ]


def fits(capability: tuple[int, int], n: int, k: int) -> bool:
    """Whether hopper_product.cu takes an [N, K] there: Hopper, whole 16-byte rows of FP8."""
    return capability == (9, 0) and k % 16 == 0 and n % 8 == 0


@functools.cache
def _kernel(plan: ProductPlan, size: int, bias: bool, gelu: bool, eight: bool, pdl: bool, device: int) -> Kernel:
    macros = {
        "SIZE": size, "NT": plan.nt, "STAGES": plan.stages, "CM": plan.cm, "CN": plan.cn, "BIAS": int(bias),
        "GELU": int(gelu), "EIGHT": int(eight), "PDL": int(pdl),
    }  # fmt: skip
    return Kernel(
        SOURCES, "hopper_product", macros, threads=THREADS, shared=plan.shared, pdl=pdl, specific=True,
        prelude=product_source(size, plan.nt),
    )  # fmt: skip


def hopper_product(
    x: Tensor,
    weight: Tensor,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    gelu: bool = False,
    out_scale: float | None = None,
    pdl: bool = False,
    plan: ProductPlan | None = None,
) -> Tensor:
    """y = x W.T * scale (+ bias), or gelu_tanh of that; in bf16, or E4M3 of y / ``out_scale``.

    Args:
        x: [M, K], weight: [N, K], both bfloat16 or both float8_e4m3fn, contiguous. bias: bf16 [N].
        plan: instead of `plan_product`'s.

    Returns:
        [M, N], bf16, or float8_e4m3fn with ``out_scale``.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    (m, k), n = x.shape, weight.shape[0]
    whole = x.is_contiguous() and weight.is_contiguous()
    if weight.shape[1] != k or x.dtype != weight.dtype or x.dtype not in _TYPES or not whole:
        got = (tuple(x.shape), x.dtype, tuple(weight.shape), weight.dtype)
        raise InputError.at("hopper_product", "x, weight", got, "contiguous bf16 or float8_e4m3fn [M, K] and [N, K]")
    if bias is not None and (bias.shape != (n,) or bias.dtype != torch.bfloat16):
        raise InputError.at("hopper_product", "bias", (tuple(bias.shape), bias.dtype), f"bf16 [{n}]")
    kind = torch.bfloat16 if out_scale is None else torch.float8_e4m3fn
    out = torch.empty(m, n, dtype=kind, device=x.device)
    size = x.dtype.itemsize
    plan = plan or plan_product(m, n, k, size, multiprocessors(x.device))
    arguments = _Arguments(
        bias=bias.data_ptr() if bias is not None else None, out=out.data_ptr(), rows=m, columns=n,
        chunks=math.ceil(k * size / 128), scale=scale,
        out_inverse=1.0 / out_scale if out_scale is not None else 1.0,
    )  # fmt: skip
    ctypes.memmove(arguments.x, tensor_map(x, ROWS // plan.cn), 128)
    ctypes.memmove(arguments.w, tensor_map(weight, plan.nt // plan.cm), 128)
    kernel = _kernel(plan, size, bias is not None, gelu, out_scale is not None, pdl, torch.cuda.current_device())
    kernel((plan.blocks(m, n), 1), arguments)
    return out
