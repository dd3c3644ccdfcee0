"""Sites: the linear layers of a model by checkpoint name, their quantised weights and their CPU reference.

One function packs a site's weight for a precision; the reference on a CPU, the kernels on a GPU and the
checkpoint writer all start from what it gives, so they agree to the bit on the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import fp8, nvfp4
from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.skeleton import skeleton

#: a weight as a precision holds it
Packed = Tensor | fp8.FP8Tensor | nvfp4.NVFP4Tensor

#: small projections around the flow; they stay float32 on every device
UNQUANTISED = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out", "state_proj")


def model_sites(config: Pi05Config) -> dict[str, tuple[int, int]]:
    """Site -> (out_features, in_features), in the order of the model."""
    model = skeleton(config)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and quantisable(name)
    }


def quantisable(site: str) -> bool:
    """Whether recipes speak of this layer: not the adaptive norms' (load time only) nor the float32 projections."""
    return not site.endswith("layernorm.dense") and not site.endswith("norm.dense") and "." in site


#: sites that one product serves: they share a tensor scale, so that none is left to apply to columns
_STACKED = (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))


def siblings(site: str) -> tuple[str, ...] | None:
    """The sites that share one product with this one, itself among them: gate and up, or q, k and v."""
    stem, _, leaf = site.rpartition(".")
    return next((tuple(f"{stem}.{name}" for name in names) for names in _STACKED if leaf in names), None)


def pack(
    weight: Tensor,
    precision: str,
    *,
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
) -> Packed:
    """A weight [N, K] in the format of ``precision``: bf16, FP8 with one scale a tensor, or NVFP4 (scale sweep)."""
    if precision == "float32":
        return weight.float()
    if precision == "bf16":
        return weight.to(torch.bfloat16)
    if precision == "fp8_w8a8":
        if global_scale is None:
            return fp8.quantize(weight, per_row=False)
        scale = global_scale.to(weight.device, torch.float32)
        return fp8.FP8Tensor(fp8.encode_e4m3(weight.float() / scale), scale.clone())
    return nvfp4.quantize(weight, global_scale=global_scale, importance=importance)


def pack_sites(
    read: Callable[[str], Tensor],
    precisions: Mapping[str, str],
    packed: Mapping[str, Packed] | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> Iterable[tuple[str, Packed]]:
    """Each site's packed weight, one after the other.

    Args:
        read: site -> its floating-point weight, on the device where it is to stay.
        precisions: from `Recipe.assign`.
        packed: sites that the checkpoint brings quantised already; they must be so in the recipe's precision.
        importance: site -> float32 [K], mean square of its inputs over calibration observations.
    """
    held = packed or {}
    shared: dict[tuple[str, ...], Tensor] = {}
    for site, precision in precisions.items():
        if site in held:
            yield site, _expect(site, held[site], precision)
            continue
        weight = read(site)
        pair = siblings(site)
        if pair is not None and pair not in shared and precision not in ("float32", "bf16"):
            # before the first of them is given away: the caller may replace it
            rule = nvfp4.global_scale_of if precision.startswith("nvfp4") else _fp8_scale_of
            shared[pair] = torch.stack([rule(weight if s == site else read(s)) for s in pair]).amax()
        scale = shared.get(pair) if pair is not None else None
        yield site, pack(weight, precision, global_scale=scale, importance=(importance or {}).get(site))


def _fp8_scale_of(weight: Tensor) -> Tensor:
    """amax / 448, of a finite weight."""
    if not torch.isfinite(weight).all():
        raise InputError("fp8: a weight that is not finite given, expected finite values")
    amax = weight.abs().amax().float()
    return torch.where(amax > 0, amax / 448.0, torch.ones_like(amax))


def _expect(site: str, weight: Packed, precision: str) -> Packed:
    wanted = {"fp8_w8a8": fp8.FP8Tensor, "nvfp4_w4a16": nvfp4.NVFP4Tensor, "nvfp4_w4a4": nvfp4.NVFP4Tensor}
    kind = wanted.get(precision, Tensor)
    if not isinstance(weight, kind):
        raise InputError(
            f"{site}: the checkpoint holds {type(weight).__name__}, the recipe wants {precision}; "
            "use the checkpoint's own recipe, or the checkpoint it was quantised from"
        )
    return weight


def dense(weight: Packed) -> Tensor:
    """The float32 [N, K] that a packed weight stands for."""
    if isinstance(weight, fp8.FP8Tensor):
        return fp8.dequantize(weight)
    if isinstance(weight, nvfp4.NVFP4Tensor):
        return nvfp4.dequantize(weight)
    return weight.float()


class ReferenceSite(nn.Module):
    """A linear layer with a precision's arithmetic in float32: what the kernels are held against.

    bf16 and W4A16 round the weight alone; W8A8 and W4A4 also round the activations, by token.
    input_scale: a static FP8 activation scale, from calibration; dynamic where None.
    """

    def __init__(self, weight: Packed, precision: str, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        super().__init__()
        self.precision = precision
        self.register_buffer("weight", dense(weight), persistent=False)
        self.bias = bias
        self.input_scale = input_scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = self.rounded(x.flatten(0, -2))
        y = F.linear(rows, self.get_buffer("weight").to(rows.dtype), self.bias)
        return y.unflatten(0, x.shape[:-1])

    def rounded(self, rows: Tensor) -> Tensor:
        """Activations [M, K] as the precision has them; the same where it rounds the weight alone."""
        if self.precision == "fp8_w8a8":
            if self.input_scale is None:
                return fp8.dequantize_activation(*fp8.quantize_activation(rows))
            return fp8.encode_e4m3(rows.float() / self.input_scale).float() * self.input_scale
        if self.precision == "nvfp4_w4a4":
            return nvfp4.dequantize(nvfp4.quantize(rows.float(), rule="max"))
        return rows


def swap_sites(
    model: nn.Module,
    packed: Iterable[tuple[str, Packed]],
    precisions: Mapping[str, str],
    input_scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Put each site's reference into ``model``; float32 and bf16 sites stay `nn.Linear` (with rounded weights)."""
    for site, weight in packed:
        owner, _, leaf = site.rpartition(".")
        module = model.get_submodule(site)
        assert isinstance(module, nn.Linear)
        precision = precisions[site]
        if precision in ("float32", "bf16"):
            module.weight = nn.Parameter(dense(weight), requires_grad=False)
            continue
        scale = (input_scales or {}).get(site)
        setattr(model.get_submodule(owner), leaf, ReferenceSite(weight, precision, module.bias, scale))
