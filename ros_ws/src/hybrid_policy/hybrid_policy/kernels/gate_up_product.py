"""gelu_tanh(x Wg') * (x Wu') of a few hundred rows in one launch on Hopper: host side of gate_up_product.cu."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources, multiprocessors
from hybrid_policy.kernels.tensor_map import paired_map, tensor_map

SOURCES = kernel_sources("wgmma_common", "gate_up_product")
THREADS = 384
#: features of a block's tile; bytes of shared memory of a block on compute capability 9.0
FEATURES = 128
SHARED = 232448
#: the most tokens whose gate and up a thread's registers hold
MOST_TOKENS = 200
#: > 0: a wait gives up after so many polls, with wrong results instead of none (tests)
SPIN_LIMIT = 0
_W_BYTES = 32768  # of a stage: 128 rows of gate, 128 of up


@dataclass(frozen=True)
class GateUpPlan:
    """A launch of gate_up_product.cu.

    Attributes:
        eight: E4M3 in and out, else bf16.
        nt: tokens of a tile, a multiple of 8.
        stages: of 128 bytes of K in flight.
        cluster: blocks that share x, 1 or 2.
    """

    eight: bool
    nt: int
    stages: int
    cluster: int = 2

    @property
    def pieces(self) -> int:
        """Parts in which a warpgroup's result is staged, of 16 KB at most."""
        return 1 if self.nt * (64 if self.eight else 128) <= 16384 else 2

    @property
    def first_piece(self) -> int:
        """Tokens of the first."""
        return self.nt if self.pieces == 1 else math.ceil(self.nt / 16) * 8

    @property
    def x_rows(self) -> int:
        """Tokens that a block fetches."""
        return self.nt if self.cluster == 1 else math.ceil(self.nt / 16) * 8

    @property
    def held(self) -> bool:
        """Whether results are staged in the ring itself, for want of room beside it."""
        return self._shared(held=False) > SHARED

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self._shared(held=self.held)

    def _shared(self, *, held: bool) -> int:
        staging = 0 if held else 2 * self.pieces * self.first_piece * (64 if self.eight else 128)
        ring = self.stages * (_W_BYTES + self.nt * 128)
        return ring + staging + (12 * self.nt if self.eight else 0) + 16 * self.stages

    def pairs(self, m: int, features: int) -> int:
        """Tiles of clusters for [M, 2 * features]."""
        return math.ceil(math.ceil(features / FEATURES) / self.cluster) * math.ceil(m / self.nt)

    def macros(self, *, pdl: bool) -> dict[str, int]:
        """Of the source."""
        return {
            "EIGHT": int(self.eight), "NT": self.nt, "STAGES": self.stages, "CLUSTER": self.cluster,
            "HELD": int(self.held), "PDL": int(pdl), "SHARED": SHARED,
        }  # fmt: skip


def make_plan(eight: bool, nt: int, *, cluster: int = 2) -> GateUpPlan:
    """With as many stages as there is memory for, six at most."""
    stages = min(6, (SHARED - 12 * nt - 96) // (_W_BYTES + nt * 128))
    return GateUpPlan(eight, nt, stages, cluster)


def plan_gate_up(eight: bool, m: int, features: int, k: int, processors: int = 132) -> GateUpPlan:
    """The launch for x [M, K] and ``features`` features of gate and of up.

    Every cluster takes its tiles in turn, and the longest row of them counts. A stage takes its products (4 nt clocks
    for each warpgroup) or, of small tiles, the L2's time for what all blocks read (3600 bytes a clock have been seen);
    a tile takes its GeGLU besides.
    """
    clusters = processors // 2
    chunks = math.ceil(k * (1 if eight else 2) / 128)

    def clocks(plan: GateUpPlan) -> float:
        pairs = plan.pairs(m, features)
        stage = max(8 * plan.nt, 2 * min(pairs, clusters) * (_W_BYTES + plan.nt * 64) / 3600)
        return math.ceil(pairs / clusters) * (chunks * stage + 16 * plan.nt)

    return min((make_plan(eight, nt) for nt in range(8, MOST_TOKENS + 1, 8)), key=lambda plan: (clocks(plan), plan.nt))


def product_source(plan: GateUpPlan) -> str:
    """C++ of ``product``: the asynchronous 64 x nt x 32-byte product of two shared operands, onto ``d`` or instead.

    The instruction names each of its nt / 2 accumulators, so its text depends on the width.
    """
    count = plan.nt // 2
    d = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    kind, transposed = ("k32.f32.e4m3.e4m3", "") if plan.eight else ("k16.f32.bf16.bf16", ", 0, 0")
    operands = f"{{{d}}}, %{count}, %{count + 1}, p, 1, 1{transposed}"
    return (
        f"__device__ __forceinline__ void product(float (&d)[{count}], unsigned long long a, unsigned long long b, int "
        f'onto) {{\nasm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n'
        f'wgmma.mma_async.sync.aligned.m64n{plan.nt}{kind} {operands};\\n}}" : {outputs} '
        ': "l"(a), "l"(b), "r"(onto));\n}\n'
    )


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_ubyte * 128) for name in ("gate", "up", "x", "out", "out_rest")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "squares", "out_scale")),
        *((name, ctypes.c_int) for name in ("tokens", "features", "token_tiles", "pairs", "chunks")),
        *((name, ctypes.c_float) for name in ("weight_scale", "out_factor")),
        ("pad", ctypes.c_ubyte * 12),  # to a multiple of 64
    ]


