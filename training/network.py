"""The small pi0.5 to train: its dimensions, its first weights, and a grounding head for training alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from collect import Frames
from hybrid_policy.models.config import GemmaConfig, Pi05Config, VisionConfig
from hybrid_policy.models.normalization import Normalization, discretize
from hybrid_policy.models.pi05 import Pi05, PrefixCache
from hybrid_policy.sim.robot import BASE_CAMERA, CAMERAS
from numpy.typing import NDArray
from pool import Asked
from tokenizers import Tokenizer
from torch import Tensor, nn
from vocabulary import PromptIds, smooth_rows

#: Middle and half extent of the cubes' positions, for the grounding head (m).
_MIDDLE, _EXTENT = (0.09, 0.50, 0.10), (0.11, 0.10, 0.10)
#: A statistic narrower than this (rad, or the gripper's share) is widened: joints that hardly move would
#: otherwise have their noise blown up to the whole range.
LEAST_SPREAD = 0.4


def small_policy(vocab_size: int, tiny: bool = False) -> Pi05Config:
    """About 11 M parameters: 64 tokens an image, horizon 1.6 s at 20 Hz. ``tiny``: for trying the code."""
    width, expert, depth, vision = (64, 64, 2, 2) if tiny else (256, 192, 5, 4)
    heads = width // 64
    return Pi05Config(
        vision=VisionConfig(width=width, depth=vision, mlp_dim=3 * width, heads=heads, patch=14),
        prefix=GemmaConfig(width, depth, 3 * width, 4, 1, 64),
        expert=GemmaConfig(expert, depth, 3 * expert, 4, 1, 64),
        vocab_size=vocab_size,
        image_size=112,
        cameras=CAMERAS,
        max_action_dim=14,
        action_dim=14,
        max_state_dim=14,
        state_dim=14,
        horizon=32,
        max_token_len=32,
        num_steps=5,
    )


def fresh_model(config: Pi05Config, tokenizer: Tokenizer, seed: int) -> Pi05:
    """First weights: torch's own, small learnt positions, and smooth embeddings of the state's numbers."""
    torch.manual_seed(seed)
    model = Pi05(config)
    with torch.no_grad():
        nn.init.normal_(model.vision.embeddings.position_embedding.weight, std=0.3)
        table = model.prefix.embed_tokens.weight
        for token, row in smooth_rows(tokenizer, config.state_dim, config.prefix.width, seed).items():
            table[token] = torch.from_numpy(row)
    return model


def statistics(frames: Frames) -> dict[str, dict[str, NDArray[np.float32]]]:
    """1st and 99th percentiles of state and action, at least LEAST_SPREAD apart, and mean and std."""
    given = {"state": frames.state, "action": frames.actions.reshape(-1, frames.actions.shape[-1])[::17]}
    out = {}
    for name, values in given.items():
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        wider = np.maximum(LEAST_SPREAD - (high - low), 0.0) / 2
        out[name] = {
            "q01": (low - wider).astype(np.float32),
            "q99": (high + wider).astype(np.float32),
            "mean": values.mean(0).astype(np.float32),
            "std": values.std(0).astype(np.float32),
        }
    return out


def patch_of(cubes: NDArray[np.float32], patches: int) -> NDArray[np.int64]:
    """Which patch of the overhead picture a point lies in: float [..., 3] (m) -> int64 [...], row-major."""
    eye, target, fovy = (np.asarray(part) for part in BASE_CAMERA)
    back = (eye - target) / np.linalg.norm(eye - target)
    right = np.cross((0.0, 1.0, 0.0), back)
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    ray = cubes - eye
    depth = -(ray @ back) * np.tan(np.deg2rad(fovy) / 2)
    across, down = (ray @ right) / depth, -(ray @ up) / depth
    place = [np.clip(((axis + 1) / 2 * patches).astype(int), 0, patches - 1) for axis in (across, down)]
    return (place[1] * patches + place[0]).astype(np.int64)


class Grounding(nn.Module):
    """Where the named cube is, read from the prefix: position, and its patch in the overhead picture."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        width = config.prefix.width
        self.tokens = config.image_tokens
        self.first_word = config.image_tokens * len(config.cameras)
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, 1)
        self.position = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))
        self.register_buffer("middle", torch.tensor(_MIDDLE), persistent=False)
        self.register_buffer("extent", torch.tensor(_EXTENT), persistent=False)

    def forward(self, hidden: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden [B, T, width] of the cache, words' counts [B] -> position (m) [B, 3], logits [B, P]."""
        seen = self.norm(hidden.float())
        last = seen[torch.arange(len(seen), device=seen.device), self.first_word + counts - 1]
        return self.middle + self.extent * self.position(last), self.patch(seen[:, : self.tokens])[..., 0]

    def loss(self, cache: PrefixCache, counts: Tensor, cube: Tensor, patch: Tensor) -> Tensor:
        """Position (smooth L1 in half extents) and patch (cross entropy, a tenth)."""
        position, logits = self(cache.hidden, counts)
        error = (position - cube) / self.extent
        near = F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1)
        return near + 0.1 * F.cross_entropy(logits, patch)


