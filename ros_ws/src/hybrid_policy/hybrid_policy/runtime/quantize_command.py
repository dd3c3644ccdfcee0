"""Write a mixed-precision checkpoint: each site in the precision that a recipe gives it.

    hybrid-policy quantize checkpoints/aloha seed checkpoints/aloha-seed
    hybrid-policy quantize checkpoints/aloha h100 out --calibrate observations/ --static

The result is in ModelOpt's form (hf_quant_config.json, quant_algo MIXED_PRECISION) and runs like any other checkpoint:
what is read back has the bits that were written, which this command checks before it ends. A recipe is a shipped one's
name (bf16, seed, fp8, w4a4, h100) or a file; docs/tuning.md tells how to write one.

With --calibrate, NVFP4 scales are chosen for the least error on the inputs seen (a folder of observations as .npz, or
the word `random` for made-up ones); with --static, FP8 sites also get static activation scales. Without, scales
follow the weights alone and activations are scaled as they come, which is the default and needs no data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.kernels.nvfp4 import NVFP4Tensor
from hybrid_policy.models.checkpoint import Checkpoint, open_checkpoint
from hybrid_policy.models.tensor_files import TensorStore
from hybrid_policy.runtime.calibration import Calibration, calibrate, made_up_observations, read_observations
from hybrid_policy.runtime.loading import progress_bar
from hybrid_policy.runtime.quantized_checkpoint import (
    quantised_sites,
    read_packed,
    site_tensors,
    write_quantised,
)
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.sites import Packed, model_sites, pack_sites


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint directory that is not quantised")
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("out", type=Path, help="the new directory")
    parser.add_argument("--calibrate", metavar="OBSERVATIONS", help="a folder of .npz observations, or `random`")
    parser.add_argument("--observations", type=int, default=32, help="how many to use (default 32)")
    parser.add_argument("--static", action="store_true", help="static FP8 activation scales; needs --calibrate")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda: where the scale search runs")
    parser.add_argument("--tokenizer", help="a tokenizer file, where the checkpoint has none")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Quantise, write, read back, compare."""
    from hybrid_policy.runtime.engine import choose_device

    device = choose_device(args.device)
    if quantised_sites(args.checkpoint):
        raise InputError(f"{args.checkpoint}: is quantised already, expected the checkpoint it was made from")
    if args.static and not args.calibrate:
        raise InputError("--static: given without --calibrate, expected observations to calibrate on")
    checkpoint = open_checkpoint(args.checkpoint, args.tokenizer)
    recipe = load_recipe(args.recipe)
    sites = model_sites(checkpoint.config)
    precisions = recipe.assign(sites)
    if "float32" in precisions.values():
        raise InputError(f"{recipe.source}: float32 given, expected precisions to quantise to")
    calibration = _calibration(args, checkpoint, sites, device)
    scales = calibration.input_scales(precisions) if calibration is not None and args.static else {}
    importance = calibration.importances() if calibration is not None else None

    def read(site: str) -> torch.Tensor:
        return checkpoint.tensor(site + ".weight", device, torch.float32)

    digests: dict[str, dict[str, torch.Tensor]] = {}
    with progress_bar(True, len(sites), "quantising") as bar:

        def packed() -> object:
            for site, weight in pack_sites(read, precisions, None, importance):
                digests[site] = {k: _digest(v) for k, v in site_tensors(site, weight, scales.get(site)).items()}
                bar.step(site.rpartition(".")[2])
                yield site, weight

        write_quantised(checkpoint, recipe, precisions, packed(), scales, args.out)  # type: ignore[arg-type]
    differing = compare_written(args.out, digests)
    summary = _summary(args, checkpoint, precisions, calibration)
    summary["read_back_identical"] = not differing
    if args.json:
        print(json.dumps(summary))
    else:
        print(f"{args.out}: {summary['bytes'] / 1e9:.3f} GB, from {summary['source_bytes'] / 1e9:.3f} GB")
        for precision, count in summary["sites"].items():
            print(f"  {precision:12} {count} sites")
        print(f"  read back: {'the same bits' if not differing else 'DIFFERS: ' + ', '.join(differing[:5])}")
    return 1 if differing else 0


def compare_written(out: Path, digests: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    """Tensors whose bits on disk are not those that were packed, and sites that do not read back."""
    store = TensorStore.open(out)
    differing = [
        name
        for held in digests.values()
        for name, digest in held.items()
        if name not in store or not torch.equal(_digest(store.read(name)), digest)
    ]
    packed, _ = read_packed(store, quantised_sites(out), torch.device("cpu"))
    differing += [site for site, weight in packed.items() if not isinstance(weight, FP8Tensor | NVFP4Tensor)]
    return differing


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum that depends on every bit and its place (no collision by swapping bytes)."""
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
    place = torch.arange(data.numel(), dtype=torch.int64) * 2654435761 + 97
    return ((data + 1) * place).sum()


def _calibration(
    args: argparse.Namespace, checkpoint: Checkpoint, sites: dict[str, tuple[int, int]], device: torch.device
) -> Calibration | None:
    if not args.calibrate:
        return None
    if args.calibrate == "random":
        observations = made_up_observations(checkpoint, args.observations)
    else:
        observations = read_observations(Path(args.calibrate), args.observations)
    with progress_bar(True, args.observations, "calibrating") as bar:
        return calibrate(checkpoint, sites, observations, device=device, step=lambda: bar.step("observation"))


def _summary(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    precisions: dict[str, str],
    calibration: Calibration | None,
) -> dict[str, Any]:
    def size(directory: Path) -> int:
        return sum(f.stat().st_size for f in directory.glob("model*.safetensors"))

    counts: dict[str, int] = {}
    for precision in precisions.values():
        counts[precision] = counts.get(precision, 0) + 1
    return {
        "out": str(args.out),
        "recipe": args.recipe,
        "sites": counts,
        "bytes": size(args.out),
        "source_bytes": size(checkpoint.directory),
        "calibrated_on": calibration.observations if calibration is not None else 0,
    }


__all__ = ["Packed", "add_arguments", "compare_written", "run"]
