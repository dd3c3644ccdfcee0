"""The layers of `models.gemma` and `models.siglip` for one observation on a CPU: numpy, memory taken once.

The mathematics is the modules'; the order of the sums is not. q, k and v are one product; keys and values go
straight to where later queries read them; and the two halves that the rotary embedding turns lie beside each
other, which makes it one product of complex numbers (queries and keys are permuted alike, so their scalar
products stay).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybrid_policy.models import gemma, siglip
from hybrid_policy.models.config import GemmaConfig, VisionConfig
from hybrid_policy.runtime.host_blas import Floats, matmul
from hybrid_policy.runtime.host_linear import Buffers, HostLinear, SharedInput, numbers, release, same_rounding

Complex = NDArray[np.complex64]

_GELU = np.float32(2.0 * 0.7978845608028654)  # gelu_tanh(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
_CUBIC = np.float32(0.044715 * 2.0 * 0.7978845608028654)


@dataclass(frozen=True)
class Modulation:
    """What an RMS norm multiplies by and adds, and the gate of the residual after it; None where there is none.

    factor, shift, gate: float32 [width], or [rows, width].
    """

    factor: Floats
    shift: Floats | None = None
    gate: Floats | None = None


@dataclass(frozen=True)
class Memory:
    """Keys and values of one layer: float32 [kv_heads, places, head_dim]."""

    keys: Floats
    values: Floats

    @classmethod
    def of(cls, config: GemmaConfig, places: int) -> Memory:
        """Empty memory for so many tokens."""
        shape = (config.kv_heads, places, config.head_dim)
        return cls(np.empty(shape, np.float32), np.empty(shape, np.float32))


def rotations(places: int, head_dim: int) -> Complex:
    """cos + i sin of each position: complex64 [places, 1, head_dim / 2], from `gemma.rope_table`'s float32."""
    cos, sin = gemma.rope_table(torch.arange(places)[None], head_dim)
    return np.asarray(torch.complex(cos, sin)[0].numpy())


def pairwise(heads: int, head_dim: int) -> NDArray[np.intp]:
    """The order of a projection's outputs in which the halves of each head alternate."""
    halves = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return halves.swapaxes(1, 2).reshape(-1)


def plain_norm(norm: nn.Module) -> Modulation:
    """Of a `gemma.RMSNorm`."""
    assert isinstance(norm, gemma.RMSNorm)
    return Modulation(numbers(1.0 + norm.weight))


def rms_norm(x: Floats, modulation: Modulation, out: Floats) -> Floats:
    """x / rms(x) * factor + shift, [rows, width]."""
    squares = np.einsum("ij,ij->i", x, x)
    squares /= x.shape[1]
    squares += np.float32(gemma.EPS)
    np.sqrt(squares, out=squares)
    np.divide(x, squares[:, None], out=out)
    out *= modulation.factor
    if modulation.shift is not None:
        out += modulation.shift
    return out


def gelu(x: Floats, out: Floats) -> Floats:
    """The tanh form of GELU, [rows, width]; ``out`` apart from ``x``."""
    np.multiply(x, x, out=out)
    out *= _CUBIC
    out += _GELU
    out *= x
    inner = torch.from_numpy(out)
    torch.sigmoid(inner, out=inner)
    out *= x
    return out


def softmax(scores: Floats) -> None:
    """Over the last axis, in place."""
    inside = torch.from_numpy(scores)
    torch.softmax(inside, -1, out=inside)


