"""A model's weights in the form that the device stages read: packed sites, folded norms, modulation tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_policy.kernels import expert as expert_kernels
from hybrid_policy.kernels.expert_loop import ExpertLoop
from hybrid_policy.kernels.flow_step import FlowWeights
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.kernels.gate_up import PackedGateUp, prepare_gate_up
from hybrid_policy.kernels.linear import PackedLinear, prepare
from hybrid_policy.kernels.nvfp4 import NVFP4Tensor
from hybrid_policy.kernels.prefix_inputs import padded_patch
from hybrid_policy.kernels.qkv import FusedQKV
from hybrid_policy.models.config import GemmaConfig, Pi05Config
from hybrid_policy.models.pi05 import EXPERT, PREFIX, PROJECTOR, VISION
from hybrid_policy.runtime.modulations import Modulations, modulations_of
from hybrid_policy.runtime.projection import Projection, padded_between
from hybrid_policy.runtime.sites import Packed, dense, pack_sites
from hybrid_policy.runtime.static_scales import (
    MOST_LOSS,
    affordable_row_factor,
    folded,
    gated_row_loss,
    norm_output_scale,
    product_scale,
)

#: parameter name -> tensor on the device; float32 where exactness is cheap, else the model's dtype
Source = Callable[[str], Tensor]
#: called with a word after each step of loading
Report = Callable[[str], None]


@dataclass
class VisionLayer:
    """One SigLIP layer. Norms come folded with the input scale of the FP8 product behind them.

    seen_scale: of the attention's output where ``out`` is FP8.
    """

    norm1: tuple[Tensor, Tensor]
    qkv: Projection
    out: Projection
    out_bias: Tensor
    norm2: tuple[Tensor, Tensor]
    fc1: Projection
    fc2: Projection
    fc2_bias: Tensor
    seen_scale: float | None = None


@dataclass
class GemmaLayer:
    """One Gemma layer for library GEMMs and glue kernels. norms: (1 + w), or None where modulated.

    mlp_in: gate and up stacked, or one kernel that ends in GeGLU. For the last prefix layer only ``qkv`` (K and V).
    act_factor: with gate, up and down in FP8, what ‖h‖² is multiplied by to scale the row that GeGLU makes of h; None
        where such scales would cost too much.
    """

    norm1: Tensor | None
    qkv: Projection
    norm2: Tensor | None = None
    out: Projection | None = None
    mlp_in: Projection | PackedGateUp | None = None
    down: Projection | None = None
    act_factor: float | None = None

    def gated(self) -> tuple[Tensor, float] | None:
        """Weight of gate and up and its factor, where gate_up_product.py takes this layer: bf16 into what takes bf16,
        or FP8 into FP8 with ``act_factor``."""
        if self.down is None or not isinstance(self.mlp_in, Projection):
            return None
        if self.mlp_in.quantised != self.down.quantised or (self.down.quantised and self.act_factor is None):
            return None
        return self.mlp_in.held()


@dataclass
class FusedLayer:
    """One expert layer of few, fat launches."""

    qkv: FusedQKV
    out: PackedLinear
    gate_up: PackedGateUp
    down: PackedLinear
    #: rows W·shift of each flow step: [steps, qkv rows], [steps, F], [steps, F], float32
    qkv_shift: Tensor
    gate_shift: Tensor
    up_shift: Tensor


@dataclass
class ClusterLayer:
    """One expert layer of the cluster kernels' launches; shifts as in `FusedLayer` (gate's and up's in one row)."""

    qkv: expert_kernels.ExpertGemm
    out: expert_kernels.ExpertGemm
    gate_up: expert_kernels.ExpertGemm
    down: expert_kernels.ExpertGemm
    qkv_shift: Tensor
    gate_up_shift: Tensor


