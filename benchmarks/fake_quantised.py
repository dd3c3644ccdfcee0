"""What a recipe does to the action at full size, worked out in the plain model: for precisions a device cannot run.

Each site's weights and activations are rounded as the recipe says (`runtime.sites.ReferenceSite`) and multiplied in
float32; actions are compared with the unrounded model's, same noise, random weights and observations. This is not a
measurement of kernels: it says what the number formats cost, on an H100 also for W4A4, which it has no instruction for.

    python benchmarks/fake_quantised.py --recipes w4a4,seed --observations 8 --out results/
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch
from engine import CASES, DEVICE, PlainModel, RandomWeights, free, observation
from hybrid_policy.models.config import PI05_FULL
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.sites import model_sites, pack_sites, swap_sites


def main() -> int:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="w4a4,seed,fp8")
    parser.add_argument("--case", default="2x48", choices=CASES)
    parser.add_argument("--observations", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    views, tokens = CASES[args.case]
    config = PI05_FULL.replace(cameras=PI05_FULL.cameras[:views])
    source = RandomWeights(config)
    cases = [observation(config, seed, tokens) for seed in range(args.observations)]
    plain = PlainModel(config, source, torch.float32)
    expected = [plain.actions(*case) for case in cases]
    del plain
    rows = []
    for name in args.recipes.split(","):
        free()
        begin = time.perf_counter()
        model = PlainModel(config, source, torch.float32)
        with torch.inference_mode():
            precisions = load_recipe(name).assign(model_sites(config))
            packed = pack_sites(lambda site: source(site + ".weight"), precisions)
            swap_sites(model.model, packed, precisions)
        cosines, errors = [], []
        for case, reference in zip(cases, expected, strict=True):
            ours = model.actions(*case).astype(np.float64)
            ref = reference.astype(np.float64)
            cosines.append(float((ours * ref).sum() / np.linalg.norm(ours) / np.linalg.norm(ref)))
            errors.append(float(np.linalg.norm(ours - ref) / np.linalg.norm(ref)))
        rows.append({
            "case": args.case, "recipe": name, "observations": len(cases), "cosine_min": min(cosines),
            "cosine_mean": float(np.mean(cosines)), "error_mean": float(np.mean(errors)), "error_max": max(errors),
            "how": "rounded in the plain float32 model", "date": time.strftime("%Y-%m-%d"),
        })  # fmt: skip
        print(rows[-1], f"{time.perf_counter() - begin:.1f} s", flush=True)
        del model
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "fake_quantised.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(torch.cuda.get_device_name(DEVICE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
