"""What each stage of pi0.5 must at least cost on a device: operations and bytes over measured ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_policy.models.config import Pi05Config

BYTES = {"bf16": 2.0, "fp8_w8a8": 1.0, "nvfp4_w4a16": 0.5625, "nvfp4_w4a4": 0.5625}


@dataclass(frozen=True)
class Ceilings:
    """Of one device: bytes/s of device memory, operations/s of the tensor cores."""

    name: str
    bandwidth: float
    bf16: float
    fp8: float
    fp4: float = 0.0

    def rate(self, precision: str) -> float:
        """Operations/s that a precision's product runs at."""
        if precision == "fp8_w8a8":
            return self.fp8
        return self.fp4 if precision == "nvfp4_w4a4" and self.fp4 else self.bf16


#: measured on the device (copy; 8192^3 products)
H100 = Ceilings("NVIDIA H100 80GB HBM3", 3.0e12, 768e12, 1325e12)
#: vendors' data sheets, dense; used for calculated tables only
CALCULATED = {
    "Jetson AGX Thor": Ceilings("Jetson AGX Thor", 273e9, 259e12, 517e12, 1035e12),
    "RTX 5090": Ceilings("RTX 5090", 1792e9, 209.5e12, 419e12, 1676e12),
    "RTX PRO 6000 Blackwell": Ceilings("RTX PRO 6000 Blackwell", 1792e9, 252e12, 503e12, 2015e12),
    "B200": Ceilings("B200", 8.0e12, 2250e12, 4500e12, 9000e12),
}


def stage_floors(
    config: Pi05Config, precisions: Mapping[str, str], views: int, tokens: int, device: Ceilings
) -> dict[str, float]:
    """Seconds of vision, prefix and denoise: each site's larger of (operations, bytes of weights), summed.

    Attention products are counted as operations in bf16; activations' bytes are not counted (they fit the L2).
    """
    patches = config.image_tokens
    rows = {
        "vision_tower": views * patches,
        "projector": views * patches,
        "language_model": views * patches + tokens,
    }
    floors = dict.fromkeys(("vision", "prefix", "denoise"), 0.0)
    last = f"language_model.layers.{config.prefix.depth - 1}."
    shapes = site_shapes(config)
    for site, precision in precisions.items():
        n, k = shapes[site]
        weight = n * k * BYTES[precision] / device.bandwidth
        if "gemma_expert" in site:
            per_step = max(weight, 2 * config.horizon * n * k / device.rate(precision))
            floors["denoise"] += config.num_steps * per_step
            continue
        if last in site and not site.endswith(("k_proj", "v_proj")):
            continue
        part = next(name for name in rows if name in site)
        work = max(weight, 2 * rows[part] * n * k / device.rate(precision))
        floors["prefix" if part == "language_model" else "vision"] += work
    gemma, vision = config.prefix, config.vision
    prefix_rows = rows["language_model"]
    floors["vision"] += 4 * vision.depth * views * patches**2 * vision.width / device.bf16
    floors["prefix"] += 4 * (gemma.depth - 1) * prefix_rows**2 * gemma.heads * gemma.head_dim / device.bf16
    keys = prefix_rows + config.horizon
    attention = 4 * config.horizon * keys * config.expert.heads * config.expert.head_dim / device.bf16
    floors["denoise"] += config.num_steps * config.expert.depth * attention
    return floors


def site_shapes(config: Pi05Config) -> dict[str, tuple[int, int]]:
    """Site -> (out_features, in_features)."""
    from hybrid_policy.runtime.sites import model_sites

    return model_sites(config)
