"""The expert's adaptive norms at every flow time: what remains of them when the times are known at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.flow import step_times, time_embedding
from hybrid_policy.models.pi05 import EXPERT


@dataclass
class Modulations:
    """adaRMS of each norm: [sites, steps, 2, width]; row 0 at the step's time, row 1 at time 0 (given actions).

    scale is 1 + scale. gate belongs to what follows the norm. Row 0 of each in bf16 and float32, for fused stages.
    """

    scale: Tensor
    shift: Tensor
    gate: Tensor

    def fused_scale(self) -> Tensor:
        """bf16 [sites, steps, width], contiguous."""
        return self.scale[:, :, 0].to(torch.bfloat16).contiguous()


def modulations_of(config: Pi05Config, source: Callable[[str], Tensor]) -> Modulations:
    """All 2 * depth + 1 adaptive norms at each flow time and at 0; their weights are not kept."""
    steps = config.num_steps
    device = source("time_mlp_in.bias").device
    times = torch.tensor([*step_times(steps), 0.0], dtype=torch.float32, device=device)
    x = time_embedding(times, config.expert.width, config.min_period, config.max_period)
    for name in ("time_mlp_in", "time_mlp_out"):
        x = F.silu(F.linear(x, source(name + ".weight").float(), source(name + ".bias").float()))
    names = [
        f"{EXPERT}layers.{i}.{norm}"
        for i in range(config.expert.depth)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    tables = []
    for name in [*names, EXPERT + "norm"]:
        y = F.linear(x, source(name + ".dense.weight").float(), source(name + ".dense.bias").float())
        tables.append(torch.stack((y[:steps], y[steps:].expand(steps, -1)), 1))  # [steps, 2, 3 * width]
    scale, shift, gate = torch.stack(tables).chunk(3, -1)
    return Modulations((1.0 + scale).contiguous(), shift.contiguous(), gate.contiguous())
