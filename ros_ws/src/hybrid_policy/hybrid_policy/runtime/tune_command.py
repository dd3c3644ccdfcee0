"""Measure this device and write its fastest recipe whose actions stay close to the unquantised model's.

    hybrid-policy tune checkpoints/aloha tuned.yaml --bound 0.1
    hybrid-policy tune checkpoints/aloha tuned.yaml --calibrate observations/ --tokens 48 --json

For each group of sites (vision, prefix and expert; q/k/v, output, the MLP's) and each precision that the device serves,
the launches are timed on random activations, weights of several layers in turn, and the plain model is run with that
group alone in that precision to see what it does to the action. The fastest combination whose measured relative action
error is at most --bound (0.1 is a cosine of about 0.995) is written as a recipe, with the table it was decided from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import Checkpoint, load_checkpoint, open_checkpoint
from hybrid_policy.runtime.calibration import made_up_observations, read_observations
from hybrid_policy.runtime.loading import progress_bar
from hybrid_policy.runtime.quantized_checkpoint import quantised_sites
from hybrid_policy.runtime.recipe import Recipe, Rule, write_recipe
from hybrid_policy.runtime.tuning import ActionProbe, Choice, Group, Measured, choose, groups_of, time_group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint directory that is not quantised")
    parser.add_argument("out", type=Path, help="the recipe to write")
    parser.add_argument("--bound", type=float, default=0.1, help="largest relative action error (default 0.1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tokens", type=int, help="prompt tokens to tune for (default: the longest)")
    parser.add_argument("--calibrate", metavar="OBSERVATIONS", help="a folder of .npz observations (default: made up)")
    parser.add_argument("--observations", type=int, default=4, help="how many to judge the action by (default 4)")
    parser.add_argument("--tokenizer", help="a tokenizer file, where the checkpoint has none")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> int:
    """Time, probe, choose, write."""
    from hybrid_policy.runtime.engine import choose_device

    if not 0 < args.bound < 1:
        raise InputError.at("tune", "--bound", args.bound, "a number between 0 and 1")
    if quantised_sites(args.checkpoint):
        raise InputError(f"{args.checkpoint}: is quantised already, expected the checkpoint it was made from")
    device = choose_device(args.device)
    checkpoint = open_checkpoint(args.checkpoint, args.tokenizer)
    config = checkpoint.config
    groups = groups_of(config, args.tokens or config.max_token_len)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    wanted = [(group, precision) for group in groups for precision in group.candidates(capability)]

    def read(site: str) -> torch.Tensor:
        return checkpoint.tensor(site + ".weight", device, torch.float32)

    table: list[Measured] = []
    with progress_bar(True, 2 * len(wanted), "tuning") as bar, torch.inference_mode():
        for group, precision in wanted:
            table.append(Measured(group, precision, time_group(group, precision, read, device)))
            bar.step(f"time of {group.name} in {precision}")
        probe = _probe(args, checkpoint, groups, device)
        for entry in table:
            entry.error = probe.error({entry.group.name: entry.precision})
            bar.step(f"action with {entry.group.name} in {entry.precision}")
        choice = choose(table, args.bound, probe.error)
    recipe = recipe_of(choice, groups, args.out, device, args.bound)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(args.out, recipe)
    if args.json:
        print(json.dumps({"recipe": str(args.out), **dict(recipe.measured)}))
    else:
        _print(choice, groups, args)
    return 0


def _probe(args: argparse.Namespace, checkpoint: Checkpoint, groups: list[Group], device: torch.device) -> ActionProbe:
    if args.calibrate:
        observations = list(read_observations(Path(args.calibrate), args.observations))
    else:
        observations = list(made_up_observations(checkpoint, args.observations))
    policy = load_checkpoint(checkpoint.directory, torch.float32, device, args.tokenizer)
    random = np.random.default_rng(0)
    shape = (1, policy.config.horizon, policy.config.max_action_dim)
    cases = [(policy.processors.prepare(o), random.standard_normal(shape, dtype=np.float32)) for o in observations]

    def on_device(values: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), device=device)[None]

    def actions() -> NDArray[np.float64]:
        results = [
            policy.model.sample_actions(
                on_device(inputs.images),
                on_device(inputs.image_mask),
                on_device(inputs.tokens),
                on_device(inputs.token_count),
                torch.from_numpy(noise).to(device),
                state=on_device(inputs.state) if policy.config.kind == "pi0" else None,
            )
            for inputs, noise in cases
        ]
        return torch.cat(results).double().cpu().numpy()

    def read(site: str) -> torch.Tensor:
        return checkpoint.tensor(site + ".weight", device, torch.float32)

    return ActionProbe(policy.model, actions, read, groups)


def recipe_of(choice: Choice, groups: list[Group], out: Path, device: torch.device, bound: float) -> Recipe:
    """The chosen precisions as an ordered list of patterns, with what they were chosen from."""
    rules = [Rule("*", "bf16", str(out))]
    for group in groups:
        precision = choice.precisions[group.name]
        if precision != "bf16":
            rules += [Rule(pattern, precision, str(out)) for pattern in group.patterns()]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU reference"
    measured = {
        "device": name,
        "torch": str(torch.__version__),
        "bound": bound,
        "action_error": round(choice.measured_error, 6),
        "milliseconds": round(choice.seconds * 1e3, 4),
        "table": [
            {
                "group": m.group.name,
                "precision": m.precision,
                "milliseconds": round(m.seconds * 1e3, 4),
                "action_error": round(m.error, 6),
                "chosen": choice.precisions[m.group.name] == m.precision,
            }
            for m in choice.table
        ],
    }
    return Recipe(
        name=out.stem,
        rules=tuple(rules),
        description=f"Tuned on {name}: action error at most {bound}.",
        source=str(out),
        measured=measured,
    )


def _print(choice: Choice, groups: list[Group], args: argparse.Namespace) -> None:
    print(f"{'group':24} {'rows':>5} {'shape':>14} {'precision':12} {'ms':>9} {'action error':>13}")
    for m in choice.table:
        mark = "*" if choice.precisions[m.group.name] == m.precision else " "
        shape = f"{m.group.shape[0]}x{m.group.shape[1]}"
        print(
            f"{m.group.name:24} {m.group.rows:5} {shape:>14} {m.precision:12} {m.seconds * 1e3:9.3f} "
            f"{m.error:13.5f} {mark}"
        )
    print(
        f"chosen (*): {choice.seconds * 1e3:.3f} ms in these launches, action error {choice.measured_error:.5f} "
        f"(predicted {choice.predicted_error:.5f}, bound {args.bound}); {choice.rejected} faster ones missed the bound"
    )
    print(f"written to {args.out}")
