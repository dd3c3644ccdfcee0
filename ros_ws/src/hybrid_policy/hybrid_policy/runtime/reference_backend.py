"""The engine on a CPU: the plain model with the recipe's sites, without graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_policy.models.flow import step_times
from hybrid_policy.models.pi05 import Pi05
from hybrid_policy.models.processors import ModelInputs
from hybrid_policy.runtime.backend import Guidance
from hybrid_policy.runtime.rtc import RealTimeChunking


class ReferenceBackend:
    """Runs the model module by module; what depends on the flow's times alone is computed once."""

    def __init__(self, model: Pi05, rtc: RealTimeChunking, recipe_name: str) -> None:
        self._model = model.eval()
        self._name = recipe_name
        times = step_times(model.config.num_steps)
        self._times = times
        self._strengths = rtc.step_weights(np.asarray(times)).tolist()
        with torch.inference_mode():
            self._steps = [m.contiguous() for m in model.modulations(torch.tensor(times)).unbind(1)]
            self._given = model.modulations(torch.zeros(1))[:, 0]
        self._order = torch.arange(model.config.horizon)[:, None]

    @property
    def description(self) -> str:
        """Device and route."""
        return f"cpu: PyTorch reference in float32, recipe {self._name}, {torch.get_num_threads()} threads"

    def memory_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return sum(t.nbytes for t in tensors)

    def close(self) -> None:
        """Drop the model."""
        del self._model

    @torch.inference_mode()
    def run(
        self, inputs: ModelInputs, noise: NDArray[np.float32], guidance: Guidance | None
    ) -> tuple[NDArray[np.float32], Mapping[str, float]]:
        """See `Backend.run`. Only the views that are there and the valid tokens are computed."""
        model = self._model
        begin = time.perf_counter()
        images = torch.from_numpy(np.ascontiguousarray(inputs.images[inputs.image_mask]))[None]
        tokens = torch.from_numpy(inputs.tokens[: inputs.token_count])[None]
        embedded, valid = model.embed_prefix(images, None, tokens, torch.tensor([inputs.token_count]))
        seen = time.perf_counter()
        state = torch.from_numpy(inputs.state)[None, : model.config.max_state_dim]
        cache = model.prefix_cache(embedded, valid, state if model.config.kind == "pi0" else None)
        cache.valid = None  # everything that was computed is valid
        cached = time.perf_counter()
        x = torch.from_numpy(noise)[None].clone()
        if guidance is None:
            self._flow(x, cache, None, None, None)
        else:
            target = torch.from_numpy(guidance.target)
            weights = torch.from_numpy(guidance.weights)[:, None]
            clean = self._order < guidance.clean if guidance.clean else None
            self._flow(x, cache, target, weights, clean)
        done = time.perf_counter()
        return x[0].numpy(), {"vision": seen - begin, "prefix": cached - seen, "denoise": done - cached}

    def _flow(
        self, x: Tensor, cache: object, target: Tensor | None, weights: Tensor | None, clean: Tensor | None
    ) -> None:
        """Euler steps on ``x`` [1, H, A] in place; see `runtime.rtc` for the guided step."""
        n = len(self._times)
        for t, strength, step in zip(self._times, self._strengths, self._steps, strict=True):
            modulation = step
            if clean is not None and target is not None:
                torch.where(clean, target, x[0], out=x[0])
                modulation = torch.where(clean, self._given[:, None], step[:, None])[:, None]
            v = self._model.velocity(x, None, cache, modulation)  # type: ignore[arg-type]
            if target is not None and weights is not None and strength:
                v = v - strength * weights * (target - (x - t * v))
            x.sub_(v, alpha=1.0 / n)
        if clean is not None and target is not None:
            torch.where(clean, target, x[0], out=x[0])
