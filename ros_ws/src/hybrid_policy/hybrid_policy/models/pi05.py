"""pi0.5 (arXiv 2504.16054) and pi0 (arXiv 2410.24164) as one plain PyTorch module.

Parameter names are those of openpi's checkpoints, so a site is named by its checkpoint name and
``nn.Linear`` layers can be swapped one by one. The same methods train and infer:

    cache = model.prefix_cache(*model.embed_prefix(images, image_mask, tokens, token_count), state)
    v = model.velocity(x, t, cache)            # with gradients, t one a sample or one an action
    actions = model.sample_actions(images, image_mask, tokens, token_count, noise)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.flow import Guidance, euler, step_times, time_embedding
from hybrid_policy.models.gemma import AdaRMSNorm, Gemma, Layer, Rope, rope_table
from hybrid_policy.models.siglip import VisionModel

PREFIX = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."


@dataclass
class PrefixCache:
    """What the action expert needs of images and prompt.

    keys, values: one [B, kv_heads, T, head_dim] a layer. For pi0 the state token is the last of T.
    valid: bool [B, T + H]: the keys an action may see (all H actions are); None where all are.
    rope: of the H action positions, which start at the count of valid prefix tokens.
    hidden: [B, T, width], the input of the last prefix layer, for losses on the prefix.
    """

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor | None
    rope: Rope
    hidden: Tensor

    def repeat(self, samples: int) -> PrefixCache:
        """Each row ``samples`` times in a row: several noises for one prefix while training."""

        def again(x: Tensor) -> Tensor:
            return x.repeat_interleave(samples, dim=0)

        return PrefixCache(
            [again(k) for k in self.keys],
            [again(v) for v in self.values],
            None if self.valid is None else again(self.valid),
            (again(self.rope[0]), again(self.rope[1])),
            again(self.hidden),
        )


class Pi05(nn.Module):
    """The policy's network. ``config`` gives every dimension."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        adaptive = config.kind == "pi05"
        width = config.expert.width
        projector = nn.Linear(config.vision.width, config.prefix.width)
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": nn.ModuleDict(
                    {
                        "model": nn.ModuleDict(
                            {
                                "vision_tower": nn.ModuleDict(
                                    {"vision_model": VisionModel(config.vision, config.image_size)}
                                ),
                                "multi_modal_projector": nn.ModuleDict({"linear": projector}),
                                "language_model": Gemma(config.prefix, vocab_size=config.vocab_size),
                            }
                        )
                    }
                ),
                "gemma_expert": nn.ModuleDict(
                    {"model": Gemma(config.expert, condition_width=width if adaptive else None)}
                ),
            }
        )
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        if adaptive:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.max_state_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    @property
    def vision(self) -> VisionModel:
        """The SigLIP tower."""
        return self.get_submodule(VISION[:-1])  # type: ignore[return-value]

    @property
    def prefix(self) -> Gemma:
        """The Gemma that reads images and prompt."""
        return self.get_submodule(PREFIX[:-1])  # type: ignore[return-value]

    @property
    def expert(self) -> Gemma:
        """The Gemma that reads noisy actions."""
        return self.get_submodule(EXPERT[:-1])  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """What the transformers compute in: that of the token embedding."""
        return self.prefix.embed_tokens.weight.dtype

    def embed_images(self, images: Tensor) -> Tensor:
        """Images to prefix tokens; they are not scaled.

        Args:
            images: float32 [B, V, 3, S, S] in [-1, 1], or uint8 [B, V, S, S, 3] as a camera gives it.

        Returns:
            [B, V, P, prefix width].
        """
        if images.dtype == torch.uint8:
            images = (images.float() / 255.0 * 2.0 - 1.0).movedim(-1, 2)
        features = self.vision(images.flatten(0, 1), self.dtype)
        return self.get_submodule(PROJECTOR[:-1])(features).unflatten(0, images.shape[:2])

    def embed_prefix(
        self, images: Tensor, image_mask: Tensor | None, tokens: Tensor, token_count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all cameras, then of the prompt.

        Args:
            images: see ``embed_images``.
            image_mask: bool [B, V], False for a camera that is absent; None where all are there.
            tokens: int64 [B, L], right-padded.
            token_count: int [B], valid tokens; or bool [B, L], which of them are valid.

        Returns:
            Embeddings [B, T, width] with T = V * P + L, and bool [B, T], which are valid.
        """
        seen = self.embed_images(images)
        batch, views, patches, width = seen.shape
        words = F.embedding(tokens, self.prefix.embed_tokens.weight) * math.sqrt(width)
        if token_count.dtype == torch.bool:
            valid_words = token_count
        else:
            valid_words = torch.arange(tokens.shape[1], device=tokens.device) < token_count[:, None]
        if image_mask is None:
            image_mask = torch.ones(batch, views, dtype=torch.bool, device=tokens.device)
        valid = torch.cat((image_mask.repeat_interleave(patches, dim=1), valid_words), dim=1)
        return torch.cat((seen.flatten(1, 2), words.to(seen.dtype)), dim=1), valid

    def prefix_cache(self, embeddings: Tensor, valid: Tensor, state: Tensor | None = None) -> PrefixCache:
        """Run the prefix once; of its last layer only keys and values are computed.

        Args:
            embeddings, valid: from ``embed_prefix``.
            state: float32 [B, max_state_dim], normalised; pi0 only, whose state token sees the prefix
                and itself but no action, and is therefore part of what is computed once.
        """
        config, x = self.config, embeddings
        positions = valid.cumsum(dim=1) - 1
        rope = rope_table(positions, config.prefix.head_dim)
        keys, values = [], []
        layers = cast("list[Layer]", list(self.prefix.layers))
        for layer in layers[:-1]:
            x, (k, v) = layer(x, rope, valid)
            keys.append(k)
            values.append(v)
        k, v = layers[-1].keys_values(x, rope)
        keys.append(k)
        values.append(v)
        count = valid.sum(dim=1, keepdim=True)
        if config.kind == "pi0":
            if state is None:
                raise ValueError("pi0 needs the state: float32 [B, max_state_dim]")
            keys, values = self._append_state(state, keys, values, valid, count)
            valid, count = F.pad(valid, (0, 1), value=True), count + 1
        steps = torch.arange(config.horizon, device=valid.device)
        return PrefixCache(
            keys,
            values,
            F.pad(valid, (0, config.horizon), value=True),
            rope_table(count + steps, config.expert.head_dim),
            x,
        )

    def _append_state(
        self, state: Tensor, keys: list[Tensor], values: list[Tensor], valid: Tensor, count: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values with those of pi0's state token behind them."""
        x = self.state_proj(state.to(self.state_proj.weight.dtype))[:, None].to(self.dtype)
        rope = rope_table(count, self.config.expert.head_dim)
        seen = F.pad(valid, (0, 1), value=True)
        longer_keys, longer_values = [], []
        for layer, k, v in zip(self.expert.layers, keys, values):
            x, (own_k, own_v) = layer(x, rope, seen, (k, v))
            longer_keys.append(torch.cat((k, own_k), dim=2))
            longer_values.append(torch.cat((v, own_v), dim=2))
        return longer_keys, longer_values

    def modulations(self, times: Tensor) -> Tensor:
        """All that depends on the flow's time alone; computed once where the times are known.

        Args:
            times: float32 [...]: one a step, one a sample, or one an action.

        Returns:
            pi0.5: float32 [2 * depth + 1, ..., 3 * width], each adaptive norm's (scale, shift, gate).
            pi0: float32 [1, ..., width], the time embedding.
        """
        config = self.config
        embedded = time_embedding(times, config.expert.width, config.min_period, config.max_period)
        if config.kind == "pi0":
            return embedded[None]
        embedded = embedded.to(self.time_mlp_in.weight.dtype)
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))
        norms = [norm for norm in self.expert.norms() if isinstance(norm, AdaRMSNorm)]
        return torch.stack([norm.dense(condition.to(norm.dense.weight.dtype)) for norm in norms]).float()

    def velocity(self, x: Tensor, t: Tensor | None, cache: PrefixCache, modulation: Tensor | None = None) -> Tensor:
        """The learnt field at noisy actions.

        Args:
            x: float32 [B, H, max_action_dim].
            t: float32 [B], one a sample, or [B, H], one an action (0 for actions that are given, as in
                training-time real-time chunking); not needed where ``modulation`` is given.
            cache: of the same B rows.
            modulation: ``modulations`` at one time ([sites, C]), or a time a sample or an action.

        Returns:
            float32 [B, H, max_action_dim].
        """
        if modulation is None:
            if t is None:
                raise ValueError("velocity needs t or modulation")
            modulation = self.modulations(t)
        if modulation.ndim == 3:  # one a sample: the same for each of its actions
            modulation = modulation[:, :, None]
        h = self.action_in_proj(x.to(self.action_in_proj.weight.dtype))
        if self.config.kind == "pi0":
            time = modulation[0].to(h.dtype).expand(*h.shape[:2], -1)
            h = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat((h, time), dim=-1))))
        h = h.to(self.dtype)
        adaptive = self.config.kind == "pi05"
        for i, layer in enumerate(self.expert.layers):
            pair = (modulation[2 * i], modulation[2 * i + 1]) if adaptive else (None, None)
            h, _ = layer(h, cache.rope, cache.valid, (cache.keys[i], cache.values[i]), pair)
        h, _ = self.expert.norm(h, modulation[-1] if adaptive else None)
        return self.action_out_proj(h.to(self.action_out_proj.weight.dtype)).float()

    def encode(
        self,
        images: Tensor,
        image_mask: Tensor | None,
        tokens: Tensor,
        token_count: Tensor,
        state: Tensor | None = None,
    ) -> PrefixCache:
        """``embed_prefix`` and ``prefix_cache`` in one; on a CPU padding common to all rows is cut."""
        if tokens.device.type == "cpu":
            if token_count.dtype == torch.bool:
                places = torch.arange(1, tokens.shape[1] + 1)
                used = int((token_count * places).max())
                token_count = token_count[:, :used]
            else:
                used = int(token_count.max())
            tokens = tokens[:, :used]
            if image_mask is not None and not bool(image_mask.all()):
                there = image_mask.any(0)
                images, image_mask = images[:, there], image_mask[:, there]
        return self.prefix_cache(*self.embed_prefix(images, image_mask, tokens, token_count), state)

    @torch.no_grad()
    def sample_actions(
        self,
        images: Tensor,
        image_mask: Tensor | None,
        tokens: Tensor,
        token_count: Tensor,
        noise: Tensor,
        *,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
        state: Tensor | None = None,
        clean: Tensor | None = None,
        clean_count: int = 0,
        times: list[float] | None = None,
    ) -> Tensor:
        """Actions for one batch of observations.

        Args:
            images, image_mask, tokens, token_count: see ``embed_prefix``.
            noise: float32 [B, H, max_action_dim].
            num_steps: Euler steps; the config's where None.
            guidance: corrects v at each step (real-time chunking, ``flow.real_time_guidance``).
            state: float32 [B, max_state_dim], normalised; pi0 only.
            clean, clean_count: training-time real-time chunking: the first ``clean_count`` actions are
                given, ``clean`` float32 [B, H, max_action_dim], and enter with t = 0.
            times: t of each step, if not LeRobot's 1 - k / n.

        Returns:
            float32 [B, H, max_action_dim], normalised.
        """
        cache = self.encode(images, image_mask, tokens, token_count, state)
        times = times or step_times(num_steps or self.config.num_steps)
        steps = self.modulations(torch.tensor(times, dtype=torch.float32, device=noise.device))
        mask = None
        if clean is not None:
            mask = (torch.arange(noise.shape[1], device=noise.device) < clean_count)[:, None]
            given = self.modulations(torch.zeros(1, device=noise.device))

        def field(k: int, t: float, x: Tensor) -> Tensor:
            modulation = steps[:, k]
            if mask is not None:  # [sites, 1, H, C]: one row of modulations an action
                modulation = torch.where(mask, given[:, :, None], steps[:, k, None, None])
            return self.velocity(x, None, cache, modulation)

        return euler(field, noise, times, guidance=guidance, clean=clean, clean_mask=mask)

    def training_loss(
        self,
        cache: PrefixCache,
        actions: Tensor,
        noise: Tensor,
        t: Tensor,
        clean_count: Tensor | None = None,
    ) -> Tensor:
        """Flow-matching loss of each action: mean over the robot's dimensions of (v - (noise - a))^2.

        Args:
            cache: of the same B rows (``PrefixCache.repeat`` for several noises a prefix).
            actions, noise: float32 [B, H, max_action_dim], normalised and zero-padded.
            t: float32 [B] in (0, 1]; openpi draws 0.999 * Beta(1.5, 1) + 0.001.
            clean_count: int [B]: train for given actions: the first of them have t = 0 and no loss.

        Returns:
            float32 [B, H]; 0 where an action was given.
        """
        time = t[:, None].expand(actions.shape[:2])
        given = torch.zeros_like(time, dtype=torch.bool)
        if clean_count is not None:
            given = torch.arange(actions.shape[1], device=t.device) < clean_count[:, None]
            time = torch.where(given, torch.zeros_like(time), time)
        x = time[..., None] * noise + (1.0 - time[..., None]) * actions
        v = self.velocity(x, t if clean_count is None else time, cache)
        used = slice(0, self.config.action_dim)
        loss = (v[..., used] - (noise - actions)[..., used]).square().mean(-1)
        return torch.where(given, torch.zeros_like(loss), loss)


def keeps_float32(name: str) -> bool:
    """Parameters that stay float32 in a bf16 model: norms, time and action projections.

    Together 0.12 B of 3.35 B parameters; the adaptive norms' are read once, at load.
    """
    parts = name.split(".")
    return any("norm" in part for part in parts) or parts[0] not in ("paligemma_with_expert",)