def fits(capability: tuple[int, int], features: int, k: int) -> bool:
    """Whether gate_up_product.cu takes W [2 * features, K] there: Hopper, whole sixteens of features and bytes."""
    return capability == (9, 0) and features % 16 == 0 and k % 16 == 0 and k > 128


@functools.cache
def _kernel(plan: GateUpPlan, pdl: bool, spin_limit: int, device: int) -> Kernel:
    return Kernel(
        SOURCES, "gate_up_product", plan.macros(pdl=pdl) | {"SPIN_LIMIT": spin_limit}, threads=THREADS,
        shared=plan.shared, pdl=pdl, specific=True, prelude=product_source(plan),
    )  # fmt: skip


def gate_up_product(
    x: Tensor,
    weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    squares: Tensor | None = None,
    out_scale: Tensor | None = None,
    weight_scale: float = 1.0,
    out_factor: float = 1.0,
    pdl: bool = False,
    plan: GateUpPlan | None = None,
) -> Tensor:
    """gelu_tanh(gate) * up of [gate, up] = x W.T, in bf16; or in E4M3 with a scale a row.

    Args:
        x: [M, K], contiguous, bf16; or float8_e4m3fn, its rows divided by ``row_scale``.
        weight: [2 * features, K] of x's dtype, gate first, contiguous; in E4M3 divided by ``weight_scale``.
        row_scale, squares: float32 [M], E4M3 only: of x, and the sums of its rows' squares.
        out_scale: float32 [M], E4M3 only: receives what the rows of the result are divided by, ``squares`` times
            ``out_factor`` to three digits; the factor decides whether values saturate (`static_scales`). NaN stays NaN.
        plan: instead of `plan_gate_up`'s.

    Returns:
        [M, features] of x's dtype.

    Raises:
        InputError: shapes or dtypes that do not fit, or scales that do not belong to the dtype.
    """
    (m, k), features, eight = x.shape, weight.shape[0] // 2, x.dtype == torch.float8_e4m3fn
    if (
        weight.shape[1] != k
        or weight.shape[0] != 2 * features
        or x.dtype not in (torch.float8_e4m3fn, torch.bfloat16)
        or weight.dtype != x.dtype
        or not (x.is_contiguous() and weight.is_contiguous())
        or not fits((9, 0), features, k)
    ):
        got = (tuple(x.shape), x.dtype, tuple(weight.shape), weight.dtype)
        expected = "contiguous [M, K] and [2 F, K] of one of bf16 and float8_e4m3fn, F and K multiples of 16, K > 128"
        raise InputError.at("gate_up_product", "x, weight", got, expected)
    vectors = {"row_scale": row_scale, "squares": squares, "out_scale": out_scale}
    for name, vector in vectors.items():
        given = None if vector is None else (tuple(vector.shape), vector.dtype)
        if given != (((m,), torch.float32) if eight else None):
            raise InputError.at("gate_up_product", name, given, f"float32 [{m}] with float8_e4m3fn, None with bf16")
    processors = multiprocessors(x.device)
    plan = plan or plan_gate_up(eight, m, features, k, processors)
    chunks = math.ceil(k * x.dtype.itemsize / 128)
    if plan.eight != eight:
        raise InputError.at("gate_up_product", "plan", plan, f"one for {x.dtype}")
    out = torch.empty(m, features, dtype=x.dtype, device=x.device)
    pairs = plan.pairs(m, features)
    arguments = _Arguments(
        **{name: None if vector is None else vector.data_ptr() for name, vector in vectors.items()},
        tokens=m, features=features,
        token_tiles=math.ceil(m / plan.nt), pairs=pairs, chunks=chunks,
        weight_scale=weight_scale, out_factor=out_factor,
    )  # fmt: skip
    w_map, width = (paired_map, 64) if eight else (tensor_map, 128)
    ctypes.memmove(arguments.gate, w_map(weight[:features], 64), 128)
    ctypes.memmove(arguments.up, w_map(weight[features:], 64), 128)
    ctypes.memmove(arguments.x, tensor_map(x, plan.x_rows), 128)
    ctypes.memmove(arguments.out, tensor_map(out, plan.first_piece, columns=width), 128)
    if plan.pieces == 2:
        ctypes.memmove(arguments.out_rest, tensor_map(out, plan.nt - plan.first_piece, columns=width), 128)
    kernel = _kernel(plan, pdl, SPIN_LIMIT, torch.cuda.current_device())
    kernel((min(pairs, processors // plan.cluster) * plan.cluster, 1), arguments)
    return out


def gate_up_reference(
    x: Tensor, weight: Tensor, *, row_scale: Tensor | None = None, weight_scale: float = 1.0
) -> Tensor:
    """The mathematics of `gate_up_product`, in float64: [M, features], not divided by any scale."""
    gate, up = (x.double() @ weight.double().T * weight_scale).chunk(2, -1)
    if row_scale is not None:
        gate, up = gate * row_scale.double()[:, None], up * row_scale.double()[:, None]
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
