"""Vision's attention (kernels/vision_attention.cu), plan by plan: in a chain of launches, and in the whole stage.

    python benchmarks/vision_attention.py --parts check,chain,stage --out results/

The error of a chain's row is against float64, that of a stage's against the stage with the first plan. Microseconds:
the median of 15 replays of a graph of 12 dependent launches; of a stage, the median of five rounds in which the plans
take turns, each with a graph of its own (a stage differs by 1 % from graph to graph), 40 replays in each.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from engine import OFF, RandomWeights
from hybrid_policy.kernels import vision_attention as kernel
from hybrid_policy.kernels.vision_attention import AttentionPlan, vision_attention, vision_attention_reference
from hybrid_policy.runtime.device_model import DeviceModel
from hybrid_policy.runtime.device_weights import build_weights
from hybrid_policy.runtime.loading import device_precisions
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.sites import model_sites
from hybrid_policy.runtime.stages import parse_table
from stage_rows import ROWS, chain, guarded, note, relative, write
from vision_norms import vision_alone

DEVICE = torch.device("cuda")
HEADS, TOKENS, HEAD_DIM = 16, 256, 72
SCALE = 0.02

#: (tiles of a block, blocks of a cluster, keys of a part)
PLANS = [(1, 1, 128), (1, 2, 128), (1, 4, 128), (1, 2, 256), (2, 1, 128), (2, 2, 128), (2, 2, 256)]
#: of views of fewer tokens
SHORT_PLANS = [(1, 1, 64), (2, 1, 64), (1, 3, 64)]


def plans(tokens: int = TOKENS, head_dim: int = HEAD_DIM) -> list[AttentionPlan]:
    """Those of the list that fit the tokens."""
    found = []
    for tiles, cluster, part in PLANS if tokens == TOKENS else SHORT_PLANS:
        blocks = tokens // 64 // tiles
        if tokens // 64 % tiles == 0 and blocks % cluster == 0:
            found.append(AttentionPlan(tokens, head_dim, tiles, cluster, part))
    return found


def name(plan: AttentionPlan) -> str:
    """For the table."""
    return f"{plan.tiles} tiles, clusters of {plan.cluster}, {plan.part} keys"


def compile_all(chosen: list[AttentionPlan], heads: int, quantise: bool) -> None:
    """Side by side."""

    def one(plan: AttentionPlan) -> None:
        torch.cuda.set_device(0)
        kernel._kernel(plan, heads, quantise, True, kernel.SPIN_LIMIT, 0)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(partial(guarded, one), chosen))


def expected(qkv: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    """In float64."""
    return vision_attention_reference(qkv.double(), heads, tokens, None)


def check(views: int, heads: int, tokens: int, head_dim: int) -> None:
    """Each plan in both formats against float64, twice; and a key that is not a number."""
    qkv = torch.randn(views * tokens, 3 * heads * head_dim, device=DEVICE, dtype=torch.bfloat16) * 1.5
    whole = expected(qkv, heads, tokens)
    ill = qkv.clone()
    ill[3, heads * head_dim] = float("nan")  # the first head's key of the first view
    for quantise in (False, True):
        compile_all(plans(tokens, head_dim), heads, quantise)
    for plan in plans(tokens, head_dim):
        for scale, bound in ((None, 6e-3), (SCALE, 4e-2)):
            call = partial(vision_attention, heads=heads, tokens=tokens, out_scale=scale, pdl=True, plan=plan)
            out, again = call(qkv), call(qkv)
            error = relative(out.float() * (scale or 1.0), whole)
            bad = call(ill).float().isnan()
            contained = bool(bad[:tokens, :head_dim].all()) and int(bad.sum()) == tokens * head_dim
            same = bool(torch.equal(out.view(torch.uint8), again.view(torch.uint8)))
            text = f"{views} x {heads} x {tokens} x {head_dim}, {name(plan)}, {'bf16' if scale is None else 'FP8'}"
            verdict = "right" if error < bound and contained and same else "WRONG"
            print(f"{verdict} {text}: error {error:.2e}, NaN contained {contained}, repeatable {same}", flush=True)


def chains(views: int, scale: float | None) -> None:
    """Dependent launches over four inputs in turn."""
    stacked = [torch.randn(views * TOKENS, 3 * 1152, device=DEVICE, dtype=torch.bfloat16) * 1.5 for _ in range(4)]
    whole = expected(stacked[0], HEADS, TOKENS)
    for plan in plans():

        def timed(plan: AttentionPlan = plan) -> None:
            call = partial(vision_attention, heads=HEADS, tokens=TOKENS, out_scale=scale, pdl=True, plan=plan)
            error = relative(call(stacked[0]).float() * (scale or 1.0), whole)
            runs = [lambda s=s: call(s) for s in stacked]
            text = f"attention {'bf16' if scale is None else 'FP8'}, {name(plan)}"
            note(text, f"{views} views", chain(*runs), error)

        guarded(timed)


def stage(views: int, recipe: str) -> None:
    """From images to features."""
    config = vision_alone(views)
    precisions = device_precisions(load_recipe(recipe), model_sites(config), DEVICE)
    weights = build_weights(config, RandomWeights(config), precisions, dtype=torch.bfloat16, expert="split")
    size = config.image_size
    images = torch.randint(0, 256, (views, size, size, 3), dtype=torch.uint8, device=DEVICE)
    model = DeviceModel(weights, parse_table("expert=split"), OFF, torch.bfloat16, views)
    times: dict[str, list[float]] = {name(plan): [] for plan in plans()}
    features: dict[str, torch.Tensor] = {}
    for _ in range(5):
        for plan in plans():
            model._glue["vision_attention"] = partial(vision_attention, pdl=True, plan=plan)
            run = partial(model.run_vision, SimpleNamespace(images=images))
            times[name(plan)].append(chain(run, launches=1, replays=40))
            features[name(plan)] = model.features.clone()
    first = next(iter(features.values()))
    for text, found in times.items():
        error = relative(features[text], first)
        note(f"vision stage {recipe}, attention {text}", f"{views} views", statistics.median(found), error)


def main() -> None:
    """Two views and three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,chain,stage", help="some of check, chain, stage")
    parser.add_argument("--recipes", default="h100,bf16", help="of the stage")
    parser.add_argument("--views", default="2,3", help="of chain and stage")
    parser.add_argument("--out", type=Path, help="a folder for vision_attention_*.csv")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        if "check" in args.parts:
            kernel.SPIN_LIMIT = 1 << 20
            for shape in ((2, 16, 256, 72), (3, 2, 128, 80), (1, 2, 64, 64), (2, 3, 192, 40)):
                guarded(check, *shape)
            kernel.SPIN_LIMIT = 0
        views = [int(text) for text in args.views.split(",")]
        if "chain" in args.parts:
            compile_all(plans(), HEADS, True)
            for each in views:
                guarded(chains, each, SCALE)
        if "stage" in args.parts:
            for recipe in args.recipes.split(","):
                compile_all(plans(), HEADS, recipe == "h100")
                for each in views:
                    guarded(stage, each, recipe)
    if args.out and ROWS:
        write(args.out / f"vision_attention_{args.parts.replace(',', '_')}.csv")


if __name__ == "__main__":
    main()