class HostLayer:
    """A Gemma layer of the prefix or of the action expert."""

    def __init__(self, layer: gemma.Layer, config: GemmaConfig, buffers: Buffers) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        queries, keys = pairwise(config.heads, config.head_dim), pairwise(config.kv_heads, config.head_dim)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._one_input = same_rounding(mlp.gate_proj, mlp.up_proj)
        self._qkv = SharedInput(projections, [queries, keys, np.arange(len(keys))])
        self._o = HostLinear([attention.o_proj])
        self._gate, self._up = HostLinear([mlp.gate_proj]), HostLinear([mlp.up_proj])
        self._down = HostLinear([mlp.down_proj])
        self._config, self._buffers = config, buffers

    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(part.nbytes() for part in (self._qkv, self._o, self._gate, self._up, self._down))

    def keys_values(
        self, x: Floats, norm: Modulation, turns: Complex, memory: Memory, start: int
    ) -> tuple[Floats, Complex]:
        """Put keys and values of ``x`` [rows, width] into ``memory`` from ``start`` on.

        Returns:
            The projections [rows, ...] and their complex form [rows, heads, head_dim / 2], queries first.
        """
        config, rows = self._config, len(x)
        normed = rms_norm(x, norm, self._buffers.take("normed", *x.shape))
        qkv = self._qkv(normed, self._buffers.take("qkv", rows, self._qkv.width))
        pairs = qkv.view(np.complex64).reshape(rows, -1, config.head_dim // 2)
        heads, shared = config.heads, config.kv_heads
        own = slice(start, start + rows)
        placed = memory.keys[:, own].swapaxes(0, 1).view(np.complex64)
        np.multiply(pairs[:, heads : heads + shared], turns, out=placed)
        values = qkv[:, (heads + shared) * config.head_dim :].reshape(rows, shared, config.head_dim)
        memory.values[:, own] = values.swapaxes(0, 1)
        return qkv, pairs

    def __call__(
        self, x: Floats, turns: Complex, memory: Memory, start: int, norms: tuple[Modulation, Modulation]
    ) -> None:
        """The layer over ``x`` [rows, width], in place; its queries see ``memory`` up to their own rows.

        turns: of the rows' positions; the queries' are scaled on the way. start: tokens in ``memory`` before these.
        """
        buffers, shape = self._buffers, x.shape
        _, pairs = self.keys_values(x, norms[0], turns, memory, start)
        seen = self._attend(pairs, turns, memory, start + len(x))
        _add(x, self._o(seen, buffers.take("update", *shape)), norms[0].gate)
        normed = rms_norm(x, norms[1], buffers.take("normed", *shape))
        rows, hidden = self._gate.rounded(normed), self._gate.width
        gate = self._gate.product(rows, buffers.take("gate", len(x), hidden))
        if not self._one_input:
            rows = self._up.rounded(normed)
        up = self._up.product(rows, buffers.take("up", len(x), hidden))
        up *= gelu(gate, buffers.take("gelu", len(x), hidden))
        _add(x, self._down(up, buffers.take("update", *shape)), norms[1].gate)

    def _attend(self, pairs: Complex, turns: Complex, memory: Memory, seen: int) -> Floats:
        """[rows, heads * head_dim]: the query heads of a key head are further rows of one product."""
        config, rows = self._config, len(pairs)
        group, width = config.heads // config.kv_heads, config.head_dim
        shape = (config.kv_heads, rows, group, width)
        queries = self._buffers.take("queries", *shape)
        scores = self._buffers.take("scores", rows * group, seen)
        out = self._buffers.take("seen", rows, config.kv_heads, group * width)
        turns = turns * np.float32(width**-0.5)
        for head in range(config.kv_heads):
            own = slice(head * group, (head + 1) * group)
            np.multiply(pairs[:, own], turns, out=queries[head].view(np.complex64))
            matmul(queries[head].reshape(-1, width), memory.keys[head, :seen].T, scores)
            softmax(scores)
            if config.kv_heads == 1:
                matmul(scores, memory.values[head, :seen], out.reshape(-1, width))
            else:
                product = self._buffers.take("product", rows * group, width)
                matmul(scores, memory.values[head, :seen], product)
                out[:, head] = product.reshape(rows, -1)
        return out.reshape(rows, -1)


def _add(x: Floats, y: Floats, gate: Floats | None) -> None:
    if gate is not None:
        y *= gate
    x += y


class HostVision:
    """The SigLIP tower and the projector: images to prefix tokens."""

    def __init__(self, model: nn.Module, projector: nn.Module, config: VisionConfig, size: int) -> None:
        tower = cast(siglip.VisionModel, model)
        self._patch, self._side, self._heads = config.patch, size // config.patch, config.heads
        embedding = tower.embeddings.patch_embedding
        by_pixel = embedding.weight.detach().float().permute(0, 2, 3, 1)  # [width, p, p, 3], as images lie
        self._embed: Floats = by_pixel.flatten(1).t().contiguous().numpy()
        bias = torch.zeros(config.width) if embedding.bias is None else embedding.bias
        self._place = numbers(tower.embeddings.position_embedding.weight + bias)
        release(tower.embeddings)
        self._layers = [_VisionLayer(cast(siglip.Layer, layer), config) for layer in tower.encoder.layers]
        self._norm = tower.post_layernorm
        self._projector = HostLinear([projector])
        self._buffers = Buffers()

    def nbytes(self) -> int:
        """Bytes of weights and buffers."""
        layers = sum(layer.nbytes() for layer in self._layers)
        return self._embed.nbytes + self._place.nbytes + layers + self._projector.nbytes() + self._buffers.nbytes()

    def __call__(self, images: NDArray[np.uint8] | Floats, out: Floats) -> None:
        """uint8 [V, S, S, 3], or float32 [V, 3, S, S] in [-1, 1] -> ``out`` [V * P, prefix width]."""
        views, patch, side = len(images), self._patch, self._side
        pixels = images if images.dtype == np.uint8 else images.transpose(0, 2, 3, 1)
        cut = pixels[:, : side * patch, : side * patch].reshape(views, side, patch, side, patch, 3)
        patches = self._buffers.take("patches", views, side, side, patch, patch, 3)
        patches[...] = cut.transpose(0, 1, 3, 2, 4, 5)
        if images.dtype == np.uint8:
            patches /= np.float32(255.0)
            patches *= np.float32(2.0)
            patches -= np.float32(1.0)
        x = self._buffers.take("x", views, side * side, self._place.shape[1])
        flat = x.reshape(-1, x.shape[-1])
        matmul(patches.reshape(len(flat), -1), self._embed, flat)
        x += self._place
        for layer in self._layers:
            layer(flat, views, self._buffers)
        self._projector(self._norm(torch.from_numpy(flat)).numpy(), out)


class _VisionLayer:
    def __init__(self, layer: siglip.Layer, config: VisionConfig) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        every = np.arange(config.width)
        self._heads, self._scale = config.heads, np.float32(config.head_dim**-0.5)
        self._qkv = SharedInput([attention.q_proj, attention.k_proj, attention.v_proj], [every] * 3)
        self._out = HostLinear([attention.out_proj])
        self._fc1, self._fc2 = HostLinear([mlp.fc1]), HostLinear([mlp.fc2])
        self._norms = layer.layer_norm1, layer.layer_norm2

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in (self._qkv, self._out, self._fc1, self._fc2))

    def __call__(self, x: Floats, views: int, buffers: Buffers) -> None:
        """[V * P, width] in place."""
        rows, width = x.shape
        update = buffers.take("update", rows, width)
        qkv = self._qkv(_normed(self._norms[0], x), buffers.take("qkv", rows, 3 * width))
        q, k, v = qkv.reshape(views, -1, 3, self._heads, width // self._heads).transpose(2, 0, 3, 1, 4)
        q *= self._scale
        patches = rows // views
        scores = buffers.take("scores", views, self._heads, patches, patches)
        seen = buffers.take("seen", views, patches, self._heads, width // self._heads)
        matmul(q, k.swapaxes(-1, -2), scores)
        softmax(scores)
        matmul(scores, v, seen.transpose(0, 2, 1, 3))
        x += self._out(seen.reshape(rows, width), update)
        hidden = self._fc1(_normed(self._norms[1], x), buffers.take("hidden", rows, self._fc1.width))
        x += self._fc2(gelu(hidden, buffers.take("gelu", *hidden.shape)), update)


def _normed(norm: nn.Module, x: Floats) -> Floats:
    normed: Tensor = norm(torch.from_numpy(x))
    return normed.numpy()
