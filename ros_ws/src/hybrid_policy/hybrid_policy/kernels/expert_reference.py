"""One layer of the action expert in plain PyTorch, in the dtype of its input: what the kernels are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: the residual stream's rms in E4M3, were it still what it was when last known; as in expert_loop_layout.cu
HEADROOM = 1 / 16


@dataclass(frozen=True)
class ReferenceLayer:
    """Weights [out, in]; norms' factors (1 + scale), shifts and the gates behind them, [width] each.

    eight: where all activations are rounded to E4M3, what attention's and GeGLU's results are divided by before.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    factors: tuple[Tensor, Tensor]
    shifts: tuple[Tensor, Tensor]
    gates: tuple[Tensor, Tensor]
    eight: tuple[float, float] | None = None


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.cat((a * cosines - b * sines, b * cosines + a * sines), -1)


def _rounded(x: Tensor, scale: Tensor | float) -> Tensor:
    """To E4M3, times ``scale`` meanwhile."""
    return (x * scale).float().to(torch.float8_e4m3fn).to(x.dtype) / scale


def layer_reference(
    h: Tensor,
    layer: ReferenceLayer,
    keys: Tensor,
    values: Tensor,
    tables: tuple[Tensor, Tensor],
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> Tensor:
    """The residual stream after one layer.

    Args:
        h: [tokens, width]. keys, values: [prefix, 1, head_dim], rotated.
        tables: cosines and sines [capacity, head_dim / 2].
        scale: [tokens, 1], with ``layer.eight``: what the stream is multiplied by before E4M3; left as the next layer
            wants it, the rms of its length at the second norm divided out anew.
    """
    dtype, head_dim, prefix = h.dtype, keys.shape[-1], keys.shape[0]
    cosines, sines = (table[prefix : prefix + len(h)].to(dtype) for table in tables)

    def normed(i: int) -> Tensor:
        root = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        x = h * layer.factors[i].to(dtype)
        if scale is not None:
            x = _rounded(x, scale)
        return x * root + layer.shifts[i].to(dtype)

    x = normed(0)
    q, k, v = ((x @ w.to(dtype).T).unflatten(-1, (-1, head_dim)) for w in (layer.q, layer.k, layer.v))
    q, k = _rotate(q, cosines, sines), _rotate(k, cosines, sines)
    k, v = torch.cat((keys.to(dtype), k)), torch.cat((values.to(dtype), v))
    scores = torch.einsum("thd,kd->thk", q, k[:, 0]) * head_dim**-0.5
    seen = torch.einsum("thk,kd->thd", scores.softmax(-1), v[:, 0]).flatten(1)
    if layer.eight is not None:
        seen = _rounded(seen, 1 / layer.eight[0])
    h = h + layer.gates[0].to(dtype) * (seen @ layer.o.to(dtype).T)
    x = normed(1)
    if scale is not None:
        scale.copy_(h.square().mean(-1, keepdim=True).add(eps).rsqrt() * HEADROOM)
    act = F.gelu(x @ layer.gate.to(dtype).T, approximate="tanh") * (x @ layer.up.to(dtype).T)
    if layer.eight is not None:
        act = _rounded(act, 1 / layer.eight[1])
    return h + layer.gates[1].to(dtype) * (act @ layer.down.to(dtype).T)
