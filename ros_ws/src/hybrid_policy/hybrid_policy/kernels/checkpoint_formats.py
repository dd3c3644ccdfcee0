"""Quantised tensors as checkpoints store them: ModelOpt and compressed-tensors, read and written.

ModelOpt NVFP4: ``weight`` uint8 [N, K/2], ``weight_scale`` float8_e4m3fn [N, K/16], ``weight_scale_2`` float32
scalar; w = e2m1 * weight_scale * weight_scale_2. ModelOpt FP8: ``weight`` float8_e4m3fn [N, K], ``weight_scale``
float32 scalar (or [N]), ``input_scale`` float32 scalar.

compressed-tensors ``nvfp4-pack-quantized``: ``weight_packed`` uint8 [N, K/2], ``weight_scale`` float8_e4m3fn
[N, K/16], ``weight_global_scale`` float32 [1], the reciprocal of ``weight_scale_2``. The nibble order is the same.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.kernels.nvfp4 import GROUP, NVFP4Tensor

#: precision -> ModelOpt's name in ``hf_quant_config.json``; bf16 layers are left out there.
MODELOPT_ALGORITHMS = {"nvfp4_w4a16": "W4A16_NVFP4", "nvfp4_w4a4": "NVFP4", "fp8_w8a8": "FP8"}


#: Last parts of the names that :func:`read` and :func:`read_input_scale` may look for.
LEAVES = ("weight", "weight_scale", "weight_scale_2", "weight_packed", "weight_global_scale", "input_scale")


def missing(names: Container[str], layer: str, precision: str) -> list[str]:
    """Names of the tensors that ``layer``, stored in ``precision``, lacks among ``names``."""
    wanted = ["weight"]
    if precision.startswith("nvfp4"):
        packed = f"{layer}.weight_packed" in names
        wanted = ["weight_packed", "weight_global_scale"] if packed else ["weight", "weight_scale_2"]
    if precision != "bf16":
        wanted.append("weight_scale")
    return [f"{layer}.{leaf}" for leaf in wanted if f"{layer}.{leaf}" not in names]


def read(tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor | NVFP4Tensor | FP8Tensor:
    """The weight of ``layer`` (its checkpoint name without ``.weight``) in whichever form it is stored.

    Raises:
        InputError: a tensor is missing or has the wrong dtype or shape; the message names it.
    """
    if f"{layer}.weight_packed" in tensors:
        reciprocal = _take(tensors, f"{layer}.weight_global_scale").float().reshape(-1)
        if reciprocal.numel() != 1 or not bool(torch.isfinite(reciprocal).all()) or float(reciprocal) <= 0:
            raise InputError.at(f"{layer}.weight_global_scale", "value", reciprocal.tolist(), "one positive float32")
        return _nvfp4(tensors, layer, _take(tensors, f"{layer}.weight_packed"), 1.0 / reciprocal[0])
    weight = _take(tensors, f"{layer}.weight")
    if weight.dtype == torch.uint8:
        scale = _take(tensors, f"{layer}.weight_scale_2").float().reshape(-1)
        if scale.numel() != 1 or not bool(torch.isfinite(scale).all()) or float(scale) <= 0:
            raise InputError.at(f"{layer}.weight_scale_2", "value", scale.tolist(), "one positive float32")
        return _nvfp4(tensors, layer, weight, scale[0])
    if weight.dtype == torch.float8_e4m3fn:
        scale = _take(tensors, f"{layer}.weight_scale").float().reshape(-1)
        if scale.numel() not in (1, weight.shape[0]):
            raise InputError.at(
                f"{layer}.weight_scale", "shape", tuple(scale.shape), f"one or {weight.shape[0]} values"
            )
        return FP8Tensor(weight, scale[0] if scale.numel() == 1 else scale)
    return weight


def read_input_scale(tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor | None:
    """``input_scale`` of an FP8 layer as a float32 scalar, if the checkpoint has one."""
    scale = tensors.get(f"{layer}.input_scale")
    return None if scale is None else scale.float().reshape(())


def write_modelopt(
    layer: str, weight: torch.Tensor | NVFP4Tensor | FP8Tensor, input_scale: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of ``layer`` in ModelOpt's form; :func:`read` gives them back bit for bit."""
    if isinstance(weight, NVFP4Tensor):
        return {
            f"{layer}.weight": weight.codes.contiguous(),
            f"{layer}.weight_scale": weight.scales.contiguous(),
            f"{layer}.weight_scale_2": weight.global_scale.float().reshape(()),
        }
    if isinstance(weight, FP8Tensor):
        out = {f"{layer}.weight": weight.values.contiguous(), f"{layer}.weight_scale": weight.scale.float()}
        if input_scale is not None:
            out[f"{layer}.input_scale"] = input_scale.float().reshape(())
        return out
    return {f"{layer}.weight": weight}


def write_compressed_tensors(layer: str, weight: NVFP4Tensor) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of ``layer`` in compressed-tensors' ``nvfp4-pack-quantized`` form."""
    return {
        f"{layer}.weight_packed": weight.codes.contiguous(),
        f"{layer}.weight_scale": weight.scales.contiguous(),
        f"{layer}.weight_global_scale": (1.0 / weight.global_scale.float()).reshape(1),
    }


def modelopt_config(
    precisions: Mapping[str, str], exclude: Iterable[str] = (), *, version: str = "", kv_cache: str | None = None
) -> dict[str, Any]:
    """The content of ``hf_quant_config.json`` for layers by name and precision (bf16 layers left out).

    ``version``: of the writer. ``kv_cache``: ModelOpt's name of the cache's format, None for unquantised.

    Raises:
        InputError: a precision that ModelOpt has no name for.
    """
    layers = {}
    for name, precision in precisions.items():
        if precision == "bf16":
            continue
        if precision not in MODELOPT_ALGORITHMS:
            raise InputError.at("hf_quant_config.json", name, precision, f"one of {', '.join(MODELOPT_ALGORITHMS)}")
        entry: dict[str, Any] = {"quant_algo": MODELOPT_ALGORITHMS[precision]}
        if precision.startswith("nvfp4"):
            entry["group_size"] = GROUP
        layers[name] = entry
    return {
        "producer": {"name": "hybrid_policy", "version": version, "format": "modelopt"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": kv_cache,
            "quantized_layers": layers,
            "exclude_modules": sorted(exclude),
        },
    }


def _take(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise InputError(f"{name}: not in the checkpoint")
    return tensors[name]


def _nvfp4(
    tensors: Mapping[str, torch.Tensor], layer: str, codes: torch.Tensor, global_scale: torch.Tensor
) -> NVFP4Tensor:
    scales = _take(tensors, f"{layer}.weight_scale")
    if codes.ndim != 2 or scales.dtype not in (torch.float8_e4m3fn, torch.uint8):
        got = f"codes {tuple(codes.shape)}, scales {scales.dtype}"
        raise InputError.at(layer, "weight, weight_scale", got, "uint8 [N, K/2] and float8_e4m3fn [N, K/16]")
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), global_scale.reshape(()))
