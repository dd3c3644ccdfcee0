"""Gemma layers (arXiv 2403.08295), with plain or adaptive RMSNorm, and their attention over a cache.

Every mask in pi0.5 depends on the key alone: prefix tokens see the valid prefix, action tokens see
the valid prefix and every action. So the query heads that share a key/value head are laid out as
further query rows, and nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_policy.models.config import GemmaConfig

EPS = 1e-6
ROPE_BASE = 10000.0

Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32; the checkpoint stores ``weight``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, None]:
        """[..., width] -> ([..., width], no gate)."""
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.weight.float(), EPS).to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """x / rms(x) * (1 + scale) + shift, and a gate for the residual; all three from the flow's time.

    ``dense`` maps the time embedding to (scale, shift, gate): ``modulation`` is its output, which is
    computed apart because the times of inference are known beforehand.
    """

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(condition_width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)
        with torch.no_grad():
            self.dense.bias[2 * width :] = 1.0  # a fresh model starts with open gates

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, width], modulation broadcastable to [B, S, 3 * width] -> ([B, S, width], gate)."""
        scale, shift, gate = modulation.chunk(3, dim=-1)
        y = torch.addcmul(shift, F.rms_norm(x.float(), x.shape[-1:], None, EPS), 1.0 + scale)
        return y.to(x.dtype), gate.to(x.dtype)


def rope_table(positions: Tensor, head_dim: int) -> Rope:
    """Cosines and sines of RoPE: int [B, S] -> two float32 [B, S, 1, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None, None].float() * (1.0 / ROPE_BASE**exponents)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the halves of each head: [B, S, heads, head_dim] -> the same, computed in float32."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Attention of shared key/value heads.

    Args:
        q: [B, S, heads, head_dim]. k, v: [B, kv_heads, T, head_dim].
        valid: bool [B, T], the keys that may be seen; None for all.

    Returns:
        [B, S, heads * head_dim].
    """
    batch, rows, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    folded = q.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = None if valid is None else valid[:, None, None, :]
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    return out.view(batch, kv_heads, -1, rows, head_dim).permute(0, 3, 1, 2, 4).reshape(batch, rows, -1)


class Attention(nn.Module):
    """Projections of grouped-query attention, without biases."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """[B, S, width] -> [B, S, heads, head_dim], rotated."""
        return apply_rope(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """[B, S, width] -> keys (rotated) and values, each [B, kv_heads, S, head_dim]."""
        k = apply_rope(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return k.transpose(1, 2), v.transpose(1, 2)


class Mlp(nn.Module):
    """GeGLU with the tanh form of GELU."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, width] -> [B, S, width]."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def _residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else torch.addcmul(x, y, gate)


class Layer(nn.Module):
    """Pre-norm layer; ``condition_width`` set makes both norms adaptive."""

    def __init__(self, config: GemmaConfig, condition_width: int | None) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config.width, condition_width)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config.width, condition_width)
        self.mlp = Mlp(config)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Only what later queries need from this layer (plain norms); see ``Attention.keys_values``."""
        return self.self_attn.keys_values(self.input_layernorm(x)[0], rope)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        valid: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        modulation: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One layer over ``x``, seeing ``past`` before it.

        Args:
            x: [B, S, width]. rope: of the positions of ``x``.
            valid: bool [B, T + S] of the keys (past, then x), or None for all.
            past: keys and values [B, kv_heads, T, head_dim], or None.
            modulation: of the two adaptive norms.

        Returns:
            The new [B, S, width], and the keys and values of ``x`` alone.
        """
        normed, gate = self.input_layernorm(x, modulation[0])
        q = self.self_attn.queries(normed, rope)
        own = self.self_attn.keys_values(normed, rope)
        k, v = own if past is None else (torch.cat((past[0], own[0]), 2), torch.cat((past[1], own[1]), 2))
        x = _residual(x, self.self_attn.o_proj(grouped_attention(q, k, v, valid)), gate)
        normed, gate = self.post_attention_layernorm(x, modulation[1])
        return _residual(x, self.mlp(normed), gate), own


def make_norm(width: int, condition_width: int | None) -> nn.Module:
    """A plain RMSNorm, or an adaptive one where there is a condition."""
    return RMSNorm(width) if condition_width is None else AdaRMSNorm(width, condition_width)


class Gemma(nn.Module):
    """The layers and the last norm; with ``vocab_size`` also the embedding of tokens."""

    def __init__(self, config: GemmaConfig, vocab_size: int | None = None, condition_width: int | None = None) -> None:
        super().__init__()
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)
            nn.init.normal_(self.embed_tokens.weight, std=config.width**-0.5)
        self.layers = nn.ModuleList(Layer(config, condition_width) for _ in range(config.depth))
        self.norm = make_norm(config.width, condition_width)

    def norms(self) -> Sequence[nn.Module]:
        """Every norm in the order in which a forward pass meets them."""
        found: list[nn.Module] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            found += (layer.input_layernorm, layer.post_attention_layernorm)
        return [*found, self.norm]
