"""SigLIP vision transformer (arXiv 2303.15343), as PaliGemma uses it: no pooling head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_policy.models.config import VisionConfig


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 whatever the input's dtype; the result has the input's."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention over all patches of one image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, width] -> [N, P, width]."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with the tanh form of GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, width] -> [N, P, width]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, width] -> [N, P, width]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patches to tokens, plus a learnt position."""

    def __init__(self, config: VisionConfig, image_size: int) -> None:
        super().__init__()
        self.patch = config.patch
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.position_embedding = nn.Embedding((image_size // config.patch) ** 2, config.width)

    def forward(self, images: Tensor) -> Tensor:
        """float [N, 3, S, S] -> [N, P, width]; pixels beyond the last whole patch are left out.

        The strided convolution is one matrix product over the flattened patches.
        """
        p, weight = self.patch, self.patch_embedding.weight
        side = images.shape[-1] // p
        cut = images[..., : side * p, : side * p].unflatten(-1, (side, p)).unflatten(2, (side, p))
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [N, P, 3*p*p], as weight[i] lies
        tokens = F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        return tokens + self.position_embedding.weight


class Encoder(nn.Module):
    """The layers, under the name that checkpoints give them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))


class VisionModel(nn.Module):
    """Images to patch features."""

    def __init__(self, config: VisionConfig, image_size: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, image_size)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.width)

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """float [N, 3, S, S] in [-1, 1] -> ``dtype`` [N, P, width]."""
        x = self.embeddings(images).to(dtype)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)
