"""Say what a checkpoint is: form, dimensions, parameters, normalisation, cameras, and what it lacks.

Reads LeRobot's directories (config.json, model.safetensors, policy_preprocessor.json ...), openpi's
PyTorch ones (model.safetensors, assets/<id>/norm_stats.json) and our own. No weight is loaded: a
checkpoint of 8 GB is inspected in a second.

    hybrid-policy inspect ~/checkpoints/pi05_droid
    hybrid-policy inspect ~/checkpoints/pi05_droid --json | jq .parameters

Exit codes: 0 described (also where something is missing, which is listed), 2 not a usable checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import QUANT_CONFIG, Checkpoint, open_checkpoint
from hybrid_policy.models.checkpoint_config import canonical
from hybrid_policy.models.normalization import Normalization
from hybrid_policy.models.pi05 import EXPERT, PREFIX, PROJECTOR, VISION
from hybrid_policy.models.skeleton import skeleton
from hybrid_policy.models.tensor_files import read_json

#: the model's parts by the beginning of their parameters' names; what is left is "action and time"
PARTS = {
    "vision (SigLIP)": VISION,
    "projector": PROJECTOR,
    "token embedding": PREFIX + "embed_tokens",
    "prefix (Gemma)": PREFIX,
    "action expert (Gemma)": EXPERT,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("checkpoint", help="the checkpoint's directory")
    parser.add_argument("--tokenizer", help="a SentencePiece .model or tokenizer.json outside the directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def parameter_parts(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters of each part of the model."""
    model = skeleton(checkpoint.config)
    counts = dict.fromkeys((*PARTS, "action and time"), 0)
    for name, parameter in model.named_parameters():
        part = next((part for part, start in PARTS.items() if name.startswith(start)), "action and time")
        counts[part] += parameter.numel()
    return counts


def quantised_layers(directory: Path) -> dict[str, str]:
    """Site -> algorithm of a ModelOpt checkpoint; empty for plain weights."""
    path = directory / QUANT_CONFIG
    if not path.exists():
        return {}
    table = read_json(path).get("quantization")
    layers = table.get("quantized_layers") if isinstance(table, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise InputError.at(path, "quantization.quantized_layers", layers, "an object: layer -> its algorithm")
    return {
        canonical(site): str(entry.get("quant_algo")) if isinstance(entry, dict) else "unknown"
        for site, entry in layers.items()
    }


def _normalization(value: Normalization | None) -> str:
    if value is None:
        return "no statistics"
    return (
        value.mode if value.mode == "identity" else f"{value.mode}, {value.a.size} dimensions, {value.style}'s formula"
    )


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    config, processors, store = checkpoint.config, checkpoint.processors, checkpoint.store
    return {
        "directory": str(checkpoint.directory),
        "form": checkpoint.description.form,
        "asset_id": checkpoint.description.asset_id,
        "kind": config.kind,
        "files": {file.path.name: file.path.stat().st_size for file in store.files},
        "tensors": dict(Counter(store.info(name).dtype for name in store)),
        "config": dataclasses.asdict(config),
        "parameters": parameter_parts(checkpoint),
        "prompt": processors.prompt_style,
        "state": _normalization(processors.state),
        "action": _normalization(processors.action),
        "relative_actions": list(processors.relative),
        "integrated_actions": list(processors.integrated),
        "quantised": dict(Counter(quantised_layers(checkpoint.directory).values())),
        "tokenizer": str(processors.tokenizer.path) if processors.tokenizer else None,
        "notes": checkpoint.notes,
        "missing": processors.missing,
    }


def run(args: argparse.Namespace) -> int:
    """Inspect; 0 unless the checkpoint cannot be used at all (an InputError, 2)."""
    layers = quantised_layers(Path(args.checkpoint).expanduser())
    checkpoint = open_checkpoint(args.checkpoint, args.tokenizer, layers)
    found = summary(checkpoint)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    _print(checkpoint, found)
    return 0


_PROMPTS = {
    "state": "task and discretised state (Task: ..., State: ...;)",
    "task": "task only (Task: ...;)",
    "openpi_plain": "task only, then a newline token (openpi, no state in the prompt)",
    "lerobot_plain": "task only, then a newline",
}


def _print(checkpoint: Checkpoint, found: dict[str, Any]) -> None:
    config = checkpoint.config
    total = sum(found["parameters"].values())
    size = sum(found["files"].values())
    kind = {"pi05": "pi0.5", "pi0": "pi0"}[config.kind]
    form = {"lerobot": "LeRobot's form", "openpi": "openpi's form"}[found["form"]]
    asset = f", statistics {found['asset_id']}" if found["asset_id"] else ""
    types = ", ".join(f"{count} {dtype}" for dtype, count in found["tensors"].items())
    print(f"{kind}, {total / 1e6:,.1f} M parameters, {form}{asset}")
    print(f"  {found['directory']}: {', '.join(found['files'])} ({size / 1e6:,.1f} MB; {types})")
    if found["quantised"]:
        counts = ", ".join(f"{count} in {name}" for name, count in found["quantised"].items())
        print(f"  quantised linear layers: {counts}")
    print("parameters")
    for part, count in found["parameters"].items():
        print(f"  {part:<24}{count / 1e6:>12,.2f} M")
    print("dimensions")
    for name, gemma in (("prefix", config.prefix), ("expert", config.expert)):
        print(
            f"  {name:<10}width {gemma.width}, depth {gemma.depth}, MLP {gemma.mlp_dim}, "
            f"{gemma.heads} heads ({gemma.kv_heads} key/value) of {gemma.head_dim}"
        )
    v = config.vision
    print(
        f"  vision    width {v.width}, depth {v.depth}, MLP {v.mlp_dim}, {v.heads} heads of {v.head_dim}; "
        f"{config.image_size}² pixels, {config.image_tokens} tokens an image"
    )
    print(
        f"  {'policy':<10}horizon {config.horizon}, {config.num_steps} flow steps, prompt of at most "
        f"{config.max_token_len} tokens, vocabulary {config.vocab_size}"
    )
    print(
        f"  {'':<10}state {config.state_dim} of {config.max_state_dim}, "
        f"action {config.action_dim} of {config.max_action_dim}"
    )
    print("processors")
    relative = [i for i, on in enumerate(checkpoint.processors.relative) if on]
    print(f"  {'cameras':<10}{', '.join(config.cameras)}")
    print(f"  {'prompt':<10}{_PROMPTS[found['prompt']]}")
    print(f"  {'state':<10}{found['state']}")
    print(f"  {'action':<10}{found['action']}")
    print(f"  {'':<10}{f'dimensions {relative} relative to the state' if relative else 'absolute'}")
    velocities = [i for i, step in enumerate(checkpoint.processors.integrated) if step]
    if velocities:
        print(f"  {'':<10}dimensions {velocities} velocities, added up from the state")
    print(f"  {'tokenizer':<10}{found['tokenizer'] or 'none'}")
    for line in found["notes"]:
        print(f"note: {line}")
    print("missing" if found["missing"] else "nothing is missing")
    for line in found["missing"]:
        print(f"  {line}")
