"""Every dimension of a pi0.5-class policy in frozen dataclasses. No torch here.

The numbers of the presets are those of openpi's ``gemma_2b``, ``gemma_300m`` and SigLIP So400m/14.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from hybrid_policy.errors import InputError

#: The model's camera names in openpi's published checkpoints, in the order of the prefix.
OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def _positive(owner: object) -> None:
    """Refuse any integer field below 1, by name."""
    for field in dataclasses.fields(owner):  # type: ignore[arg-type]
        value = getattr(owner, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise InputError(f"{type(owner).__name__}.{field.name}: {value} given, expected at least 1")


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP vision transformer: ``heads`` divide ``width``; patches are ``patch`` pixels square."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    heads: int = 16
    patch: int = 14

    def __post_init__(self) -> None:
        _positive(self)
        if self.width % self.heads:
            raise InputError(f"VisionConfig: width {self.width} is no multiple of heads {self.heads}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma transformer: ``heads`` query heads share ``kv_heads`` key/value heads of ``head_dim``."""

    width: int
    depth: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _positive(self)
        if self.heads % self.kv_heads:
            raise InputError(f"GemmaConfig: heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"GemmaConfig: head_dim {self.head_dim} is odd; rotary embedding needs pairs")


#: openpi's and LeRobot's names of the transformer sizes.
GEMMA_VARIANTS = {
    "gemma_2b": GemmaConfig(width=2048, depth=18, mlp_dim=16384, heads=8, kv_heads=1, head_dim=256),
    "gemma_300m": GemmaConfig(width=1024, depth=18, mlp_dim=4096, heads=8, kv_heads=1, head_dim=256),
    "dummy": GemmaConfig(width=64, depth=4, mlp_dim=128, heads=8, kv_heads=1, head_dim=16),
}


@dataclass(frozen=True)
class Pi05Config:
    """A pi0.5 (or pi0) policy: what builds the model and what its processors need to know.

    kind: ``pi05`` (time enters by adaptive RMSNorm) or ``pi0`` (state token, time in the action MLP).
    max_action_dim, max_state_dim: widths that the model works in; ``action_dim`` and ``state_dim``
        of them belong to the robot, the rest is padding.
    horizon: actions of one chunk. num_steps: Euler steps of the flow.
    image_size: pixels of the square image. max_token_len: tokens of the padded prompt.
    min_period, max_period: of the sine-cosine embedding of the flow's time.
    state_in_prompt: the prompt carries the discretised state (pi0.5's usual form).
    """

    kind: Literal["pi05", "pi0"] = "pi05"
    vision: VisionConfig = VisionConfig()
    prefix: GemmaConfig = GEMMA_VARIANTS["gemma_2b"]
    expert: GemmaConfig = GEMMA_VARIANTS["gemma_300m"]
    vocab_size: int = 257152
    image_size: int = 224
    cameras: tuple[str, ...] = OPENPI_CAMERAS
    max_action_dim: int = 32
    action_dim: int = 32
    max_state_dim: int = 32
    state_dim: int = 32
    horizon: int = 50
    max_token_len: int = 200
    num_steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0
    state_in_prompt: bool = True

    def __post_init__(self) -> None:
        _positive(self)
        if self.kind not in ("pi05", "pi0"):
            raise InputError(f"Pi05Config.kind: {self.kind!r} given, expected 'pi05' or 'pi0'")
        for name in ("depth", "kv_heads", "head_dim"):
            ours, theirs = getattr(self.prefix, name), getattr(self.expert, name)
            if ours != theirs:
                raise InputError(
                    f"Pi05Config: prefix.{name} is {ours} and expert.{name} is {theirs}; "
                    "the expert reads the prefix's keys and values layer by layer, so they must agree"
                )
        if self.expert.width % 2:
            raise InputError(f"Pi05Config: expert.width {self.expert.width} is odd; sine-cosine needs pairs")
        if self.action_dim > self.max_action_dim:
            raise InputError(f"Pi05Config: action_dim {self.action_dim} above max_action_dim {self.max_action_dim}")
        if self.kind == "pi0" and self.state_dim > self.max_state_dim:
            raise InputError(f"Pi05Config: state_dim {self.state_dim} above max_state_dim {self.max_state_dim}")
        if self.image_size < self.vision.patch:
            raise InputError(f"Pi05Config: image_size {self.image_size} below patch {self.vision.patch}")
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise InputError(f"Pi05Config.cameras: {self.cameras} given, expected at least one, none twice")
        if not 0 < self.min_period < self.max_period:
            raise InputError(f"Pi05Config: periods {self.min_period}, {self.max_period} given, expected 0 < min < max")

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: one a whole patch."""
        return (self.image_size // self.vision.patch) ** 2

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the padded prefix: all cameras and the prompt."""
        return len(self.cameras) * self.image_tokens + self.max_token_len

    @property
    def modulation_sites(self) -> int:
        """Adaptive norms of the expert: two a layer and the last one (37 at full size)."""
        return 2 * self.expert.depth + 1

    def replace(self, **changes: object) -> Pi05Config:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


#: pi0.5 as published: 3.35 B parameters.
PI05_FULL = Pi05Config()

#: pi0 as published.
PI0_FULL = Pi05Config(kind="pi0", max_token_len=48, state_in_prompt=False)


def small_config(
    *,
    cameras: tuple[str, ...],
    state_dim: int,
    action_dim: int,
    vocab_size: int,
    image_size: int = 112,
    horizon: int = 16,
    max_token_len: int = 48,
    width: int = 256,
    depth: int = 6,
    num_steps: int = 5,
) -> Pi05Config:
    """A policy of a few million parameters for one robot: the same code, trained from nothing.

    With the defaults, about 10 M parameters. The prefix has ``width`` channels, the expert three
    quarters of it, the vision tower as many as the prefix and two layers fewer; attention heads are
    64 channels wide (one key/value head, as in Gemma-2B).
    """
    expert_width = max(64, width * 3 // 4)
    heads = max(1, width // 64)
    return Pi05Config(
        vision=VisionConfig(width=width, depth=max(2, depth - 2), mlp_dim=3 * width, heads=heads, patch=14),
        prefix=GemmaConfig(width, depth, 3 * width, heads, 1, 64),
        expert=GemmaConfig(expert_width, depth, 3 * expert_width, heads, 1, 64),
        vocab_size=vocab_size,
        image_size=image_size,
        cameras=cameras,
        max_action_dim=action_dim,
        action_dim=action_dim,
        max_state_dim=state_dim,
        state_dim=state_dim,
        horizon=horizon,
        max_token_len=max_token_len,
        num_steps=num_steps,
    )
