"""Golden cases: inputs and the actions that a reference implementation gave for them.

A ``golden.safetensors`` holds, for each case ``<c>``: ``<c>.noise`` [B, H, A], ``<c>.actions`` [B, H, a],
``<c>.observation.images.<camera>`` (float in [0, 1] or uint8; channels first or last; any size),
``<c>.observation.language.tokens`` and ``.attention_mask`` [B, L]; for pi0 also ``<c>.observation.state``
(normalised); and, where it is not the checkpoint's, ``<c>.steps``. A camera that a case lacks is absent.
Short names work too: ``images.<camera>``, ``tokens``, ``mask``, ``state``, and openpi's ``tokenized_prompt``,
``tokenized_prompt_mask``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.tensor_files import TensorFile

TOKENS = ("observation.language.tokens", "tokens", "tokenized_prompt")
MASK = ("observation.language.attention_mask", "mask", "attention_mask", "tokenized_prompt_mask")
STATE = ("observation.state", "state")
IMAGES = ("observation.images.", "observation.", "images.", "image.")
STEPS = ("steps", "num_steps")


@dataclass(frozen=True)
class GoldenCase:
    """One case, ready for ``Pi05.sample_actions``.

    images: float32 [B, V, 3, S, S] in [-1, 1]. image_mask: bool [B, V]. tokens: int64 [B, L].
    token_mask: bool [B, L]. state: float32 [B, max_state_dim] or None. steps: Euler steps.
    noise: float32 [B, H, max_action_dim]. actions: float32 [B, H, any], what is expected.
    """

    name: str
    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor | None
    noise: Tensor
    actions: Tensor
    steps: int


def read_golden(path: Path, config: Pi05Config) -> list[GoldenCase]:
    """Every case of a file, checked against the checkpoint's dimensions.

    Raises:
        InputError: no such file, no case in it, or a tensor that is missing or does not fit.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; a golden.safetensors is expected beside the checkpoint")
    file = TensorFile(path)
    starts = [name.removesuffix("noise") for name in file.infos if name == "noise" or name.endswith(".noise")]
    if not starts:
        raise InputError(f"{path}: holds no case; expected tensors <case>.noise, <case>.actions, ...")

    def order(start: str) -> tuple[int, str]:
        label = start.removesuffix(".")
        return (int(label), "") if label.isdigit() else (1 << 30, label)

    return [_Reader(path, file, start, config).case() for start in sorted(starts, key=order)]


@dataclass
class _Reader:
    path: Path
    file: TensorFile
    start: str
    config: Pi05Config

    def find(self, names: tuple[str, ...]) -> str | None:
        """The first of some names that the case has."""
        return next((name for name in names if self.start + name in self.file.infos), None)

    def take(self, *names: str) -> Tensor:
        found = self.find(names)
        if found is None:
            raise InputError(f"{self.path}: {self.start + names[0]}: missing")
        return self.file.read(self.start + found).clone()

    def error(self, name: str, tensor: Tensor, expected: str) -> InputError:
        given = f"{tensor.dtype} {tuple(tensor.shape)}"
        return InputError.at(self.path, self.start + name, given, expected)

    def case(self) -> GoldenCase:
        config = self.config
        noise, actions = self.take("noise"), self.take("actions")
        if noise.ndim != 3 or noise.shape[1:] != (config.horizon, config.max_action_dim):
            raise self.error("noise", noise, f"[B, {config.horizon}, {config.max_action_dim}]")
        batch = noise.shape[0]
        if actions.ndim != 3 or actions.shape[:2] != noise.shape[:2] or actions.shape[2] > noise.shape[2]:
            raise self.error("actions", actions, f"[{batch}, {config.horizon}, at most {noise.shape[2]}]")
        tokens, mask = self.take(*TOKENS).long(), self.take(*MASK).bool()
        if tokens.ndim != 2 or tokens.shape[0] != batch or mask.shape != tokens.shape:
            raise self.error(TOKENS[0], tokens, f"[{batch}, L], and a mask of the same shape")
        if int(tokens.max()) >= config.vocab_size or int(tokens.min()) < 0:
            raise self.error(TOKENS[0], tokens, f"ids from 0 to {config.vocab_size - 1}")
        images, present = self.images(batch)
        return GoldenCase(
            name=self.start.removesuffix(".") or "case",
            images=images,
            image_mask=present,
            tokens=tokens,
            token_mask=mask,
            state=self.state(batch),
            noise=noise.float(),
            actions=actions.float(),
            steps=self.steps(),
        )

    def steps(self) -> int:
        name = self.find(STEPS)
        if name is None:
            return self.config.num_steps
        value = self.take(name).flatten()
        if value.numel() != 1 or value.is_floating_point() or not 1 <= int(value) <= 10_000:
            raise self.error(name, value, "one whole number of steps, from 1 to 10000")
        return int(value)

    def state(self, batch: int) -> Tensor | None:
        if self.config.kind != "pi0":
            return None
        state = self.take(*STATE).float()
        if state.ndim != 2 or state.shape[0] != batch or state.shape[1] > self.config.max_state_dim:
            raise self.error(STATE[0], state, f"[{batch}, at most {self.config.max_state_dim}]")
        return F.pad(state, (0, self.config.max_state_dim - state.shape[1]))

    def images(self, batch: int) -> tuple[Tensor, Tensor]:
        config = self.config
        images = torch.full((batch, len(config.cameras), 3, config.image_size, config.image_size), -1.0)
        present = torch.zeros(batch, len(config.cameras), dtype=torch.bool)
        for i, camera in enumerate(config.cameras):
            name = self.find(tuple(start + camera for start in IMAGES))
            if name is not None:
                images[:, i], present[:, i] = self.image(name, batch), True
        if not bool(present.any()):
            raise InputError(f"{self.path}: {self.start}observation.images.*: none of {', '.join(config.cameras)}")
        return images, present

    def image(self, name: str, batch: int) -> Tensor:
        """One camera: -> float32 [B, 3, S, S] in [-1, 1]."""
        image = self.take(name)
        if image.ndim != 4 or image.shape[0] != batch or 3 not in (image.shape[1], image.shape[3]):
            raise self.error(name, image, f"[{batch}, 3, height, width]")
        if image.shape[1] != 3:
            image = image.permute(0, 3, 1, 2)
        image = image.float() / 255.0 if image.dtype == torch.uint8 else image.float()
        if image.shape[2:] != (self.config.image_size,) * 2:
            image = fit(image, self.config.image_size)
        return image * 2.0 - 1.0


def fit(images: Tensor, size: int) -> Tensor:
    """Resize float images with padding as LeRobot does on tensors (bilinear, no antialiasing, black).

    float32 [B, 3, any, any] in [0, 1] -> [B, 3, size, size]. Cameras go another way
    (``images.resize_with_pad``), as in openpi.
    """
    height, width = images.shape[2:]
    ratio = max(width / size, height / size)
    new = int(height / ratio), int(width / ratio)
    fitted = F.interpolate(images, size=new, mode="bilinear", align_corners=False).clamp(0.0, 1.0)
    (top, more_h), (left, more_w) = divmod(size - new[0], 2), divmod(size - new[1], 2)
    return F.pad(fitted, (left, left + more_w, top, top + more_h))
