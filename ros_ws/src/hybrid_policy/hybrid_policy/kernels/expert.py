"""The action expert's layer as five launches: host side of expert_gemm.cu and expert_attention.cu.

    q, K, V   <- RoPE(norm(h) W_qkv.T)           one product with the norm folded in, written to the cache
    a         <- attention over prefix and chunk
    h         <- h + gate * (a W_o.T)
    m         <- gelu(norm(h) W_gate.T) * (norm(h) W_up.T)
    h         <- h + gate * (m W_down.T)

Weights are bf16, FP8 E4M3 (activations stay in bf16: so few rows are bound by the weights' bytes) or NVFP4.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import expert_packing, nvfp4
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.kernels.nvfp4 import NVFP4Tensor
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources

GEMM_SOURCES = kernel_sources("expert_common", "expert_gemm")
ATTENTION_SOURCES = kernel_sources("expert_common", "expert_attention")
THREADS = 256
FORMATS = {"bf16": 0, "e4m3": 1, "nvfp4": 2}
RESIDUAL, GEGLU, QKV = 0, 1, 2
_PER16 = {"bf16": 1, "e4m3": 2, "nvfp4": 4}

Weight = Tensor | FP8Tensor | NVFP4Tensor


@dataclass(frozen=True)
class GemmPlan:
    """Rows of W a cluster, blocks that cut K, warps that cut rows and K of a block."""

    bn: int
    cluster: int
    wm: int
    wk: int

    def shared(self, fmt: str, k: int, tokens: int, norm: bool) -> int:
        """Bytes of dynamic shared memory of a block."""
        kc = k // self.cluster
        steps, mtiles = kc // 16, self.bn // 16
        weights = mtiles * steps * 512 // _PER16[fmt] + (mtiles * steps * 32 if fmt == "nvfp4" else 0)
        body = max(weights + tokens * (kc * 2 + 16), self.wk * tokens * (self.bn + 4) * 4)
        return body + (kc * 2 if norm else 0)

    def fits(self, fmt: str, n: int, k: int, tokens: int, norm: bool, limit: int) -> bool:
        """Whether expert_gemm.cu takes these sizes."""
        return (
            k % (self.cluster * 16 * self.wk * _PER16[fmt]) == 0
            and n % self.bn == 0
            and self.bn % (16 * self.wm) == 0
            and self.bn % (4 * self.cluster) == 0
            and self.shared(fmt, k, tokens, norm) <= limit
        )


#: for each epilogue, in the order of preference: about 128 blocks, 25-65 KB of activations each
PLANS: dict[int, tuple[GemmPlan, ...]] = {
    QKV: (GemmPlan(64, 4, 2, 4), GemmPlan(64, 2, 2, 4), GemmPlan(32, 2, 2, 4), GemmPlan(32, 1, 2, 4)),
    RESIDUAL: (GemmPlan(64, 8, 2, 4), GemmPlan(64, 4, 2, 4), GemmPlan(32, 4, 2, 4), GemmPlan(32, 1, 2, 4)),
    GEGLU: (GemmPlan(128, 2, 2, 4), GemmPlan(64, 2, 2, 4), GemmPlan(32, 2, 2, 4), GemmPlan(32, 1, 2, 4)),
}


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may take on a device."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def padded_tokens(tokens: int) -> int:
    """Tokens of a block: a multiple of 8, at most 64."""
    return min(64, -(-tokens // 8) * 8)


def plan_gemm(epilogue: int, fmt: str, n: int, k: int, tokens: int, limit: int) -> GemmPlan | None:
    """The first plan that fits a device with ``limit`` bytes of shared memory a block; None where none does."""
    norm = epilogue != RESIDUAL
    mt = padded_tokens(tokens)
    return next((p for p in PLANS[epilogue] if p.fits(fmt, n, k, mt, norm, limit)), None)


class _GemmArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "w_scales", "row_scale", "factor", "shift", "gate", "out")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "cosines", "sines", "start")),
        ("tokens", ctypes.c_int),
        ("eps", ctypes.c_float),
    ]


def format_of(weight: Weight) -> str:
    """``bf16``, ``e4m3`` or ``nvfp4``."""
    return "nvfp4" if isinstance(weight, NVFP4Tensor) else "e4m3" if isinstance(weight, FP8Tensor) else "bf16"


def stack(weights: list[Weight]) -> tuple[str, Tensor, Tensor | None, Tensor]:
    """Weights of one format as (format, values or codes [N, K], group scales, float32 row scale [N])."""
    fmt = format_of(weights[0])
    if any(format_of(w) != fmt for w in weights):
        raise InputError("expert: weights of several formats given, expected one")
    if fmt == "bf16":
        dense = torch.cat([w.to(torch.bfloat16) for w in weights if isinstance(w, Tensor)])
        return fmt, dense, None, torch.ones(len(dense), device=dense.device)
    if fmt == "e4m3":
        eights = [w for w in weights if isinstance(w, FP8Tensor)]
        values = torch.cat([w.values.view(torch.uint8) for w in eights]).view(torch.float8_e4m3fn)
        return fmt, values, None, torch.cat([w.scale.float().expand(w.shape[0]) for w in eights])
    fours = [w for w in weights if isinstance(w, NVFP4Tensor)]
    codes = torch.cat([nvfp4.unpack_codes(w.codes) for w in fours])
    scales = torch.cat([w.scales.view(torch.uint8) for w in fours]).view(torch.float8_e4m3fn)
    rows = torch.cat([w.global_scale.float().reshape(1).expand(w.shape[0]) for w in fours])
    return fmt, codes, scales, rows


def decoded(fmt: str, values: Tensor, scales: Tensor | None, rows: Tensor) -> Tensor:
    """The float32 [N, K] that `stack`'s result stands for."""
    if fmt != "nvfp4":
        return values.float() * rows[:, None]
    assert scales is not None
    return nvfp4.decode_e2m1(values) * scales.float().repeat_interleave(nvfp4.GROUP, -1) * rows[:, None]


