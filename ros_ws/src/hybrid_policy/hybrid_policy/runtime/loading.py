"""From an opened checkpoint and a recipe to a backend, weight by weight, with a progress bar."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import (
    down_product,
    expert_loop,
    gate_up_product,
    hopper_product,
    norm_product,
    prefix_attention,
    qkv_product,
    vision_attention,
)
from hybrid_policy.kernels import expert as expert_kernels
from hybrid_policy.models.checkpoint import Checkpoint
from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.pi05 import EXPERT, keeps_float32
from hybrid_policy.models.skeleton import skeleton
from hybrid_policy.runtime.backend import Backend
from hybrid_policy.runtime.cuda_backend import CudaBackend, row_buckets
from hybrid_policy.runtime.device_weights import build_weights
from hybrid_policy.runtime.packer import Report, Source
from hybrid_policy.runtime.quantized_checkpoint import quantised_sites, read_packed
from hybrid_policy.runtime.recipe import Recipe
from hybrid_policy.runtime.reference_backend import ReferenceBackend
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.sites import Packed, model_sites, pack_sites, swap_sites
from hybrid_policy.runtime.stages import StageTable, parse_table


class Progress:
    """Steps of a load; shown as a bar only where it was asked for."""

    def __init__(self, advance: object = None) -> None:
        self._advance = advance

    def step(self, text: str) -> None:
        """One more thing is done."""
        if self._advance is not None:
            self._advance(text)  # type: ignore[operator]


@contextmanager
def progress_bar(show: bool, total: int, title: str) -> Iterator[Progress]:
    """A rich progress bar of ``total`` steps, or nothing."""
    if not show:
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bar(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield Progress(lambda text: bar.update(task, advance=1, description=f"{title}: {text}"))


def load_reference(checkpoint: Checkpoint, recipe: Recipe, rtc: RealTimeChunking, progress: bool) -> Backend:
    """The CPU's backend: the plain model in float32 with the recipe's sites."""
    sites = model_sites(checkpoint.config)
    precisions = recipe.assign(sites)
    device = torch.device("cpu")
    packed, scales = read_packed(checkpoint.store, quantised_sites(checkpoint.directory), device)
    model = skeleton(checkpoint.config)
    with progress_bar(progress, len(checkpoint.names) + len(sites), "loading") as bar:
        for name in checkpoint.names:
            owner, _, leaf = name.rpartition(".")
            value = checkpoint.tensor(name, device, torch.float32)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
            bar.step(owner.rpartition(".")[2])

        def read(site: str) -> Tensor:
            return model.get_parameter(site + ".weight").detach()

        for site, weight in pack_sites(read, precisions, packed):
            swap_sites(model, [(site, weight)], precisions, scales)
            bar.step(site.rpartition(".")[2])
    return ReferenceBackend(model, rtc, recipe.name)


def load_cuda(
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: torch.device,
    rtc: RealTimeChunking,
    timing: bool,
    progress: bool,
    *,
    float_images: bool = False,
) -> Backend:
    """The GPU's backend: weights in their final form on the device, graphs captured."""
    require_pi05(checkpoint)
    config = checkpoint.config
    device_precisions(recipe, model_sites(config), device)  # refused before anything is read
    packed, _ = read_packed(checkpoint.store, quantised_sites(checkpoint.directory), device)
    buckets = row_buckets(len(config.cameras), config.image_tokens, config.max_token_len)

    def source(name: str) -> Tensor:
        return checkpoint.tensor(name, device, torch.float32 if keeps_float32(name) else torch.bfloat16)

    with progress_bar(progress, len(model_sites(config)) + 1 + len(buckets), "loading") as bar:
        return build_backend(
            config, source, recipe, device, rtc, timing=timing, float_images=float_images, buckets=buckets,
            packed=packed, report=bar.step,
        )  # fmt: skip


def require_pi05(checkpoint: Checkpoint) -> None:
    """Refuse what the CUDA engine does not serve.

    Raises:
        InputError: a checkpoint of pi0.
    """
    if checkpoint.config.kind != "pi05":
        raise InputError(f"{checkpoint.directory}: pi0 runs on device cpu only; the CUDA engine serves pi0.5")


def build_backend(
    config: Pi05Config,
    source: Source,
    recipe: Recipe,
    device: torch.device,
    rtc: RealTimeChunking,
    *,
    timing: bool,
    buckets: tuple[int, ...],
    float_images: bool = False,
    packed: Mapping[str, Packed] | None = None,
    report: Report = lambda _: None,
) -> CudaBackend:
    """A captured backend from a model's weights by name.

    Args:
        source: parameter name -> tensor on the device, float32 where `keeps_float32`, else bf16.
        buckets: prefix rows of which graphs are captured (`row_buckets`).
        packed: sites that come quantised.

    Raises:
        InputError: what `device_precisions` refuses.
    """
    precisions = device_precisions(recipe, model_sites(config), device)
    table = choose_table(rtc, recipe, config, precisions, device)
    with torch.inference_mode():
        weights = build_weights(
            config, source, precisions, dtype=torch.bfloat16, expert=table.expert, pdl=table.pdl, packed=packed,
            report=report,
        )  # fmt: skip
        return CudaBackend(
            weights, table, rtc, recipe.prefix_cache, name=recipe.name, timing=timing, float_images=float_images,
            buckets=buckets, report=report,
        )  # fmt: skip


