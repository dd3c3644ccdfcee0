"""All layers of the action expert in one launch: host side of expert_loop.cu.

The same layer as in `hybrid_policy.kernels.expert`, for pi0.5's own expert (width 1024, GeGLU 4096, eight query heads
and one of keys and values, 256 each), 16 to 64 tokens, on a Hopper GPU that can hold 64 clusters of two blocks at once.
The launch stays on the device for a whole pass: weights stream ahead of need, blocks exchange activations by polling.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import expert, expert_packing, packing
from hybrid_policy.kernels.expert import Weight
from hybrid_policy.kernels.nvrtc import Kernel, kernel_sources

SOURCES = kernel_sources(
    "expert_common", "expert_loop_parts", "expert_loop_layout", "expert_loop_attention", "expert_loop"
)
TILES, PARTS = 16, 8
WIDTH, FEATURES, HEADS, HEAD_DIM = 1024, 4096, 8, 256
#: stages with weights: rows, K, and k steps of 16 of a block
STAGES = {
    "qkv": ((HEADS + 2) * HEAD_DIM, WIDTH, 32),
    "o": (WIDTH, HEADS * HEAD_DIM, 16),
    "gate_up": (2 * FEATURES, WIDTH, 64),
    "down": (WIDTH, FEATURES, 32),
}
QKV_BLOCKS = STAGES["qkv"][0] // 64 * 2
#: k steps in 16 bytes of each lane of a warp, and bytes of a warp for them
SIXTEEN = {"bf16": (1, 512), "e4m3": (2, 512), "nvfp4": (4, 640)}
#: warpgroups of a block, and their warps; a lane's loads, 16 bytes each, in a piece of the ring
GROUPS, WARPS, LOADS = 2, 8, 4
STATIC_BYTES = 6144  # barriers and small tables beside the dynamic shared memory
_EMPTY = -1  # a word of mail that has not been written


@dataclass(frozen=True)
class LoopPlan:
    """Sizes that follow from tokens, cache and formats.

    padded: tokens of a product. keys: rows of the cache a block attends to, at most. slots: of the ring of weights,
    ``slot`` bytes each.
    """

    tokens: int
    padded: int
    keys: int
    slots: int
    slot: int

    def shared(self) -> int:
        """Bytes of dynamic shared memory; as laid out in expert_loop_layout.cu."""
        pitch = HEAD_DIM * 2 + 16
        x = -(-max(self.padded * 1024, self.keys * pitch) // 1024) * 1024
        sums = max(GROUPS * self.padded // 8 * 2048, -(-self.keys * pitch // 128) * 128)
        before = x + sums + 32 * pitch + 32 * (self.keys * 2 + 16)
        return -(-before // 128) * 128 + self.slots * self.slot

    @property
    def mail_words(self) -> int:
        """32-bit words of one copy of the mail."""
        rows = 2 * WIDTH + 2 * HEADS * HEAD_DIM + 2 * HEAD_DIM + FEATURES
        return self.padded * (rows // 2 + 2 * TILES) + TILES * PARTS * 64

    @property
    def parcel_words(self) -> int:
        """32-bit words of the parcels."""
        return TILES * PARTS * 512 * (2 * self.padded // 8 + PARTS)


def plan_loop(tokens: int, capacity: int, formats: Mapping[str, str], limit: int) -> LoopPlan | None:
    """The plan with the longest rings that fits ``limit`` bytes of shared memory; None where none does.

    tokens: of the chunk. capacity: rows of the cache, the chunk's included. formats: of the stages.
    """
    if not 16 <= tokens <= 64 or capacity <= tokens:
        return None
    keys = -(-(capacity - tokens) // PARTS) + -(-tokens // PARTS)
    keys = -(-keys // 16) * 16
    if keys > 128:
        return None
    padded = 56 if tokens <= 56 else 64
    slot = WARPS * LOADS * max(SIXTEEN[fmt][1] for fmt in formats.values())
    for slots in range(6, 2, -1):
        plan = LoopPlan(tokens, padded, keys, slots, slot)
        if plan.shared() + STATIC_BYTES <= limit:
            return plan
    return None


def steps_of(stage: str) -> int:
    """K steps of a warp in a stage."""
    return STAGES[stage][2] // GROUPS


def pieces(fmt: str, values: Tensor, scales: Tensor | None) -> Tensor:
    """Rows of W cut into a warp's shares of bulk copies: uint8 [N / 16, K / 16 / steps, bytes].

    Lane ``4g + t`` holds wgmma's A fragment of 16 rows and 16 k: element (k8, r8, e) is row ``2g + r8``, k
    ``2t + 8 k8 + e``. A share is `LOADS` times 512 bytes, of each lane 16. bf16: one k step, (k8, r8, e). E4M3:
    two k steps, four words (step, k8) of `e4m3_words`. NVFP4: four k steps, a word of `packing.pack_words` each; then
    as often 128 bytes of scales: for each g four words, one a k step, of bf16(scale · 2^119) of rows 2g (low) and
    2g + 1.
    """
    n, k = values.shape
    raw = values if fmt != "e4m3" else values.view(torch.uint8)
    # T g r8 S k8 t e -> T S g t k8 r8 e
    f = raw.reshape(n // 16, 8, 2, k // 16, 2, 4, 2).permute(0, 3, 1, 5, 4, 2, 6)
    size = LOADS * SIXTEEN[fmt][1]
    if fmt == "bf16":
        return f.contiguous().view(torch.uint8).reshape(n // 16, -1, size)
    if fmt == "e4m3":
        words = e4m3_words(f).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)  # T I g t step k8
        return words.contiguous().view(torch.uint8).reshape(n // 16, -1, size)
    assert scales is not None
    words = packing.pack_words(f.flatten(-3))[..., 0]  # T S g t
    words = words.unflatten(1, (-1, 4)).permute(0, 1, 3, 4, 2)  # T I g t step
    codes = words.contiguous().view(torch.uint8).reshape(n // 16, -1, LOADS * 512)
    wide = expert_packing.wide_scales(scales).reshape(n // 16, 8, 2, -1, 4)  # T g r8 I step
    wide = wide.permute(0, 3, 1, 4, 2)  # T I g step r8
    return torch.cat((codes, wide.contiguous().view(torch.uint8).reshape(n // 16, -1, LOADS * 128)), -1)


def e4m3_words(codes: Tensor) -> Tensor:
    """Bytes of E4M3 [..., r8, e] -> int32 [...]: see `operand_of` in expert_loop_parts.cu."""
    wide = codes.to(torch.int64)
    first, second = wide[..., 0, :], wide[..., 1, :]
    half = (first & 0x80) << 8 | (first & 0x7F) << 4
    half |= (second & 0x80) << 4 | (second & 0x70) << 8 | second & 0x0F
    word = half[..., 0] | half[..., 1] << 16
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _shares(stage: str) -> tuple[Tensor, Tensor]:
    """Which 16 rows, and from which k step on, each block's each warp has: two int64 [128, warps]."""
    block, warp = torch.arange(TILES * PARTS)[:, None], torch.arange(WARPS)[None]
    tile, part = block // PARTS, block % PARTS
    pair, group, row_tile, steps = block // 2, warp // 4, warp % 4, STAGES[stage][2]
    if stage == "qkv":
        return pair * 4 + row_tile, part % 2 * steps + group * (steps // GROUPS)
    if stage == "gate_up":
        return pair * 8 + warp, (part % 2 * (steps // GROUPS)).expand(-1, WARPS)
    return (tile * 4 + row_tile).expand(len(block), -1), part * steps + group * (steps // GROUPS)


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "row_scale", "vectors", "h", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "valid", "mail", "parcels", "trace")),
        *((name, ctypes.c_int) for name in ("layers", "capacity", "turn")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class ExpertLoop:
    """The expert's layers, packed layer by layer with `pack`, then launched as a whole.

    Args:
        layers, steps: of the expert, of the flow.
        tokens: of a chunk. capacity: rows of the cache.
        formats: ``qkv``, ``o``, ``gate_up``, ``down`` -> bf16, e4m3 or nvfp4 (activations are bf16 in each).
        trace: record clocks of every block and stage in `clocks`.
        macros: for experiments.
    """

    def __init__(
        self,
        layers: int,
        steps: int,
        tokens: int,
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
        self.plan, self._layers, self._capacity, self._formats = plan, layers, capacity, dict(formats)
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
        self.vectors = torch.empty(steps, layers, rows + 2 * WIDTH, device=device)
        self._mail = torch.full((4 * plan.mail_words + plan.parcel_words,), _EMPTY, dtype=torch.int32, device=device)
        self._parcels = self._mail[4 * plan.mail_words :]
        self.clocks = torch.zeros(blocks, layers, 32, dtype=torch.int64, device=device) if trace else None
        macros = (macros or {}) | {"TOKENS": tokens, "MT": plan.padded, "KEYS": plan.keys, "SLOTS": plan.slots}
        macros |= {f"FORMAT_{name.upper()}": expert.FORMATS[fmt] for name, fmt in formats.items()}
        self._kernel = Kernel(
            SOURCES, "expert_loop", macros | {"PDL": int(pdl), "TRACE": int(trace)},
            threads=WARPS * 32 + 32,
             shared=plan.shared(), pdl=pdl, specific=True,
        )  # fmt: skip
        room, pairs = self._kernel.active_clusters((blocks, 1), 2), blocks // 2
        if room < pairs:
            raise InputError(f"expert loop: this device holds {room} pairs of blocks at once, {pairs} needed")
        self.route = f"expert_loop.cu {', '.join(f'{name} {fmt}' for name, fmt in formats.items())}"

    def pack(self, layer: int, stage: str, weights: list[Weight], shift: Tensor | None = None) -> None:
        """Put one stage's weights in their place.

        weights: q, k, v; o; gate, up; or down. shift: of the norm before, float32 [steps, K], for qkv and gate_up.
        """
        fmt, values, scales, rows = expert.stack(weights)
        epilogue = {"qkv": expert.QKV, "gate_up": expert.GEGLU}.get(stage, expert.RESIDUAL)
        shape = STAGES[stage][:2]
        if tuple(values.shape) != shape or fmt != self._formats[stage]:
            given = (fmt, tuple(values.shape))
            raise InputError.at("expert loop", f"layers.{layer}.{stage}", given, f"{self._formats[stage]} {shape}")
        order = expert.row_order(epilogue, len(values), HEAD_DIM, values.device)
        at = {name: sum(STAGES[n][0] for n in list(STAGES)[:i]) for i, name in enumerate(STAGES)}[stage]
        factor = expert_packing.NVFP4_FACTOR if fmt == "nvfp4" else 1.0
        self.row_scale[layer, at : at + shape[0]] = rows[order] * factor
        if shift is not None:
            product = shift.float() @ expert.decoded(fmt, values, scales, rows).T
            begin = {"qkv": WIDTH, "gate_up": WIDTH + STAGES["qkv"][0] + 2 * WIDTH}[stage]
            self.vectors[:, layer, begin : begin + shape[0]] = product[:, order]
        cut = pieces(
            fmt,
            expert.rows_of(values, order),
            None if scales is None else expert.rows_of(scales, order),
        )
        steps = LOADS * SIXTEEN[fmt][0]
        tiles, first = (share.to(values.device) for share in _shares(stage))
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

    def modulate(self, layer: int, factors: tuple[Tensor, Tensor], gates: tuple[Tensor, Tensor]) -> None:
        """A layer's two norms: 1 + scale, and gate, float32 [steps, WIDTH] each."""
        qkv, gate_up = STAGES["qkv"][0], STAGES["gate_up"][0]
        second = WIDTH + qkv
        for begin, value in (
            (0, factors[0]),
            (second, gates[0]),
            (second + WIDTH, factors[1]),
            (second + 2 * WIDTH + gate_up, gates[1]),
        ):
            self.vectors[:, layer, begin : begin + WIDTH] = value

    def start(self) -> None:
        """Empty the mail; before the first step of an inference, so that a broken-off one leaves nothing behind."""
        self._mail.fill_(_EMPTY)

    def __call__(
        self, h: Tensor, step: int, keys: Tensor, values: Tensor, valid: Tensor, tables: tuple[Tensor, Tensor]
    ) -> None:
        """All layers of one flow step.

        Args:
            h: float32 [tokens, WIDTH], the residual stream, in place.
            step: of the flow; steps follow each other from 0.
            keys, values: bf16 [layers, capacity, 1, HEAD_DIM], the prefix's; the chunk's own are not written.
            valid: int32 [1], rows of the prefix. tables: from `rope_tables`.
        """
        cache = (self._layers, self._capacity, 1, HEAD_DIM)
        for name, x, shape, dtype in (
            ("h", h, (self.plan.tokens, WIDTH), torch.float32),
            ("keys", keys, cache, torch.bfloat16),
            ("values", values, cache, torch.bfloat16),
        ):
            if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
                raise InputError.at("expert loop", name, (tuple(x.shape), x.dtype), f"contiguous {dtype} {shape}")
        clocks = None if self.clocks is None else self.clocks.data_ptr()
        self._kernel(
            (TILES * PARTS, 1),
            _Arguments(
                self.weights.data_ptr(), self.row_scale.data_ptr(), self.vectors[step].data_ptr(), h.data_ptr(),
                keys.data_ptr(), values.data_ptr(), tables[0].data_ptr(), tables[1].data_ptr(), valid.data_ptr(),
                self._mail.data_ptr(), self._parcels.data_ptr(), clocks,
                self._layers, self._capacity, step * self._layers % 4, 1e-6, HEAD_DIM**-0.5 * 1.4426950408889634,
            ),
        )  # fmt: skip

    def nbytes(self) -> int:
        """Bytes of weights, vectors and mail."""
        return self.weights.nbytes + self.row_scale.nbytes + self.vectors.nbytes + self._mail.nbytes


def fits_device(
    device: torch.device,
    tokens: int,
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
    if torch.cuda.get_device_capability(device) != (9, 0) or (width, mlp_dim, heads) != (
        WIDTH,
        FEATURES,
        (HEADS, 1, HEAD_DIM),
    ):
        return False
    properties = torch.cuda.get_device_properties(device)
    enough = properties.multi_processor_count >= TILES * PARTS
    return enough and plan_loop(tokens, capacity, formats, expert.shared_limit(device)) is not None
