"""All steps of the flow through all layers of the action expert in one launch: host side of expert_loop.cu.

The same layer as in `hybrid_policy.kernels.expert`, for pi0.5's own expert (width 1024, GeGLU 4096, eight query heads
and one of keys and values, 256 each), 16 to 64 tokens, on a Hopper GPU that can hold 64 clusters of two blocks at once;
between two passes over the layers the Euler step of `hybrid_policy.kernels.flow_step`. The launch stays on the device
from noise to actions: weights stream ahead of need, blocks exchange activations by polling.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import expert, expert_packing
from hybrid_policy.kernels.expert import Weight
from hybrid_policy.kernels.expert_loop_packing import (
    FEATURES,
    FORMATS,
    GROUPS,
    HEAD_DIM,
    HEADS,
    LOADS,
    PARTS,
    QKV_BLOCKS,
    SIXTEEN,
    STAGES,
    TILES,
    WARPS,
    WIDTH,
    pieces,
    shares,
    steps_of,
)
from hybrid_policy.kernels.expert_reference import HEADROOM
from hybrid_policy.kernels.flow_step import FlowWeights, Guide
from hybrid_policy.kernels.norm import E4M3_MAX
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources

SOURCES = kernel_sources(
    "expert_common",
    *(f"expert_loop_{part}" for part in ("parts", "layout", "attention", "flow")),
    "expert_loop",
)
#: actions of a token as the kernel holds them, zeros behind the last
LANES = 32
QUERIES = 32  # rows of attention of a block
STATIC_BYTES = 7168  # barriers and small tables beside the dynamic shared memory
_EMPTY = -1  # a word of mail that has not been written


@dataclass(frozen=True)
class LoopPlan:
    """Sizes that follow from tokens, cache and formats.

    padded: tokens of a product. keys: rows of the cache a block attends to, at most. slots: of the ring of weights,
    ``slot`` bytes each. size: bytes of an activation.
    """

    tokens: int
    padded: int
    keys: int
    slots: int
    slot: int
    size: int

    def shared(self) -> int:
        """Bytes of dynamic shared memory; as laid out in expert_loop_layout.cu."""
        rows = self.keys * HEAD_DIM * 2
        attention = QUERIES * (2 * 128 + HEAD_DIM * 2)
        x, sums = max(self.padded * 512 * self.size, rows), max(GROUPS * self.padded // 8 * 2048, rows)
        return attention + x + sums + self.slots * self.slot

    @property
    def mail_words(self) -> int:
        """32-bit words of one copy of the mail."""
        activations, queries = 2 * WIDTH + HEADS * HEAD_DIM + FEATURES, (HEADS + 2) * HEAD_DIM
        row = activations * self.size // 4 + queries // 2 + 2 * TILES
        return self.padded * row + TILES * PARTS * 64

    @property
    def parcel_words(self) -> int:
        """32-bit words of the parcels."""
        return TILES * PARTS * (512 * (2 * self.padded // 8 + PARTS) + 8 * (LANES + 1))


def plan_loop(tokens: int, capacity: int, formats: Mapping[str, str], limit: int) -> LoopPlan | None:
    """The plan with the longest rings that fits ``limit`` bytes of shared memory; None where none does.

    tokens: of the chunk. capacity: rows of the cache, the chunk's included. formats: of the stages.
    """
    if not 16 <= tokens <= 64 or capacity <= tokens:
        return None
    keys = -(-(capacity - tokens) // PARTS) + -(-tokens // PARTS)
    if keys > 128:
        return None
    keys = 96 if keys <= 96 else 128
    padded = 56 if tokens <= 56 else 64
    slot = WARPS * LOADS * max(SIXTEEN[fmt][1] for fmt in formats.values())
    for slots in range(6, 2, -1):
        plan = LoopPlan(tokens, padded, keys, slots, slot, 1 if formats["down"] == "w8a8" else 2)
        if plan.shared() + STATIC_BYTES <= limit:
            return plan
    return None


class _Arguments(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("weights", "row_scale", "vectors", "keys", "values", "cosines", "sines")
        ),
        *((name, ctypes.c_void_p) for name in ("valid", "noise", "actions", "out_weight", "in_weight", "in_bias")),
        *((name, ctypes.c_void_p) for name in ("factor", "shift", "times", "target", "guide_weights", "clean")),
        *((name, ctypes.c_void_p) for name in ("mail", "parcels", "trace")),
        *((name, ctypes.c_int) for name in ("layers", "steps", "capacity")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class ExpertLoop:
    """The expert's layers, packed layer by layer with `pack` and `modulate`, the flow with `set_flow`, then launched as
    a whole.

    Args:
        layers, steps: of the expert, of the flow.
        tokens: of a chunk. actions: of a token, at most `LANES`. capacity: rows of the cache.
        formats: ``qkv``, ``o``, ``gate_up``, ``down`` -> bf16, e4m3 or nvfp4 (activations are bf16 in each); or w8a8
            for all four: weights and activations in E4M3, the residual stream in a scale that follows its tokens (NaN
            should one outgrow it), attention's and GeGLU's results in a scale a layer that holds for any input.
        trace: record clocks of every block and stage in `clocks`.
        macros: for experiments.
    """

    def __init__(
        self,
        layers: int,
        steps: int,
        tokens: int,
        actions: int,
        capacity: int,
        formats: dict[str, str],
        device: torch.device,
        *,
        pdl: bool = True,
        trace: bool = False,
        macros: dict[str, int] | None = None,
    ) -> None:
        plan = plan_loop(tokens, capacity, formats, expert.shared_limit(device))
        if plan is None:
            raise InputError(f"expert loop: {tokens} tokens, {capacity} rows of cache: no plan fits this device")
        if not 1 <= actions <= LANES:
            raise InputError.at("expert loop", "actions", actions, f"1 to {LANES}")
        self.plan, self._layers, self._steps, self._capacity = plan, layers, steps, capacity
        self._actions, self._formats = actions, dict(formats)
        sizes = {name: steps_of(name) // SIXTEEN[fmt][0] * SIXTEEN[fmt][1] for name, fmt in formats.items()}
        self._offsets = {}
        at = 0
        for name in STAGES:
            self._offsets[name] = at
            at += sizes[name]
        self._long, self._sizes = at, sizes
        blocks, tail = TILES * PARTS, at - sizes["qkv"]
        head = QKV_BLOCKS * layers * WARPS * self._long
        self.weights = torch.empty(
            head + (blocks - QKV_BLOCKS) * layers * WARPS * tail, dtype=torch.uint8, device=device
        )
        self._with_qkv = self.weights[:head].view(QKV_BLOCKS, layers, WARPS * self._long)
        self._without = self.weights[head:].view(blocks - QKV_BLOCKS, layers, WARPS * tail)
        rows = sum(shape[0] for shape in STAGES.values())
        self.row_scale = torch.empty(layers, rows, device=device)
        self.vectors = torch.zeros(steps, layers, rows + 2 * WIDTH + 4, device=device)
        # what attention's results and GeGLU's are divided by before E4M3
        self.seen_scale, self.act_scale = (torch.ones(layers, device=device) for _ in range(2))
        self._out_weight, self._in_weight = (torch.zeros(WIDTH, LANES, device=device) for _ in range(2))
        self._in_bias, self._factor = torch.zeros(WIDTH, device=device), torch.zeros(steps, WIDTH, device=device)
        self._shift, self._times = torch.zeros(steps, LANES, device=device), torch.zeros(steps, 4, device=device)
        self._mail = torch.full((4 * plan.mail_words + plan.parcel_words,), _EMPTY, dtype=torch.int32, device=device)
        self._parcels = self._mail[4 * plan.mail_words :]
        self.clocks = torch.zeros(blocks, layers, 32, dtype=torch.int64, device=device) if trace else None
        # measured at 270 (bf16): 64 brings 4 %, 128 costs 2 %; at 135 (w8a8): 32 brings 3 %; at 110 (the hybrid) memory
        # has time enough
        ahead = 64 if WARPS * at > 200 * 1024 else 32 if WARPS * at > 120 * 1024 else 0
        macros = {"AHEAD": ahead} | (macros or {}) | {"TOKENS": tokens, "ACTIONS": actions, "MT": plan.padded}
        macros |= {"KEYS": plan.keys, "SLOTS": plan.slots}
        macros |= {f"FORMAT_{name.upper()}": FORMATS[fmt] for name, fmt in formats.items()}
        self._kernel = Kernel(
            SOURCES, "expert_loop", macros | {"PDL": int(pdl), "TRACE": int(trace)},
            threads=WARPS * 32 + 128,
             shared=plan.shared(), pdl=pdl, specific=True,
        )  # fmt: skip
        room, pairs = self._kernel.active_clusters((blocks, 1), 2), blocks // 2
        if room < pairs:
            raise InputError(f"expert loop: this device holds {room} pairs of blocks at once, {pairs} needed")
        self.route = f"expert_loop.cu {', '.join(f'{name} {fmt}' for name, fmt in formats.items())}"

    def pack(
        self,
        layer: int,
        stage: str,
        weights: list[Weight],
        shift: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """Put one stage's weights in their place.

        weights: q, k, v; o; gate, up; or down. shift: of the norm before, float32 [steps, K], for qkv and gate_up.
        factor: of the norm, likewise: for w8a8, where `modulate` comes after qkv and gate_up.
        """
        fmt, values, scales, rows = expert.stack(weights)
        epilogue = {"qkv": expert.QKV, "gate_up": expert.GEGLU}.get(stage, expert.RESIDUAL)
        shape = STAGES[stage][:2]
        kind = self._formats[stage]
        if tuple(values.shape) != shape or fmt != ("e4m3" if kind == "w8a8" else kind):
            given = (fmt, tuple(values.shape))
            raise InputError.at("expert loop", f"layers.{layer}.{stage}", given, f"{self._formats[stage]} {shape}")
        order = expert.row_order(epilogue, len(values), HEAD_DIM, values.device)
        at = {name: sum(STAGES[n][0] for n in list(STAGES)[:i]) for i, name in enumerate(STAGES)}[stage]
        unit = expert_packing.NVFP4_FACTOR if fmt == "nvfp4" else 1.0
        self.row_scale[layer, at : at + shape[0]] = rows[order] * unit
        if shift is not None:
            weight = expert.decoded(fmt, values, scales, rows)
            product = shift.float() @ weight.T
            begin = {"qkv": WIDTH, "gate_up": WIDTH + STAGES["qkv"][0] + 2 * WIDTH}[stage]
            self.vectors[:, layer, begin : begin + shape[0]] = product[:, order]
        if stage in ("qkv", "gate_up") and kind == "w8a8":
            if shift is None or factor is None:
                raise InputError(f"expert loop: layers.{layer}.{stage} without shift and factor, expected for w8a8")
            bound = row_bounds(weight, factor, shift)
            if stage == "qkv":
                self.seen_scale[layer] = bound[-HEAD_DIM:].amax() / E4M3_MAX
            else:
                scale = (bound[:FEATURES] * bound[FEATURES:]).amax() / E4M3_MAX
                self.act_scale[layer] = scale
                # into up's rows, every other one: the kernel's GeGLU wants half of them, and its results divided
                self.row_scale[layer, at + 1 : at + shape[0] : 2] *= 0.5 / scale
                self.vectors[:, layer, begin + 1 : begin + shape[0] : 2] *= 0.5 / scale
        cut = pieces(
            kind,
            expert.rows_of(values, order),
            None if scales is None else expert.rows_of(scales, order),
        )
        steps = LOADS * SIXTEEN[kind][0]
        tiles, first = (share.to(values.device) for share in shares(stage))
        count = steps_of(stage) // steps
        index = (first // steps)[..., None] + torch.arange(count, device=values.device)
        active = QKV_BLOCKS if stage == "qkv" else len(tiles)
        taken = cut[tiles[:active, :, None], index[:active]]  # [blocks, warps, pieces, bytes]
        taken = taken.transpose(1, 2).flatten(1)
        begin, length = WARPS * self._offsets[stage], taken.shape[1]
        self._with_qkv[:, layer, begin : begin + length] = taken[:QKV_BLOCKS]
        if stage != "qkv":
            begin -= WARPS * self._sizes["qkv"]
            self._without[:, layer, begin : begin + length] = taken[QKV_BLOCKS:]

    def modulate(
        self, layer: int, factors: tuple[Tensor, Tensor], gates: tuple[Tensor, Tensor], most_value: float = 0.0
    ) -> None:
        """A layer's two norms: 1 + scale, and gate, float32 [steps, WIDTH] each.

        most_value: for w8a8, no value in the prefix's cache is larger.
        """
        qkv, gate_up = STAGES["qkv"][0], STAGES["gate_up"][0]
        if self._formats["down"] == "w8a8":
            # attention's results are means of values; a quarter more for what was rounded before the values were
            self.seen_scale[layer].clamp_(min=most_value / E4M3_MAX).mul_(1.25)
            self.vectors[:, layer, -3] = 1.0 / self.seen_scale[layer]
        second = WIDTH + qkv
        for begin, value in (
            (0, factors[0]),
            (second, gates[0] * self.seen_scale[layer]),
            (second + WIDTH, factors[1]),
            (second + 2 * WIDTH + gate_up, gates[1] * self.act_scale[layer]),
        ):
            self.vectors[:, layer, begin : begin + WIDTH] = value

    def set_flow(
        self, weights: FlowWeights, norm: tuple[Tensor, Tensor], times: Sequence[float], strengths: Sequence[float]
    ) -> None:
        """What lies between two passes over the layers.

        norm: the last norm's 1 + scale and shift, float32 [steps, WIDTH] each. times, strengths: of each step, the
        flow's time and real-time chunking's w(t).
        """
        scale, shift = norm
        a = self._actions
        self._out_weight[:, :a] = weights.out_weight.T
        self._in_weight[:, :a] = weights.in_weight
        self._in_bias.copy_(weights.in_bias)
        self._factor.copy_(scale)
        self._shift[:, :a] = shift.float() @ weights.out_weight.T + weights.out_bias
        rows = [(t, 1.0 / self._steps, strength, 0.0) for t, strength in zip(times, strengths, strict=True)]
        self._times.copy_(torch.tensor(rows))
        # the residual stream's first scale, for actions as large as the noise
        square = weights.in_weight.square().sum(1) + weights.in_bias.square()
        self.vectors[:, 0, -4] = HEADROOM * square.mean().clamp(min=1e-30).rsqrt()

    def start(self) -> None:
        """Empty the mail; before a launch.

        Nothing, where a launch leaves it as it found it: the copies of the mail that the first two layers take are
        emptied by the last two, if the layers of all steps are whole fours, and what lies in parcels has the other
        parity, if the steps are even.
        """
        if self._layers * self._steps % 4 or self._steps % 2:
            self._mail.fill_(_EMPTY)

    def __call__(
        self,
        noise: Tensor,
        actions: Tensor,
        guide: Guide,
        keys: Tensor,
        values: Tensor,
        valid: Tensor,
        tables: tuple[Tensor, Tensor],
    ) -> None:
        """All steps of the flow, from noise to actions; after `start`.

        Args:
            noise, actions: float32 [tokens, actions]; in, and out.
            guide: real-time chunking's inputs.
            keys, values: bf16 [layers, capacity, 1, HEAD_DIM], the prefix's; the chunk's own are not written.
            valid: int32 [1], rows of the prefix. tables: from `rope_tables`.
        """
        cache, chunk = (self._layers, self._capacity, 1, HEAD_DIM), (self.plan.tokens, self._actions)
        for name, x, shape, dtype in (
            ("noise", noise, chunk, torch.float32),
            ("actions", actions, chunk, torch.float32),
            ("target", guide.target, chunk, torch.float32),
            ("keys", keys, cache, torch.bfloat16),
            ("values", values, cache, torch.bfloat16),
        ):
            if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
                raise InputError.at("expert loop", name, (tuple(x.shape), x.dtype), f"contiguous {dtype} {shape}")
        clocks = None if self.clocks is None else self.clocks.data_ptr()
        pointers = (
            self.weights, self.row_scale, self.vectors, keys, values, *tables, valid, noise, actions,
            self._out_weight, self._in_weight, self._in_bias, self._factor, self._shift, self._times,
            guide.target, guide.weights, guide.clean, self._mail, self._parcels,
        )  # fmt: skip
        self._kernel(
            (TILES * PARTS, 1),
            _Arguments(
                *(x.data_ptr() for x in pointers), clocks, self._layers, self._steps, self._capacity, 1e-6,
                HEAD_DIM**-0.5 * 1.4426950408889634,
            ),
        )  # fmt: skip

    def nbytes(self) -> int:
        """Bytes of weights, vectors and mail."""
        return self.weights.nbytes + self.row_scale.nbytes + self.vectors.nbytes + self._mail.nbytes


def row_bounds(weight: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """What no row of a product with a normalised input exceeds, whatever the input: float32 [N, steps].

    A normalised row has ‖n‖ ≤ √K, so |W_j·(n∘f + s)| ≤ √K ‖W_j∘f‖ + |W_j·s| (Cauchy-Schwarz); and a product of two,
    |gelu(g) u| ≤ |g||u|, is no larger than that of their bounds. A tenth more covers roundings of n to E4M3.

    Args:
        weight: float32 [N, K]. factor, shift: of the norm, float32 [steps, K].
    """
    rows = weight.shape[1] ** 0.5 * (weight.square() @ factor.square().T).sqrt() + (weight @ shift.T).abs()
    return (1.1 * rows).clamp(min=1e-15)


def fits_device(
    device: torch.device,
    tokens: int,
    actions: int,
    capacity: int,
    width: int,
    mlp_dim: int,
    heads: tuple[int, int, int],
    formats: dict[str, str],
) -> bool:
    """Whether the loop kernel serves an expert on a device: Hopper (wgmma), pi0.5's dimensions, a cache that fits.

    formats: ``qkv``, ``o``, ``gate_up``, ``down`` -> bf16, e4m3 or nvfp4. A device that cannot hold all blocks at once
    is only found out by `ExpertLoop`.
    """
    served = (WIDTH, FEATURES, (HEADS, 1, HEAD_DIM))
    if torch.cuda.get_device_capability(device) != (9, 0) or (width, mlp_dim, heads) != served or actions > LANES:
        return False
    properties = torch.cuda.get_device_properties(device)
    enough = properties.multi_processor_count >= TILES * PARTS
    return enough and plan_loop(tokens, capacity, formats, expert.shared_limit(device)) is not None
