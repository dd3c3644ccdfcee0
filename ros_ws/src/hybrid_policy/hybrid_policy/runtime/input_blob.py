"""All inputs of an inference in one block of memory, so that one copy brings them to the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.kernels.flow_step import Guide
from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.processors import ModelInputs
from hybrid_policy.runtime.backend import Guidance
from hybrid_policy.runtime.device_model import Inputs

_ALIGN = 256


@dataclass(frozen=True)
class _Field:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class InputBlob:
    """A host block (page-locked where the device is a GPU) and its twin on the device, with typed views of both.

    views: cameras at most. float_images: float32 [V, 3, S, S] in [-1, 1] instead of uint8 [V, S, S, 3].
    """

    def __init__(self, config: Pi05Config, views: int, device: torch.device, *, float_images: bool = False) -> None:
        self._config, self._views = config, views
        size, horizon = config.image_size, config.horizon
        self._max_rows = views * config.image_tokens + config.max_token_len
        image = ((views, 3, size, size), torch.float32) if float_images else ((views, size, size, 3), torch.uint8)
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "images": image,
            "tokens": ((config.max_token_len,), torch.int64),
            "rows": ((self._max_rows,), torch.int64),
            "valid": ((1,), torch.int32),
            "clean": ((1,), torch.int32),
            "noise": ((horizon, config.max_action_dim), torch.float32),
            "target": ((horizon, config.max_action_dim), torch.float32),
            "weights": ((horizon,), torch.float32),
        }
        fields, offset = [], 0
        for name, (shape, dtype) in wanted.items():
            fields.append(_Field(name, shape, dtype, offset))
            offset += -(-fields[-1].nbytes // _ALIGN) * _ALIGN
        self._host = torch.zeros(offset, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(offset, dtype=torch.uint8, device=device)
        self._views_of: dict[str, NDArray[np.generic]] = {f.name: _typed(self._host, f).numpy() for f in fields}
        on_device = {f.name: _typed(self._device, f) for f in fields}
        guide = Guide(on_device["target"], on_device["weights"], on_device["clean"])
        self.inputs = Inputs(
            images=on_device["images"],
            tokens=on_device["tokens"],
            rows=on_device["rows"],
            valid=on_device["valid"],
            noise=on_device["noise"],
            guide=guide,
        )
        self._filled: tuple[bytes, int] | None = None  # cameras and prompt length that ``rows`` stands for
        self._guided = False

    def fill(self, inputs: ModelInputs, noise: NDArray[np.float32], guidance: Guidance | None) -> int:
        """Write one inference's inputs into the host block; returns the count of valid prefix rows.

        Absent cameras are left out of the prefix, and what is there moves up: nothing attends to them, and
        positions count valid tokens only.

        Raises:
            InputError: images of another shape or dtype, or more tokens than the model takes.
        """
        host = self._views_of
        images = host["images"]
        if inputs.images.shape != images.shape or inputs.images.dtype != images.dtype:
            got = (inputs.images.shape, str(inputs.images.dtype))
            raise InputError.at("infer", "images", got, f"{images.dtype} {images.shape}")
        count = int(inputs.token_count)
        if not 0 <= count <= self._config.max_token_len:
            raise InputError.at("infer", "token_count", count, f"0 to {self._config.max_token_len}")
        images[...] = inputs.images
        host["tokens"][...] = inputs.tokens
        wanted = (inputs.image_mask.tobytes(), count)
        if wanted != self._filled:  # most often as the inference before
            self._filled = None
            self._fill_rows(inputs.image_mask, count)
            self._filled = wanted
        host["noise"][...] = noise
        if guidance is not None:
            self._guided = True
            host["weights"][...] = guidance.weights
            host["target"][...] = guidance.target
            host["clean"][0] = guidance.clean
        elif self._guided:
            host["weights"][...] = 0.0
            host["target"][...] = 0.0
            host["clean"][0] = 0
            self._guided = False
        return int(host["valid"][0])

    def _fill_rows(self, image_mask: NDArray[np.bool_], count: int) -> None:
        """Which rows of features and prompt the prefix takes, and how many."""
        rows, patches, at = self._views_of["rows"], self._config.image_tokens, 0
        rows[...] = 0  # padding repeats a valid row: finite, and masked
        for view in np.flatnonzero(image_mask):
            rows[at : at + patches] = np.arange(view * patches, (view + 1) * patches)
            at += patches
        first = self._views * patches
        rows[at : at + count] = np.arange(first, first + count)
        self._views_of["valid"][0] = at + count

    def send(self) -> None:
        """One copy to the device, on the current stream; may be captured."""
        self._device.copy_(self._host, non_blocking=True)


def _typed(block: Tensor, field: _Field) -> Tensor:
    return block[field.offset : field.offset + field.nbytes].view(field.dtype).view(field.shape)