@dataclass
class DeviceWeights:
    """Everything of a pi0.5 that a device reads."""

    config: Pi05Config
    dtype: torch.dtype
    patch: Tensor
    patch_bias: Tensor
    vision: list[VisionLayer]
    post_norm: tuple[Tensor, Tensor]
    projector: Projection
    embedding: Tensor
    prefix: list[GemmaLayer]
    expert: list[GemmaLayer]
    fused: list[FusedLayer]
    cluster: list[ClusterLayer]
    #: the whole flow in one launch, where the stages say so
    loop: ExpertLoop | None
    modulations: Modulations
    flow: FlowWeights
    routes: dict[str, str] = field(default_factory=dict)


def build_weights(
    config: Pi05Config,
    source: Source,
    precisions: Mapping[str, str],
    *,
    dtype: torch.dtype,
    expert: str,
    pdl: bool = True,
    packed: Mapping[str, Packed] | None = None,
    report: Report = lambda _: None,
) -> DeviceWeights:
    """Read, pack and fold every weight; nothing of the source is kept that no stage reads.

    Args:
        config: dimensions.
        source: parameter name -> tensor, on the device.
        precisions: site -> precision.
        dtype: of activations: bfloat16 on a GPU, float32 where the plain stages run on a CPU.
        expert: ``loop``, ``cluster``, ``fused`` or ``split``: which launches the action expert is packed for.
        pdl: the expert's launches may start before their predecessor ends.
        packed: sites that the checkpoint brings quantised.
    """
    packer = _Packer(source, precisions, packed or {}, dtype, report)
    vision = [_vision_layer(packer, source, f"{VISION}encoder.layers.{i}.") for i in range(config.vision.depth)]
    embeddings = VISION + "embeddings."
    patch = source(embeddings + "patch_embedding.weight").flatten(1).to(dtype)
    patch = F.pad(patch, (0, padded_patch(config.vision.patch) - patch.shape[1]))
    position = source(embeddings + "position_embedding.weight").float()
    prefix = [
        _gemma_layer(packer, source, f"{PREFIX}layers.{i}.", config.prefix, last=i == config.prefix.depth - 1)
        for i in range(config.prefix.depth)
    ]
    early = [layer.act_factor is not None for layer in prefix if layer.down is not None and layer.down.quantised]
    if early:
        packer.note("prefix.geglu", f"scales of rows known before the product in {sum(early)} of {len(early)} layers")
    modulations = modulations_of(config, source)
    report("modulations")
    split: list[GemmaLayer] = []
    fused: list[FusedLayer] = []
    cluster: list[ClusterLayer] = []
    loop = _expert_loop(packer, source, config, modulations, pdl) if expert == "loop" else None
    for i in range(config.expert.depth):
        stem = f"{EXPERT}layers.{i}."
        if expert == "loop":
            break
        if expert == "cluster":
            cluster.append(_cluster_layer(packer, stem, config, modulations, i, pdl))
        elif expert == "fused":
            fused.append(_fused_layer(packer, stem, config.expert, modulations, i))
        else:
            split.append(_gemma_layer(packer, source, stem, config.expert, last=False))
    return DeviceWeights(
        config=config,
        dtype=dtype,
        patch=patch.contiguous(),
        patch_bias=(position + source(embeddings + "patch_embedding.bias").float()).contiguous(),
        vision=vision,
        post_norm=_layer_norm(source, VISION + "post_layernorm"),
        projector=Projection([packer.one(PROJECTOR[:-1])], dtype, source(PROJECTOR + "bias")),
        embedding=source(PREFIX + "embed_tokens.weight").to(dtype),
        prefix=prefix,
        expert=split,
        fused=fused,
        cluster=cluster,
        loop=loop,
        modulations=modulations,
        flow=FlowWeights(
            out_weight=source("action_out_proj.weight").float().contiguous(),
            out_bias=source("action_out_proj.bias").float(),
            in_weight=source("action_in_proj.weight").float().contiguous(),
            in_bias=source("action_in_proj.bias").float(),
        ),
        routes=packer.routes,
    )


