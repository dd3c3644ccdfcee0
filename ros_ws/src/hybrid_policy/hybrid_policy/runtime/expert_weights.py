"""The action expert's weights, for each of the launches that may run it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_policy.kernels import expert as expert_kernels
from hybrid_policy.kernels.expert_loop import ExpertLoop
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.kernels.gate_up import PackedGateUp, prepare_gate_up
from hybrid_policy.kernels.linear import PackedLinear, prepare
from hybrid_policy.kernels.qkv import FusedQKV
from hybrid_policy.models.config import GemmaConfig, Pi05Config
from hybrid_policy.models.pi05 import EXPERT, PREFIX
from hybrid_policy.runtime.modulations import Modulations
from hybrid_policy.runtime.packer import Packer, Source
from hybrid_policy.runtime.sites import dense
from hybrid_policy.runtime.static_scales import MOST_LOSS, gated_row_loss


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


def fused_layer(packer: Packer, stem: str, config: GemmaConfig, modulations: Modulations, index: int) -> FusedLayer:
    """Pack layer ``index``, whose sites begin with ``stem``, for Triton's fused kernels."""
    attention, mlp = stem + "self_attn.", stem + "mlp."
    weights = packer.many(*(attention + leaf for leaf in ("q_proj", "k_proj", "v_proj")))
    if isinstance(weights[0], FP8Tensor):
        stacked = [w for w in weights if isinstance(w, FP8Tensor)]
        values = torch.cat([w.values.view(torch.uint8) for w in stacked]).view(torch.float8_e4m3fn)
        scale = torch.cat([w.scale.expand(w.shape[0]) for w in stacked])
        qkv = FusedQKV(values, config.heads, config.kv_heads, config.head_dim, weight_scale=scale)
    else:
        plain = torch.cat([w for w in weights if isinstance(w, Tensor)])
        qkv = FusedQKV(plain, config.heads, config.kv_heads, config.head_dim)
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


def cluster_layer(
    packer: Packer, stem: str, config: Pi05Config, modulations: Modulations, index: int, pdl: bool
) -> ClusterLayer:
    """The same for the cluster kernels."""
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


def _most_value(packer: Packer, source: Source, layer: int) -> float:
    """No value of the prefix's layer is larger, whatever the images: a normalised row has ‖n‖ ≤ √K (Cauchy-Schwarz)."""
    stem = f"{PREFIX}layers.{layer}."
    rows = packer.multiplied(stem + "self_attn.v_proj") * (1.0 + source(stem + "input_layernorm.weight").float())
    return float(rows.norm(dim=1).amax()) * rows.shape[1] ** 0.5


def expert_loop(
    packer: Packer, source: Source, config: Pi05Config, modulations: Modulations, pdl: bool, *, eight: bool = True
) -> ExpertLoop:
    """Pack all layers for the loop kernel.

    eight: activations in E4M3 too where all sites are FP8, unless a layer's rows are too uneven for one scale.
    """
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
                return expert_loop(packer, source, config, modulations, pdl, eight=False)
        loop.modulate(i, scales, gates, _most_value(packer, source, i) if formats["down"] == "w8a8" else 0.0)
    assert loop is not None
    packer.note("expert", loop.route)
    return loop
