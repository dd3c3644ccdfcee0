"""The prefix's down product by the library and by pairs of blocks, alone and in the whole prefix.

Run by ``prefix_stages.py --parts down``; the product's time is that in a chain of its like, the prefix's that of a
graph.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from engine import CAMERAS, OFF, RandomWeights
from hybrid_policy.kernels import down_product as down
from hybrid_policy.models.config import PI05_FULL, Pi05Config
from hybrid_policy.runtime.cuda_backend import row_buckets
from hybrid_policy.runtime.device_model import DeviceModel
from hybrid_policy.runtime.device_weights import build_weights
from hybrid_policy.runtime.loading import device_precisions
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.sites import model_sites
from hybrid_policy.runtime.stages import parse_table
from stage_rows import chain, guarded, layers, note, relative

DEVICE = torch.device("cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
#: clocks between passes, as long as the engine's other stages take
REST = 9_000_000
#: of the engine's graphs: 48, 96, 144, 192 and 200 tokens behind one to three views
GRAPH_ROWS = tuple(row for views in (1, 2, 3) for row in row_buckets(views, 256, 200))
WIDTH, MLP = PI05_FULL.prefix.width, PI05_FULL.prefix.mlp_dim


def inputs(rows: int, eight: bool) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    """Activations, several layers' weights, and the product's scale."""
    x = torch.randn(rows, MLP, device=DEVICE)
    dense = (torch.randn(WIDTH, MLP, device=DEVICE) for _ in range(layers(WIDTH * MLP * (1 if eight else 2))))
    if eight:
        return (x * 32).to(FP8), [(w * 32).to(FP8) for w in dense], MLP**-0.5 / 1024
    return x.to(BF16), [(w * MLP**-0.5).to(BF16) for w in dense], 1.0


def product(rows: int, eight: bool) -> None:
    """The library's, ours and the library's again, against float64."""
    x, ws, scale = inputs(rows, eight)
    shape, kind = f"{rows}x{WIDTH}x{MLP}", "FP8" if eight else "bf16"
    expected = down.down_reference(x, ws[0], scale)
    one, factor = (torch.full((), value, device=DEVICE) for value in (1.0, scale))

    def library(w: torch.Tensor) -> torch.Tensor:
        if not eight:
            return F.linear(x, w)
        return torch._scaled_mm(x, w.t(), one, factor, out_dtype=BF16, use_fast_accum=True)

    def own(w: torch.Tensor) -> torch.Tensor:
        return down.down_product(x, w, scale, pdl=True)

    def timed(text: str, call) -> None:
        first = call(ws[0]).clone()
        again = all(torch.equal(first, call(ws[0])) for _ in range(3))
        calls = [lambda w=w: call(w) for w in ws]
        error = relative(first, expected)
        note(f"down {kind} {text}{'' if again else ' DIFFERS'}", shape, chain(*calls, launches=len(ws)), error)

    timed("library", library)
    timed("pairs", own)
    timed("library, again", library)


def prefix_alone() -> Pi05Config:
    """pi0.5 with one layer of vision, which is not run."""
    return PI05_FULL.replace(cameras=CAMERAS, vision=dataclasses.replace(PI05_FULL.vision, depth=1))


def whole(recipe: str, config: Pi05Config) -> None:
    """The prefix from features to keys and values, each way twice; the error is that of the last layer's against the
    library's: it is made of E4M3's roundings, which a change in the last place turns over."""
    precisions = device_precisions(load_recipe(recipe), model_sites(config), DEVICE)
    weights = build_weights(config, RandomWeights(config), precisions, dtype=BF16, expert="split")
    for views, tokens in ((2, 48), (2, 200), (3, 200)):
        rows = views * config.image_tokens + tokens
        given = SimpleNamespace(
            tokens=torch.randint(0, config.vocab_size, (config.max_token_len,), device=DEVICE),
            rows=torch.arange(rows, device=DEVICE),
            valid=torch.full((1,), rows, dtype=torch.int32, device=DEVICE),
        )
        features = torch.randn(views * config.image_tokens, config.prefix.width, device=DEVICE)
        expected = None
        for choice in ("library", "hopper", "library", "hopper"):
            model = DeviceModel(weights, parse_table(f"down={choice},expert=split"), OFF, BF16, views)
            model.features.copy_(features)
            microseconds = chain(lambda m=model, g=given, r=rows: m.run_prefix(g, r), launches=1, replays=60, rest=REST)
            cache = torch.cat((model.keys[-1, :rows], model.values[-1, :rows]))
            expected = cache.clone() if expected is None else expected
            error = relative(cache, expected)
            note(f"prefix {recipe}, down={choice}", f"{views} views, {rows} rows", microseconds, error)


def products(rows: int) -> None:
    """Alone, FP8 and bf16."""
    for eight in (True, False):
        guarded(product, rows, eight)


def prefixes() -> None:
    """Whole, of both recipes."""
    for recipe in ("h100", "bf16"):
        guarded(whole, recipe, prefix_alone())