class TrainingPolicy:
    """The model with what surrounds it, for batches of a simulator pool. Statistics as written."""

    def __init__(
        self,
        model: Pi05,
        stats: dict[str, dict[str, NDArray[np.float32]]],
        tokenizer: Tokenizer,
        device: torch.device,
    ) -> None:
        self.model, self.device, self.config = model, device, model.config
        self.state = Normalization.of("quantiles", "lerobot", stats["state"], 14, "state")
        self.action = Normalization.of("quantiles", "lerobot", stats["action"], 14, "action")
        self.ids = PromptIds(tokenizer, model.config.state_dim, model.config.max_token_len)

    def tokens(self, prompts: list[str], states: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids [n, max_token_len] and counts [n] of prompts with states in the checkpoint's units."""
        return self.ids(prompts, discretize(self.state.normalize(states)))

    @torch.no_grad()
    def __call__(self, asked: list[Asked]) -> NDArray[np.float32]:
        """See ``pool.BatchPolicy``."""
        ids, counts = self.tokens([a.prompt for a in asked], np.stack([a.state for a in asked]))
        images = torch.from_numpy(np.stack([a.images for a in asked])).to(self.device)
        noise = torch.from_numpy(np.stack([a.noise for a in asked])).to(self.device)
        words, used = (torch.from_numpy(x).to(self.device) for x in (ids, counts))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            actions = self.model.sample_actions(images, None, words, used, noise)
        return self.action.unnormalize(actions.float().cpu().numpy()).astype(np.float32)


@dataclass
class DeviceFrames:
    """Frames on the training device, ready to draw batches from (both prompts of each)."""

    images: Tensor
    words: Tensor
    counts: Tensor
    actions: Tensor
    cubes: Tensor
    patches: Tensor

    @classmethod
    def of(
        cls, frames: Frames, policy: TrainingPolicy, prompts: list[list[str]], random: np.random.Generator
    ) -> DeviceFrames:
        """prompts: for each of the two colours, its phrasings; each frame gets one at random."""
        words, counts = [], []
        for phrasings in prompts:
            chosen = [phrasings[i] for i in random.integers(len(phrasings), size=len(frames))]
            ids, used = policy.tokens(chosen, frames.state)
            words.append(ids)
            counts.append(used)
        side = policy.config.image_size // policy.config.vision.patch
        normalized = policy.action.normalize(frames.actions)

        def put(values: NDArray[Any], kind: torch.dtype) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(policy.device, kind)

        return cls(
            images=put(frames.images, torch.uint8),
            words=put(np.stack(words, 1), torch.int16),
            counts=put(np.stack(counts, 1), torch.int16),
            actions=put(normalized, torch.float32),
            cubes=put(frames.cubes, torch.float32),
            patches=put(patch_of(frames.cubes, side), torch.int16),
        )

    def extended(self, other: DeviceFrames) -> DeviceFrames:
        """Both."""
        return DeviceFrames(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(other).values())))

    def __len__(self) -> int:
        return len(self.images)