def device_precisions(recipe: Recipe, sites: dict[str, tuple[int, int]], device: torch.device) -> dict[str, str]:
    """`Recipe.assign`, and what this device cannot serve refused by name.

    Raises:
        InputError: float32 sites, W4A4 before Blackwell, a vision site in another precision than bf16 or FP8, the
            projector in another than bf16, fc1 and fc2 apart, attention projections in NVFP4.
    """
    precisions = recipe.assign(sites)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    problems = []
    for site, precision in precisions.items():
        expected = ""
        if precision == "float32":
            expected = "bf16 (float32 is the CPU's reference)"
        elif ("vision_tower" in site or "projector" in site) and precision != "bf16":
            expected = _vision_problem(site, precision, precisions)
        elif "self_attn" in site and precision.startswith("nvfp4"):
            expected = "bf16 or fp8_w8a8 for attention"
        elif precision == "nvfp4_w4a4" and capability[0] < 10:
            expected = "nvfp4_w4a16: W4A4 needs Blackwell's block-scaled tensor cores (sm_100 or later)"
        elif precision == "fp8_w8a8" and sites[site][0] % 16:
            expected = f"bf16: FP8 products on a GPU want outer dimensions in multiples of 16, not {sites[site][0]}"
        if expected:
            problems.append(f"{recipe.source}: {site}: {precision} given, expected {expected}")
    if recipe.prefix_cache == "float32":
        problems.append(f"{recipe.source}: prefix_cache: float32 given, expected bf16 or fp8")
    if problems:
        shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise InputError("\n".join(shown))
    return precisions


def vision_shapes(config: Pi05Config) -> list[tuple[int, int]]:
    """(out_features, in_features) of a vision layer's products."""
    width, mlp = config.vision.width, config.vision.mlp_dim
    return [(3 * width, width), (width, width), (mlp, width), (width, mlp)]


def _vision_problem(site: str, precision: str, precisions: dict[str, str]) -> str:
    """What a site of vision would have to be instead of ``precision``; empty where that is served."""
    if precision != "fp8_w8a8" or "projector" in site:
        return "bf16: no kernel serves vision in it (FP8 is for the layers' projections)"
    for one, other in ((".fc1", ".fc2"), (".fc2", ".fc1")):
        sibling = site.removesuffix(one) + other
        if site.endswith(one) and precisions.get(sibling, precision) != precision:
            return f"the precision of {sibling}, {precisions[sibling]}: the GELU between them leaves FP8"
    return ""


def choose_table(
    rtc: RealTimeChunking,
    recipe: Recipe,
    config: Pi05Config,
    precisions: dict[str, str],
    device: torch.device,
) -> StageTable:
    """The stages' implementations.

    wgmma's kernels for vision and prefix on Hopper, else Triton's and the library's. For the expert: one launch for all
    steps of the flow on Hopper, else the cluster kernels, where device, shapes, precisions and cache allow them, else
    Triton's fused kernels; split stages where real-time chunking needs a modulation a row.

    The variable HYBRID_POLICY_STAGES overrides single stages (see `stages.parse_table`), for comparisons.
    """
    text = os.environ.get("HYBRID_POLICY_STAGES", "")
    table = parse_table(text)
    prefix = config.prefix
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    cache = torch.bfloat16 if recipe.prefix_cache == "bf16" else torch.float8_e4m3fn
    if table.prefix_attention == "hopper" and not prefix_attention.fits(
        capability, prefix.heads, prefix.kv_heads, prefix.head_dim, cache
    ):
        table = dataclasses.replace(table, prefix_attention="kernel")
    if not vision_attention.fits(capability, config.image_tokens, config.vision.head_dim):
        table = dataclasses.replace(table, vision_attention="reference")
    if not all(hopper_product.fits(capability, n, k) for n, k in vision_shapes(config)):
        table = dataclasses.replace(table, vision_product="library")
    if table.vision_product != "hopper" or not norm_product.fits(capability, config.vision.width, config.vision.width):
        table = dataclasses.replace(table, vision_norm="apart")
    if not gate_up_product.fits(capability, prefix.mlp_dim, prefix.width):
        table = dataclasses.replace(table, gate_up="library")
    if not qkv_product.fits(capability, prefix.heads, prefix.kv_heads, prefix.head_dim, prefix.width, cache):
        table = dataclasses.replace(table, qkv="library")
    if not down_product.fits(capability, prefix.width, prefix.mlp_dim):
        table = dataclasses.replace(table, down="library")
    if rtc.mode == "prefix":
        return dataclasses.replace(table, expert="split")
    if table.expert != "loop" or "expert=" in text:
        return table
    gemma = config.expert
    stem = EXPERT + "layers.0."
    formats = {
        "qkv": precisions[stem + "self_attn.q_proj"],
        "o": precisions[stem + "self_attn.o_proj"],
        "gate_up": precisions[stem + "mlp.gate_proj"],
        "down": precisions[stem + "mlp.down_proj"],
    }
    known = {"bf16": "bf16", "fp8_w8a8": "e4m3", "nvfp4_w4a16": "nvfp4"}
    if recipe.prefix_cache == "bf16" and all(p in known for p in formats.values()):
        stored = {name: known[p] for name, p in formats.items()}
        heads = (gemma.heads, gemma.kv_heads, gemma.head_dim)
        rows = config.prefix_tokens + config.horizon
        chunk = (config.horizon, config.max_action_dim)
        if expert_loop.fits_device(device, *chunk, rows, gemma.width, gemma.mlp_dim, heads, stored):
            return table
        if expert_kernels.fits_device(device, config.horizon, gemma.width, gemma.mlp_dim, heads, stored):
            return dataclasses.replace(table, expert="cluster")
    # a tile of the fused QKV lies within one head
    return dataclasses.replace(table, expert="fused" if gemma.head_dim % 16 == 0 else "split")