class _Packer:
    """Packs sites on demand and notes which route each kind of site took."""

    def __init__(
        self,
        source: Source,
        precisions: Mapping[str, str],
        packed: Mapping[str, Packed],
        dtype: torch.dtype,
        report: Report,
    ) -> None:
        self._source, self._precisions, self._held, self._report = source, precisions, packed, report
        self.dtype = dtype
        self.routes: dict[str, str] = {}

    def precision(self, site: str) -> str:
        return self._precisions[site]

    def many(self, *sites: str) -> list[Packed]:
        """The packed weights of sites that one product serves."""
        wanted = {site: self._precisions[site] for site in sites}

        def read(site: str) -> Tensor:
            return self._source(site + ".weight")

        result = dict(pack_sites(read, wanted, self._held))
        for site in sites:
            self._report(site.rpartition(".")[2])
        return [self._matched(site, result[site]) for site in sites]

    def one(self, site: str) -> Packed:
        return self.many(site)[0]

    def _matched(self, site: str, weight: Packed) -> Packed:
        return weight.to(self.dtype) if self._precisions[site] == "bf16" and isinstance(weight, Tensor) else weight

    def note(self, part: str, route: str) -> None:
        self.routes[part] = route


def _layer_norm(source: Source, name: str) -> tuple[Tensor, Tensor]:
    return source(name + ".weight").float(), source(name + ".bias").float()


def _vision_layer(packer: _Packer, source: Source, stem: str) -> VisionLayer:
    attention, mlp = stem + "self_attn.", stem + "mlp."
    heads = [attention + leaf for leaf in ("q_proj", "k_proj", "v_proj")]
    norm1, norm2 = _layer_norm(source, stem + "layer_norm1"), _layer_norm(source, stem + "layer_norm2")
    qkv, fc1, fc2 = packer.many(*heads), packer.one(mlp + "fc1"), packer.one(mlp + "fc2")
    out = packer.one(attention + "out_proj")
    fc1_bias = source(mlp + "fc1.bias")
    scale1 = norm_output_scale(*norm1) if isinstance(qkv[0], FP8Tensor) else None
    scale2, scale3 = None, None
    if isinstance(fc1, FP8Tensor):
        scale2 = norm_output_scale(*norm2)
        scale3 = product_scale(dense(fc1), fc1_bias.float(), *norm2)
    seen = None
    if isinstance(out, FP8Tensor):  # what attention gives lies between the values' extremes
        seen = product_scale(dense(qkv[2]), source(heads[2] + ".bias").float(), *norm1)
    fc1, fc1_bias, fc2 = padded_between(fc1, fc1_bias, fc2)
    layer = VisionLayer(
        norm1=norm1 if scale1 is None else folded(norm1, scale1),
        qkv=Projection(qkv, packer.dtype, torch.cat([source(s + ".bias") for s in heads]), input_scale=scale1),
        out=Projection([out], packer.dtype, input_scale=seen),
        out_bias=source(attention + "out_proj.bias").float(),
        norm2=norm2 if scale2 is None else folded(norm2, scale2),
        fc1=Projection([fc1], packer.dtype, fc1_bias, input_scale=scale2),
        fc2=Projection([fc2], packer.dtype, input_scale=scale3),
        fc2_bias=source(mlp + "fc2.bias").float(),
        seen_scale=seen,
    )
    for name, product in (("qkv", layer.qkv), ("out", layer.out), ("fc1", layer.fc1), ("fc2", layer.fc2)):
        packer.note(f"vision.{name}", product.route)
    return layer


