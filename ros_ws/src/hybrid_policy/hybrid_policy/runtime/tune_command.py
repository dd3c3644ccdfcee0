"""Measure this device and write its fastest recipe whose actions stay close to the unquantised model's.

    hybrid-policy tune checkpoints/aloha tuned.yaml --bound 0.1
    hybrid-policy tune checkpoints/aloha tuned.yaml --calibrate observations/ --tokens 48 --json

Vision, prefix and expert have groups of sites: q/k/v, output, the MLP's. On a GPU the engine is built with each
combination of the precisions that the device serves, and its three parts are timed; on a CPU the launches of each group
are. The plain model is run with each group alone in each precision to see what that does to the action. The fastest
combination whose measured relative action error is at most --bound (0.1 is a cosine of about 0.995) is written as a
recipe, with the table it was decided from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import Checkpoint, load_checkpoint, open_checkpoint
from hybrid_policy.runtime.calibration import made_up_observations, read_observations
from hybrid_policy.runtime.loading import progress_bar, require_pi05
from hybrid_policy.runtime.quantized_checkpoint import quantised_sites
from hybrid_policy.runtime.recipe import Recipe, Rule, write_recipe
from hybrid_policy.runtime.tuning import (
    ActionProbe,
    Choice,
    Group,
    Measured,
    PartTime,
    Read,
    choose,
    groups_of,
    rules_of,
    table_of,
)
from hybrid_policy.runtime.tuning_times import builds_on_gpu, time_on_cpu, time_on_gpu


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
    if device.type == "cuda":
        require_pi05(checkpoint)
    config = checkpoint.config
    tokens = config.max_token_len if args.tokens is None else args.tokens
    if not 1 <= tokens <= config.max_token_len:
        raise InputError.at("tune", "--tokens", tokens, f"1 to {config.max_token_len}, what this policy takes")
    groups = groups_of(config, tokens)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    alone = [(group.name, precision) for group in groups for precision in group.candidates(capability)]

    def read(site: str) -> torch.Tensor:
        return checkpoint.tensor(site + ".weight", device, torch.float32)

    timed = len(alone) if capability is None else builds_on_gpu(groups, capability)
    with progress_bar(True, timed + len(alone), "tuning") as bar, torch.inference_mode():
        if capability is None:
            times = time_on_cpu(groups, read, bar.step)
        else:
            times = time_on_gpu(checkpoint, groups, tokens, device, bar.step)
        probe = _probe(args, checkpoint, groups, device, read)
        errors = {}
        for name, precision in alone:
            errors[name, precision] = probe.error({name: precision})
            bar.step(f"action with {name} in {precision}")
        choice = choose(times, errors, args.bound, probe.error)
    table = table_of(groups, times, errors)
    rules = rules_of(groups, choice.precisions, str(args.out))
    recipe = recipe_of(choice, rules, table, times, args.out, device, args.bound)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(args.out, recipe)
    if args.json:
        print(json.dumps({"recipe": str(args.out), **dict(recipe.measured)}))
    else:
        _print(choice, table, times, args)
    return 0


def _probe(
    args: argparse.Namespace, checkpoint: Checkpoint, groups: list[Group], device: torch.device, read: Read
) -> ActionProbe:
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

    return ActionProbe(policy.model, actions, read, groups)


def recipe_of(
    choice: Choice,
    rules: tuple[Rule, ...],
    table: list[Measured],
    times: list[PartTime],
    out: Path,
    device: torch.device,
    bound: float,
) -> Recipe:
    """The recipe of the choice, with what it was chosen from."""
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
                "part_milliseconds": round(m.seconds * 1e3, 4),
                "action_error": round(m.error, 6),
                "chosen": choice.precisions[m.group.name] == m.precision,
            }
            for m in table
        ],
        "fastest": [
            {"part": time.part, "milliseconds": round(time.seconds * 1e3, 4), **_short(time)} for time in fastest(times)
        ],
    }
    return Recipe(
        name=out.stem,
        rules=rules,
        description=f"Tuned on {name}: action error at most {bound}.",
        source=str(out),
        measured=measured,
    )


def fastest(times: Sequence[PartTime], count: int = 3) -> list[PartTime]:
    """The fastest combinations of each part."""
    parts = dict.fromkeys(time.part for time in times)
    ordered = sorted(times, key=attrgetter("seconds"))
    return [time for part in parts for time in [t for t in ordered if t.part == part][:count]]


def _short(time: PartTime) -> dict[str, str]:
    """Group -> precision, without the part's name."""
    return {name.removeprefix(time.part + "."): precision for name, precision in time.precisions.items()}


def _print(choice: Choice, table: list[Measured], times: list[PartTime], args: argparse.Namespace) -> None:
    print("each group alone in a precision, all others in bf16:")
    print(f"{'group':24} {'rows':>5} {'shape':>14} {'precision':12} {'part, ms':>9} {'action error':>13}")
    for m in table:
        mark = "*" if choice.precisions[m.group.name] == m.precision else " "
        shape = f"{m.group.shape[0]}x{m.group.shape[1]}"
        print(
            f"{m.group.name:24} {m.group.rows:5} {shape:>14} {m.precision:12} {m.seconds * 1e3:9.3f} "
            f"{m.error:13.5f} {mark}"
        )
    print("the fastest combinations:")
    for time in fastest(times):
        precisions = ", ".join(f"{kind} {precision}" for kind, precision in _short(time).items())
        print(f"  {time.part:8} {time.seconds * 1e3:9.3f} ms  {precisions}{' *' if time in choice.parts else ''}")
    print(
        f"chosen (*): {choice.seconds * 1e3:.3f} ms, action error {choice.measured_error:.5f} (predicted "
        f"{choice.predicted_error:.5f}, bound {args.bound}); {choice.rejected} faster ones missed the bound"
    )
    print(f"written to {args.out}")
