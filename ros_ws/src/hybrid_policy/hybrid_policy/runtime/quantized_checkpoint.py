"""Mixed-precision checkpoints in ModelOpt's form, written by a recipe and read back to the same bits.

``hf_quant_config.json`` says ``quant_algo: MIXED_PRECISION`` and names each quantised layer with its algorithm
(``W4A16_NVFP4``, ``NVFP4``, ``FP8``); a layer's tensors are those of ``kernels.checkpoint_formats``, which also reads
compressed-tensors' form. Beside it lie the source's own files (config, statistics, tokenizer) and ``recipe.yaml``, the
recipe applied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hybrid_policy import __version__
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import checkpoint_formats, fp8, nvfp4
from hybrid_policy.kernels.checkpoint_formats import MODELOPT_ALGORITHMS
from hybrid_policy.models.checkpoint import Checkpoint
from hybrid_policy.models.checkpoint_config import canonical
from hybrid_policy.models.pi05 import keeps_float32
from hybrid_policy.models.tensor_files import TensorStore, read_json
from hybrid_policy.runtime.recipe import Recipe, load_recipe, write_recipe
from hybrid_policy.runtime.sites import Packed

CONFIG = "hf_quant_config.json"
RECIPE = "recipe.yaml"
_SHARD_BYTES = 1 << 30


def quantised_sites(directory: Path) -> dict[str, str]:
    """Site -> precision of a ModelOpt checkpoint; empty for a checkpoint that is not quantised.

    Raises:
        InputError: an ``hf_quant_config.json`` that says something this project cannot read.
    """
    path = directory.expanduser() / CONFIG
    if not path.exists():
        return {}
    table = read_json(path).get("quantization")
    layers = table.get("quantized_layers") if isinstance(table, dict) else None
    if not isinstance(table, dict) or table.get("quant_algo") != "MIXED_PRECISION" or not isinstance(layers, dict):
        raise InputError.at(path, "quantization", table, "quant_algo MIXED_PRECISION with quantized_layers")
    precisions = {algorithm: precision for precision, algorithm in MODELOPT_ALGORITHMS.items()}
    found = {}
    for site, entry in layers.items():
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else None
        if algorithm not in precisions:
            raise InputError.at(path, f"quantized_layers[{site!r}].quant_algo", algorithm, ", ".join(precisions))
        found[canonical(site)] = precisions[algorithm]
    return found


def read_recipe(directory: Path) -> Recipe:
    """The recipe that a quantised checkpoint was written with, or one made from its layer list."""
    directory = directory.expanduser()
    if (directory / RECIPE).exists():
        return load_recipe(directory / RECIPE)
    from hybrid_policy.runtime.recipe import Rule

    source = str(directory / CONFIG)
    rules = [Rule("*", "bf16", source + " (default)")]
    rules += [Rule(site, precision, source) for site, precision in quantised_sites(directory).items()]
    return Recipe(name=directory.name, rules=tuple(rules), source=source)


def read_packed(
    store: TensorStore, sites: Mapping[str, str], device: torch.device
) -> tuple[dict[str, Packed], dict[str, Tensor]]:
    """Site -> packed weight, and site -> static activation scale where there is one, on ``device``.

    Raises:
        InputError: missing tensors, or ones of another dtype or shape, all listed.
    """
    names = {canonical(stored): stored for stored in store}
    packed: dict[str, Packed] = {}
    scales: dict[str, Tensor] = {}
    problems: list[str] = []
    for site, precision in sites.items():
        lacking = checkpoint_formats.missing(names, site, precision)
        if lacking:
            problems += [f"{name}: missing" for name in lacking]
            continue
        held = (f"{site}.{leaf}" for leaf in checkpoint_formats.LEAVES)
        tensors = {name: store.read(names[name]).to(device, copy=True) for name in held if name in names}
        try:
            weight = checkpoint_formats.read(tensors, site)
            kind = nvfp4.NVFP4Tensor if precision.startswith("nvfp4") else fp8.FP8Tensor
            if isinstance(weight, kind):
                packed[site] = weight
            else:
                problems.append(f"{site}.weight: {type(weight).__name__} given, expected {precision}")
        except InputError as error:
            problems.append(f"{site}: {error}")
        input_scale = checkpoint_formats.read_input_scale(tensors, site)
        if input_scale is not None:
            scales[site] = input_scale
    if problems:
        raise InputError("quantised tensors that do not fit:\n  " + "\n  ".join(problems))
    return packed, scales


def site_tensors(site: str, weight: Packed, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors that stand for one site in a ModelOpt checkpoint."""
    held = checkpoint_formats.write_modelopt(site, weight, input_scale)
    # cloned: gate and up share one tensor in memory, and the format allows no sharing
    return {name: tensor.cpu().contiguous().clone() for name, tensor in held.items()}


def write_quantised(
    checkpoint: Checkpoint,
    recipe: Recipe,
    precisions: Mapping[str, str],
    packed: Iterable[tuple[str, Packed]],
    input_scales: Mapping[str, Tensor],
    out: Path,
) -> None:
    """Write a mixed-precision checkpoint directory.

    Args:
        checkpoint: the source, of which everything but the sites is copied (bf16; norms and time float32).
        recipe: as applied. precisions: site -> precision. packed: from `pack_sites`.
        input_scales: static activation scales of FP8 sites; the others stay dynamic.
        out: a new directory.

    Raises:
        InputError: ``out`` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: exists and is not empty, expected a new directory")
    out.mkdir(parents=True, exist_ok=True)
    shards = _ShardWriter(out)
    for site, weight in packed:
        shards.add(site_tensors(site, weight, input_scales.get(site)))
    for name in checkpoint.names:
        if name.removesuffix(".weight") not in precisions:
            dtype = torch.float32 if keeps_float32(name) else torch.bfloat16
            shards.add({name: checkpoint.tensor(name, "cpu", dtype)})
    shards.finish()
    cache = "FP8" if recipe.prefix_cache == "fp8" else None
    config = checkpoint_formats.modelopt_config(precisions, version=__version__, kv_cache=cache)
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_recipe(out / RECIPE, recipe)
    for entry in _companions(checkpoint.directory):
        target = out / entry.relative_to(checkpoint.directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry, target)


def _companions(directory: Path) -> Iterator[Path]:
    """Configuration, statistics and tokenizer of a checkpoint: everything but the weights and golden cases."""
    for entry in sorted(directory.rglob("*")):
        weights = entry.name.startswith("model") and entry.name.endswith((".safetensors", ".safetensors.index.json"))
        if entry.is_file() and not weights and entry.name not in (CONFIG, RECIPE, "golden.safetensors"):
            yield entry


class _ShardWriter:
    """Tensors to safetensors shards of about a gigabyte, so that a full model needs little host memory."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self._held |= tensors
        if sum(t.nbytes for t in self._held.values()) >= _SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._bytes += sum(t.nbytes for t in self._held.values())
            self._shards.append(list(self._held))
            save_file(self._held, self._out / f"shard-{len(self._shards)}.safetensors", {"format": "pt"})
            self._held = {}

    def finish(self) -> None:
        self._flush()
        count = len(self._shards)
        index: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            single = "model.safetensors"
            final = single if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._out / f"shard-{number}.safetensors").rename(self._out / final)
            index |= dict.fromkeys(names, final)
        if count > 1:
            content = {"metadata": {"total_size": self._bytes}, "weight_map": index}
            path = self._out / "model.safetensors.index.json"
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