def _gemma_layer(packer: _Packer, source: Source, stem: str, config: GemmaConfig, *, last: bool) -> GemmaLayer:
    attention, mlp = stem + "self_attn.", stem + "mlp."
    plain = stem.startswith(PREFIX)

    def norm(name: str) -> Tensor | None:
        return 1.0 + source(f"{stem}{name}.weight").float() if plain else None

    if last:  # only its keys and values are ever read
        qkv = Projection(packer.many(attention + "k_proj", attention + "v_proj"), packer.dtype)
        return GemmaLayer(norm("input_layernorm"), qkv)
    heads = [attention + leaf for leaf in ("q_proj", "k_proj", "v_proj")]
    gate, up = packer.many(mlp + "gate_proj", mlp + "up_proj")
    mlp_in: Projection | PackedGateUp
    if isinstance(gate, NVFP4Tensor) or isinstance(up, NVFP4Tensor):
        mlp_in = prepare_gate_up(gate, up, packer.precision(mlp + "gate_proj"))  # type: ignore[arg-type]
    else:
        mlp_in = Projection([gate, up], packer.dtype)
    down = packer.one(mlp + "down_proj")
    layer = GemmaLayer(
        norm1=norm("input_layernorm"),
        qkv=Projection(packer.many(*heads), packer.dtype),
        norm2=norm("post_attention_layernorm"),
        out=Projection([packer.one(attention + "o_proj")], packer.dtype),
        mlp_in=mlp_in,
        down=Projection([down], packer.dtype, precision=packer.precision(mlp + "down_proj")),
    )
    if plain and all(isinstance(weight, FP8Tensor) for weight in (gate, up, down)):
        layer.act_factor = affordable_row_factor(dense(gate), dense(up), dense(down))
    part = "prefix" if plain else "expert"
    for name, product in (
        ("qkv", layer.qkv),
        ("o", layer.out),
        ("gate_up", layer.mlp_in),
        ("down", layer.down),
    ):
        packer.note(f"{part}.{name}", product.route if product is not None else "none")
    return layer


def _fused_layer(packer: _Packer, stem: str, config: GemmaConfig, modulations: Modulations, index: int) -> FusedLayer:
    attention, mlp = stem + "self_attn.", stem + "mlp."
    weights = packer.many(*(attention + leaf for leaf in ("q_proj", "k_proj", "v_proj")))
    if isinstance(weights[0], FP8Tensor):
        stacked = [w for w in weights if isinstance(w, FP8Tensor)]
        values = torch.cat([w.values.view(torch.uint8) for w in stacked]).view(torch.float8_e4m3fn)
        scale = torch.cat([w.scale.expand(w.shape[0]) for w in stacked])
        qkv = FusedQKV(values, config.heads, config.kv_heads, config.head_dim, weight_scale=scale)
    else:
        dense = torch.cat([w for w in weights if isinstance(w, Tensor)])
        qkv = FusedQKV(dense, config.heads, config.kv_heads, config.head_dim)
    o_site, down_site = attention + "o_proj", mlp + "down_proj"
    out = prepare(packer.one(o_site), packer.precision(o_site))  # type: ignore[arg-type]
    gate, up = packer.many(mlp + "gate_proj", mlp + "up_proj")
    gate_up = prepare_gate_up(gate, up, packer.precision(mlp + "gate_proj"))  # type: ignore[arg-type]
    down = prepare(packer.one(down_site), packer.precision(down_site))  # type: ignore[arg-type]
    shift1, shift2 = modulations.shift[2 * index, :, 0], modulations.shift[2 * index + 1, :, 0]
    gate_shift, up_shift = gate_up.shift_rows(shift2)
    packer.note("expert.qkv", "Triton fused norm + projection + RoPE")
    for name, product in (("o", out), ("gate_up", gate_up), ("down", down)):
        packer.note(f"expert.{name}", product.route)
    return FusedLayer(
        qkv,
        out,
        gate_up,
        down,
        qkv.shift_rows(shift1).contiguous(),
        gate_shift.contiguous(),
        up_shift.contiguous(),
    )


