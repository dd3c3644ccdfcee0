"""The vision stage alone with its norm behind attention in out's launch (kernels/norm_product.py) and apart, in FP8.

    python benchmarks/vision_norms.py --out results/

Microseconds a pass from images to features, the median of 60 replays of a graph; the error is against norms apart.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch
from engine import CAMERAS, OFF, RandomWeights
from hybrid_policy.models.config import PI05_FULL, Pi05Config
from hybrid_policy.runtime.device_model import DeviceModel
from hybrid_policy.runtime.device_weights import build_weights
from hybrid_policy.runtime.loading import device_precisions
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.sites import model_sites
from hybrid_policy.runtime.stages import parse_table
from stage_rows import chain, note, relative, write

DEVICE = torch.device("cuda")


def vision_alone(views: int) -> Pi05Config:
    """pi0.5 with one layer of prefix and expert, which are not run."""
    prefix, expert = (dataclasses.replace(part, depth=1) for part in (PI05_FULL.prefix, PI05_FULL.expert))
    return PI05_FULL.replace(cameras=CAMERAS[:views], prefix=prefix, expert=expert)


def vision(views: int) -> None:
    """Apart, together, and apart again."""
    config = vision_alone(views)
    precisions = device_precisions(load_recipe("h100"), model_sites(config), DEVICE)
    weights = build_weights(config, RandomWeights(config), precisions, dtype=torch.bfloat16, expert="split")
    size = config.image_size
    images = torch.randint(0, 256, (views, size, size, 3), dtype=torch.uint8, device=DEVICE)
    expected = None
    for choice in ("apart", "out", "apart"):
        table = parse_table(f"vision_norm={choice},expert=split")
        model = DeviceModel(weights, table, OFF, torch.bfloat16, views)
        microseconds = chain(lambda m=model: m.run_vision(SimpleNamespace(images=images)), launches=1, replays=60)
        expected = model.features.clone() if expected is None else expected
        note(
            f"vision stage FP8, vision_norm={choice}",
            f"{views} views",
            microseconds,
            relative(model.features, expected),
        )


def main() -> None:
    """Two views and three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for vision_norms.csv")
    args = parser.parse_args()
    with torch.inference_mode():
        for views in (2, 3):
            vision(views)
    if args.out:
        write(args.out / "vision_norms.csv")


if __name__ == "__main__":
    main()
