"""Run a checkpoint's golden cases and compare: what to do after a conversion.

Reads golden.safetensors beside the checkpoint (inputs, noise and the actions that a reference gave;
see docs/checkpoints.md for its form) and prints, for each case and precision, the largest difference
of an action and the relative error ||a - b|| / ||b||. dims.json beside it gives what config.json does
not say.

    hybrid-policy verify ~/checkpoints/pi05_mine
    hybrid-policy verify ~/checkpoints/pi05_mine --precision bf16 --device cuda --relative 0.02

float32 is held to --tolerance (largest difference), bf16 to --relative. The column "openpi's t" is
float32 with the flow's time accumulated as openpi does it; it is reported, not judged.

Exit codes: 0 within tolerance, 1 above it, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import load_checkpoint
from hybrid_policy.models.flow import accumulated_times
from hybrid_policy.models.golden import GoldenCase, read_golden
from hybrid_policy.models.pi05 import Pi05

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("checkpoint", help="the checkpoint's directory")
    parser.add_argument("--golden", help="the golden cases (default: golden.safetensors in the directory)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=list(PRECISIONS),
        default=list(PRECISIONS),
        help="precisions to run (default: both)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="float32: largest |difference| of an action (%(default)s)",
    )
    parser.add_argument("--relative", type=float, default=2e-2, help="bf16: relative error (%(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _errors(actions: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest |difference| and relative error; NaN counts as infinite."""
    difference = (actions.double() - expected.double()).nan_to_num(math.inf)
    scale = expected.double().norm().clamp_min(1e-12)
    return float(difference.abs().max()), float(difference.norm() / scale)


def _actions(model: Pi05, case: GoldenCase, device: torch.device, times: list[float] | None = None) -> Tensor:
    actions = model.sample_actions(
        case.images.to(device),
        case.image_mask.to(device),
        case.tokens.to(device),
        case.token_mask.to(device),
        case.noise.to(device),
        num_steps=case.steps,
        state=None if case.state is None else case.state.to(device),
        times=times,
    )
    return actions[..., : case.actions.shape[-1]].cpu()


def run(args: argparse.Namespace) -> int:
    """Verify; 1 where a case is above the tolerance of its precision."""
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {args.device!r} given: {str(error).splitlines()[0]}") from error
    for name in ("tolerance", "relative"):
        if not getattr(args, name) >= 0.0:
            raise InputError(f"--{name}: {getattr(args, name)} given, expected a number, at least 0")
    golden = Path(args.golden) if args.golden else Path(args.checkpoint) / "golden.safetensors"
    rows: list[dict[str, Any]] = []
    for precision in args.precision:
        policy = load_checkpoint(args.checkpoint, PRECISIONS[precision], device)
        for case in _progress(read_golden(golden, policy.config), precision, quiet=args.json):
            largest, relative = _errors(_actions(policy.model, case, device), case.actions)
            row = {
                "case": case.name,
                "precision": precision,
                "steps": case.steps,
                "max_abs": largest,
                "relative": relative,
                "ok": largest <= args.tolerance if precision == "float32" else relative <= args.relative,
            }
            if precision == "float32":
                accumulated = _actions(policy.model, case, device, accumulated_times(case.steps))
                row["max_abs_openpi_time"] = _errors(accumulated, case.actions)[0]
            rows.append(row)
        del policy
    ok = all(row["ok"] for row in rows)
    if args.json:
        bounds = {"tolerance": args.tolerance, "relative": args.relative}
        print(json.dumps({"checkpoint": str(args.checkpoint), "ok": ok, **bounds, "cases": rows}, indent=2))
    else:
        _print(rows, args)
    return 0 if ok else 1


def _progress(cases: list[GoldenCase], precision: str, quiet: bool) -> Any:
    """The cases, with a bar where someone watches."""
    if quiet or not sys.stderr.isatty():
        return cases
    from rich.console import Console
    from rich.progress import track

    return track(cases, description=precision, console=Console(stderr=True), transient=True)


def _print(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"{'case':<10}{'precision':<11}{'steps':>5}{'max |Δ|':>12}{'relative':>12}{'openpi’s t':>13}  verdict")
    for row in rows:
        other = f"{row['max_abs_openpi_time']:.2e}" if "max_abs_openpi_time" in row else ""
        bound = f"max |Δ| <= {args.tolerance:g}" if row["precision"] == "float32" else f"relative <= {args.relative:g}"
        print(
            f"{row['case']:<10}{row['precision']:<11}{row['steps']:>5}{row['max_abs']:>12.2e}{row['relative']:>12.2e}"
            f"{other:>13}  {'ok' if row['ok'] else 'FAILED'} ({bound})"
        )