def _cluster_layer(
    packer: _Packer, stem: str, config: Pi05Config, modulations: Modulations, index: int, pdl: bool
) -> ClusterLayer:
    attention, mlp, gemma = stem + "self_attn.", stem + "mlp.", config.expert

    def gemm(epilogue: int, *sites: str) -> expert_kernels.ExpertGemm:
        heads = (gemma.heads, gemma.kv_heads, gemma.head_dim)
        return expert_kernels.ExpertGemm(packer.many(*sites), epilogue, config.horizon, heads=heads, pdl=pdl)

    qkv = gemm(expert_kernels.QKV, *(attention + leaf for leaf in ("q_proj", "k_proj", "v_proj")))
    out = gemm(expert_kernels.RESIDUAL, attention + "o_proj")
    gate_up = gemm(expert_kernels.GEGLU, mlp + "gate_proj", mlp + "up_proj")
    down = gemm(expert_kernels.RESIDUAL, mlp + "down_proj")
    shift1, shift2 = modulations.shift[2 * index, :, 0], modulations.shift[2 * index + 1, :, 0]
    layer = ClusterLayer(qkv, out, gate_up, down, qkv.shift_rows(shift1), gate_up.shift_rows(shift2))
    for name, product in (("qkv", qkv), ("o", out), ("gate_up", gate_up), ("down", down)):
        product.forget_source()
        packer.note(f"expert.{name}", product.route)
    return layer


def _most_value(source: Source, layer: int) -> float:
    """No value of the prefix's layer is larger, whatever the images: a normalised row has ‖n‖ ≤ √K (Cauchy-Schwarz)."""
    stem = f"{PREFIX}layers.{layer}."
    rows = source(stem + "self_attn.v_proj.weight").float() * (1.0 + source(stem + "input_layernorm.weight").float())
    return float(rows.norm(dim=1).amax()) * rows.shape[1] ** 0.5


def _expert_loop(
    packer: _Packer, source: Source, config: Pi05Config, modulations: Modulations, pdl: bool, *, eight: bool = True
) -> ExpertLoop:
    """eight: activations in E4M3 too where all sites are FP8, unless a layer's rows are too uneven for one scale."""
    gemma = config.expert
    capacity = config.prefix_tokens + config.horizon
    loop: ExpertLoop | None = None
    for i in range(gemma.depth):
        attention, mlp = f"{EXPERT}layers.{i}.self_attn.", f"{EXPERT}layers.{i}.mlp."
        stages = {
            "qkv": packer.many(*(attention + leaf for leaf in ("q_proj", "k_proj", "v_proj"))),
            "o": packer.many(attention + "o_proj"),
            "gate_up": packer.many(mlp + "gate_proj", mlp + "up_proj"),
            "down": packer.many(mlp + "down_proj"),
        }
        if loop is None:
            formats = {name: expert_kernels.format_of(weights[0]) for name, weights in stages.items()}
            if eight and set(formats.values()) == {"e4m3"}:
                formats = dict.fromkeys(formats, "w8a8")
            device = modulations.scale.device
            chunk = (config.horizon, config.max_action_dim)
            loop = ExpertLoop(gemma.depth, config.num_steps, *chunk, capacity, formats, device, pdl=pdl)
        scales, shifts, gates = (
            (table[2 * i, :, 0], table[2 * i + 1, :, 0])
            for table in (modulations.scale, modulations.shift, modulations.gate)
        )
        for name, weights in stages.items():
            place = {"qkv": 0, "gate_up": 1}.get(name)
            loop.pack(i, name, weights, *(() if place is None else (shifts[place], scales[place])))
        if formats["down"] == "w8a8":
            gate, up, down = (dense(weight) for weight in (*stages["gate_up"], *stages["down"]))
            factor = float(loop.act_scale[i]) / gate.shape[1]  # of the square of a normalised row's length
            loss = max(gated_row_loss(gate * norm, up * norm, down, factor) for norm in scales[1])
            if loss > MOST_LOSS:
                packer.note("expert.down", f"layer {i} would lose {loss:.1f} dB with GeGLU's results in FP8: bf16")
                del loop
                return _expert_loop(packer, source, config, modulations, pdl, eight=False)
        loop.modulate(i, scales, gates, _most_value(source, i) if formats["down"] == "w8a8" else 0.0)
    assert loop is not None
    packer.note("expert", loop.route)
    return loop
