"""What this machine can run: the device, the compilers, and the route that each precision takes here, with reasons.

The answers are those that loading a model acts on: a precision that is not available raises the same sentence at
load (see ``linear.prepare`` and ``w4a4``). Nothing here launches a kernel.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.linear import PRECISIONS, Precision
from hybrid_policy.kernels.tiles import gate_up_route

#: What CUTLASS itself says of E2M1 weights with an E4M3 scale a group of 16, times bf16 activations. Read in its
#: sources, version 4: examples/55_hopper_mixed_dtype_gemm and examples/86_blackwell_mixed_dtype_gemm.
CUTLASS_ON_W4A16 = (
    "no kernel: on Hopper (example 55) a scale's group must be K or a multiple of the K tile and a scale at least two "
    "bytes; on Blackwell (example 86) mixed inputs are int4 and int8 only"
)


@dataclass(frozen=True)
class Route:
    """One precision on this machine."""

    precision: Precision
    available: bool
    route: str
    why: str


@dataclass(frozen=True)
class Machine:
    """What was found. ``capability`` is 10 * major + minor, or None without a GPU."""

    device: str
    capability: int | None
    multiprocessors: int | None
    memory_gib: float | None
    torch: str
    cuda: str | None
    triton: str | None
    ptxas: str | None
    ptxas_targets: list[int] = field(default_factory=list)
    cutlass: str | None = None


def inspect_machine() -> Machine:
    """Look at the current device and the installed compilers."""
    device, capability, processors, memory = "none (CPU)", None, None, None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = properties.name
        capability = 10 * properties.major + properties.minor
        processors = properties.multi_processor_count
        memory = round(properties.total_memory / 2**30, 1)
    version, targets = _ptxas()
    cutlass = _version("nvidia-cutlass-dsl") or _version("nvidia-cutlass")
    return Machine(
        device, capability, processors, memory, torch.__version__, torch.version.cuda, _version("triton"), version,
        targets, cutlass,
    )  # fmt: skip


def routes(machine: Machine) -> list[Route]:
    """The route of each precision on ``machine``; pure."""
    return [_route(precision, machine) for precision in PRECISIONS]


def _route(precision: Precision, machine: Machine) -> Route:
    if machine.capability is None:
        why = "no CUDA device: the plain PyTorch reference runs, for checks; it is no basis for a control rate"
        return Route(precision, True, "reference (PyTorch, float32 arithmetic)", why)
    name = f"{machine.device} (compute capability {machine.capability // 10}.{machine.capability % 10})"
    if machine.triton is None:
        return Route(precision, False, "none", f"Triton is not installed: pip install triton, for {name}")
    if machine.ptxas_targets and machine.capability not in machine.ptxas_targets:
        why = f"ptxas {machine.ptxas} does not know sm_{machine.capability}: a newer Triton (3.7 or later knows 11.0)"
        return Route(precision, False, "none", why)
    if machine.capability < 80:
        return Route(precision, False, "none", f"{name} has no bf16 tensor cores; 8.0 or more is needed")
    return _gpu_route(precision, machine.capability, name)


def _gpu_route(precision: Precision, capability: int, name: str) -> Route:
    stream = "stream_gemm (Triton)"
    if precision == "bf16":
        return Route(precision, True, f"{stream} up to 64 tokens, cuBLAS above", "measured so on an H100")
    if precision == "nvfp4_w4a16":
        why = "decoded between load and tensor core; no library has this product (CUTLASS: see below)"
        if gate_up_route(precision, capability) == "wgmma":
            hopper = "gate and up: wgmma_gate_up (CUDA C++ through NVRTC)"
            return Route(precision, True, f"{hopper}; other layers: {stream}, at every size", why)
        return Route(precision, True, f"{stream} at every size", f"{why}; wgmma_gate_up needs 9.0's wgmma")
    if precision == "fp8_w8a8":
        if capability < 89:
            why = f"{name} has no FP8 tensor cores (8.9 or more); take nvfp4_w4a16 or bf16"
            return Route(precision, False, "none", why)
        why = "activations are quantised as they are loaded, or by one kernel before cuBLAS"
        if capability == 90:
            small = f"wgmma_linear (CUDA C++ through NVRTC; {stream} where K has no whole parts or a norm follows)"
            return Route(precision, True, f"{small} up to 64 tokens, cuBLAS FP8 above", why)
        return Route(precision, True, f"{stream} up to 64 tokens, cuBLAS FP8 above", f"{why}; wgmma_linear needs 9.0")
    if capability < 100:
        why = f"{name} has no block-scaled FP4 product (10.0 or more); take nvfp4_w4a16 or fp8_w8a8"
        return Route(precision, False, "none", why)
    why = "the hardware's own block-scaled product, activations quantised by one kernel into its layout"
    return Route(precision, True, "quantiser (Triton) + cuBLAS NVFP4", why)


def require(precision: Precision, device: torch.device) -> None:
    """Raise InputError, with the alternative, unless a GPU ``device`` can run ``precision``."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    route = _gpu_route(precision, 10 * major + minor, torch.cuda.get_device_name(device))
    if not route.available:
        raise InputError.at("precision", precision, "not available", route.why)


def report(machine: Machine) -> dict[str, object]:
    """Machine and routes as plain values, for ``--json``."""
    return {
        "machine": asdict(machine),
        "routes": [asdict(route) for route in routes(machine)],
        "cutlass_e2m1_x_bf16": CUTLASS_ON_W4A16,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ptxas() -> tuple[str | None, list[int]]:
    """(version, known sm numbers) of the ptxas that Triton brings; (None, []) where there is none."""
    try:
        import triton
    except ImportError:
        return None, []
    programs = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    version, targets = None, set()
    for program in programs:
        try:
            said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
            known = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        found = re.search(r"release ([0-9.]+)", said)
        version = found.group(1) if found else version
        targets |= {int(number) for number in re.findall(r"'?sm_(\d+)'?", known)}
    return version, sorted(targets)
