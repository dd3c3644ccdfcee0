"""Say which route each precision takes on this machine, why, and what the others would need.

    hybrid-policy doctor            a table
    hybrid-policy doctor --json     the same as JSON

Prints the device, its compute capability, the versions of torch, CUDA, Triton and ptxas, and CUTLASS where it is
installed. A precision marked "no" is an error at load, with the alternative printed here: nothing falls back silently.
Exit code 0; 1 if --need names a precision that is not available.
"""

from __future__ import annotations

import argparse
import json

from hybrid_policy.kernels.capability import CUTLASS_ON_W4A16, Machine, inspect_machine, routes
from hybrid_policy.kernels.capability import report as plain_report
from hybrid_policy.kernels.linear import PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--need", action="append", default=[], choices=PRECISIONS, metavar="PRECISION",
        help=f"exit with 1 unless it is available here (repeatable): {', '.join(PRECISIONS)}",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    machine = inspect_machine()
    found = routes(machine)
    if args.json:
        print(json.dumps(plain_report(machine), indent=2))
    else:
        print(text(machine))
    missing = [route.precision for route in found if route.precision in args.need and not route.available]
    return 1 if missing else 0


def text(machine: Machine) -> str:
    """The table, for people."""
    lines = [f"device       {machine.device}"]
    if machine.capability is not None:
        lines.append(f"capability   {machine.capability // 10}.{machine.capability % 10}, "
                     f"{machine.multiprocessors} multiprocessors, {machine.memory_gib} GiB")  # fmt: skip
    lines.append(f"torch        {machine.torch} (CUDA {machine.cuda or 'none'})")
    lines.append(f"Triton       {machine.triton or 'not installed'}")
    known = ", ".join(f"sm_{target}" for target in machine.ptxas_targets if target >= 80)
    lines.append(f"ptxas        {machine.ptxas or 'not found'}" + (f", knows {known}" if known else ""))
    lines.append(f"CUTLASS      {machine.cutlass or 'not installed (not needed)'}")
    lines.append("")
    for route in routes(machine):
        lines.append(f"{route.precision:12} {'yes' if route.available else 'no':4} {route.route}")
        lines.append(f"{'':18}{route.why}")
    lines += ["", f"CUTLASS on E2M1 x bf16 with a scale a group of 16: {CUTLASS_ON_W4A16}."]
    return "\n".join(lines)