class ExpertGemm:
    """One product of the layer, packed for expert_gemm.cu.

    weights: stacked rows. epilogue: RESIDUAL, GEGLU (weights are gate, up) or QKV (q, k, v; ``heads`` given).
    tokens: rows of the activations.
    """

    def __init__(
        self,
        weights: list[Weight],
        epilogue: int,
        tokens: int,
        *,
        heads: tuple[int, int, int] = (1, 1, 2),
        pdl: bool = True,
        plan: GemmPlan | None = None,
    ) -> None:
        fmt, values, scales, rows = stack(weights)
        order = row_order(epilogue, len(values), heads[2], values.device)
        self._decoded = (fmt, values, scales, rows)
        values, rows = rows_of(values, order), rows[order]
        n, k = values.shape
        self.shape, self.epilogue, self._fmt, self._order = (n, k), epilogue, fmt, order
        limit = shared_limit(values.device)
        chosen = plan or plan_gemm(epilogue, fmt, n, k, tokens, limit)
        if chosen is None or not chosen.fits(fmt, n, k, padded_tokens(tokens), epilogue != RESIDUAL, limit):
            raise InputError(f"expert: {fmt} [{n}, {k}], {tokens} tokens: no plan fits {limit} bytes of shared memory")
        self.plan = chosen
        mt = padded_tokens(tokens)
        self._grid = (n // chosen.bn * chosen.cluster, -(-tokens // mt))
        self._tokens = tokens
        pack = {
            "bf16": expert_packing.pack_bf16,
            "e4m3": expert_packing.pack_e4m3,
            "nvfp4": expert_packing.pack_nvfp4,
        }[fmt]
        self.weight = pack(values, chosen.bn, chosen.cluster)
        self.scales = None
        if scales is not None:
            self.scales = expert_packing.pack_scales(rows_of(scales, order), chosen.bn, chosen.cluster)
            rows = rows * expert_packing.NVFP4_FACTOR
        self.row_scale = rows.contiguous()
        macros = {
            "PDL": int(pdl), "K_TOTAL": k, "N_TOTAL": n, "BN": chosen.bn, "CLUSTER": chosen.cluster,
            "WM": chosen.wm, "WK": chosen.wk, "MT": mt, "FORMAT": FORMATS[fmt], "EPILOGUE": epilogue,
            "NORM": int(epilogue != RESIDUAL), "HEADS": heads[0], "KV_HEADS": heads[1], "HEAD_DIM": heads[2],
        }  # fmt: skip
        shared = chosen.shared(fmt, k, mt, epilogue != RESIDUAL)
        self._kernel = Kernel(GEMM_SOURCES, "expert_gemm", macros, threads=THREADS, shared=shared, pdl=pdl)
        self.route = f"expert_gemm.cu {fmt}, {self._grid[0]} blocks in clusters of {chosen.cluster}"

    def shift_rows(self, shift: Tensor) -> Tensor:
        """shift W.T for the folded norm: float32 [..., K] -> [..., N], in this product's order; at load."""
        product = shift.float() @ decoded(*self._decoded).T
        if self.epilogue == GEGLU:
            return product.contiguous()  # gate's, then up's, as they were stacked
        return product[..., self._order].contiguous()

    def forget_source(self) -> None:
        """Let go of the unpacked weight; `shift_rows` cannot be called any more."""
        del self._decoded

    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.weight.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __call__(
        self,
        x: Tensor,
        out: Tensor,
        *,
        factor: Tensor | None = None,
        shift: Tensor | None = None,
        gate: Tensor | None = None,
        caches: tuple[Tensor, Tensor] | None = None,
        tables: tuple[Tensor, Tensor] | None = None,
        start: Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        """Launch.

        Args:
            x: bf16 [tokens, K]; the residual stream where the epilogue is GEGLU or QKV.
            out: bf16; RESIDUAL: the stream [tokens, N], in place; GEGLU: [tokens, N / 2]; QKV: q [tokens, heads, dim].
            factor: bf16 [K], 1 + scale. shift: float32 [N] from `shift_rows`. gate: float32 [N].
            caches: bf16 [capacity, kv_heads, head_dim]. tables: from `rope_tables`. start: int32 [1].
        """
        if tuple(x.shape) != (self._tokens, self.shape[1]) or x.dtype != torch.bfloat16 or not x.is_contiguous():
            raise InputError.at(
                "expert", "x", (tuple(x.shape), x.dtype), f"contiguous bf16 {(self._tokens, self.shape[1])}"
            )

        def address(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        keys, values = caches if caches is not None else (None, None)
        cosines, sines = tables if tables is not None else (None, None)
        self._kernel(
            self._grid,
            _GemmArguments(
                address(x), address(self.weight), address(self.scales), address(self.row_scale), address(factor),
                address(shift), address(gate), address(out), address(keys), address(values), address(cosines),
                address(sines), address(start), self._tokens, eps,
            ),
        )  # fmt: skip


def row_order(epilogue: int, n: int, head_dim: int, device: torch.device) -> Tensor:
    """Which source row each row of the packed matrix is: GeGLU and RoPE want their pairs side by side."""
    index = torch.arange(n, device=device)
    if epilogue == GEGLU:
        return index.view(2, -1).t().reshape(-1)
    if epilogue == QKV:
        return index.view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)
    return index


def rows_of(x: Tensor, order: Tensor) -> Tensor:
    """x[order], for FP8 too."""
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8)[order].view(torch.float8_e4m3fn)
    return x[order]


class _AttentionArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "valid")),
        ("tokens", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


class ExpertAttention:
    """Attention of a chunk's tokens over the valid prefix and themselves; head_dim 128 or 256, bf16 cache."""

    CLUSTER = 8
    ROWS, CHUNK = 32, 128

    def __init__(self, tokens: int, heads: int, kv_heads: int, head_dim: int, *, pdl: bool = True) -> None:
        if not self.fits(head_dim):
            raise InputError.at("expert attention", "head_dim", head_dim, "128 or 256")
        group = heads // kv_heads
        self._grid = (-(-tokens * group // self.ROWS) * self.CLUSTER, kv_heads)
        self._tokens, self._scale = tokens, head_dim**-0.5 * 1.4426950408889634
        macros = {
            "PDL": int(pdl), "GROUP": group, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
            "CLUSTER": self.CLUSTER,
        }  # fmt: skip
        self._kernel = Kernel(
            ATTENTION_SOURCES, "expert_attention", macros, threads=THREADS, shared=self.shared(head_dim), pdl=pdl
        )

    @classmethod
    def fits(cls, head_dim: int) -> bool:
        """Whether expert_attention.cu takes this head dimension."""
        return head_dim in (128, 256)

    @classmethod
    def shared(cls, head_dim: int) -> int:
        """Bytes of dynamic shared memory of a block."""
        pitch = head_dim * 2 + 16
        return 2 * cls.CHUNK * pitch + cls.ROWS * pitch + cls.ROWS * (cls.CHUNK * 2 + 16)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, out: Tensor) -> None:
        """q, out: bf16 [tokens, heads, head_dim]; k, v: bf16 [capacity, kv_heads, head_dim]; valid: int32 [1]."""
        arguments = _AttentionArguments(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            valid.data_ptr(),
            self._tokens,
            self._scale,
        )
        self._kernel(self._grid, arguments)


def fits_device(
    device: torch.device,
    tokens: int,
    width: int,
    mlp_dim: int,
    heads: tuple[int, int, int],
    formats: dict[str, str],
) -> bool:
    """Whether all five launches fit a device: clusters (sm_90 or later) and enough shared memory.

    formats: ``qkv``, ``o``, ``gate_up``, ``down`` -> bf16, e4m3 or nvfp4.
    """
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9 or not ExpertAttention.fits(heads[2]):
        return False
    limit = shared_limit(device)
    rows = (heads[0] + 2 * heads[1]) * heads[2]
    shapes = {
        "qkv": (QKV, rows, width),
        "o": (RESIDUAL, width, heads[0] * heads[2]),
        "gate_up": (GEGLU, 2 * mlp_dim, width),
        "down": (RESIDUAL, width, mlp_dim),
    }
    plans = [plan_gemm(e, formats[name], n, k, tokens, limit) for name, (e, n, k) in shapes.items()]
    return all(plan is not None for plan in plans) and ExpertAttention.shared(heads[2]) <= limit
