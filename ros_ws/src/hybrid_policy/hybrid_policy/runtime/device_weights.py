"""A model's weights in the form that the device stages read: packed sites, folded norms, modulation tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_policy.kernels.expert_loop import ExpertLoop
from hybrid_policy.kernels.flow_step import FlowWeights
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.kernels.gate_up import PackedGateUp, prepare_gate_up
from hybrid_policy.kernels.nvfp4 import NVFP4Tensor
from hybrid_policy.kernels.prefix_inputs import padded_patch
from hybrid_policy.models.config import GemmaConfig, Pi05Config
from hybrid_policy.models.pi05 import EXPERT, PREFIX, PROJECTOR, VISION
from hybrid_policy.runtime.expert_weights import ClusterLayer, FusedLayer, cluster_layer, expert_loop, fused_layer
from hybrid_policy.runtime.modulations import Modulations, modulations_of
from hybrid_policy.runtime.packer import Packer, Report, Source
from hybrid_policy.runtime.projection import Projection, padded_between
from hybrid_policy.runtime.sites import Packed, dense
from hybrid_policy.runtime.static_scales import (
    affordable_row_factor,
    folded,
    norm_output_scale,
    product_scale,
)


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
    packer = Packer(source, precisions, packed or {}, dtype, report)
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
    loop = expert_loop(packer, source, config, modulations, pdl) if expert == "loop" else None
    for i in range(config.expert.depth):
        stem = f"{EXPERT}layers.{i}."
        if expert == "loop":
            break
        if expert == "cluster":
            cluster.append(cluster_layer(packer, stem, config, modulations, i, pdl))
        elif expert == "fused":
            fused.append(fused_layer(packer, stem, config.expert, modulations, i))
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


def _layer_norm(source: Source, name: str) -> tuple[Tensor, Tensor]:
    return source(name + ".weight").float(), source(name + ".bias").float()


def _vision_layer(packer: Packer, source: Source, stem: str) -> VisionLayer:
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


def _gemma_layer(packer: Packer, source: Source, stem: str, config: GemmaConfig, *, last: bool) -> GemmaLayer:
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
