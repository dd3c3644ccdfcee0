"""The engine on a CPU: float32 with the recipe's sites, without graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid_policy.models.flow import step_times
from hybrid_policy.models.pi05 import Pi05
from hybrid_policy.models.processors import ModelInputs
from hybrid_policy.runtime import host_blas
from hybrid_policy.runtime.backend import Guidance
from hybrid_policy.runtime.host_blas import Floats
from hybrid_policy.runtime.host_network import HostNetwork
from hybrid_policy.runtime.rtc import RealTimeChunking


class ReferenceBackend:
    """Runs the network step by step; what depends on the flow's times alone is computed once.

    The model's weights are taken over: it cannot be used afterwards.
    """

    def __init__(self, model: Pi05, rtc: RealTimeChunking, recipe_name: str) -> None:
        self._times = step_times(model.config.num_steps)
        self._strengths = rtc.step_weights(np.asarray(self._times)).tolist()
        self._state_dim = model.config.max_state_dim
        host_blas.keep_to_one_thread()
        threads = torch.get_num_threads()
        self._about = f"cpu: float32 with {host_blas.name()}, recipe {recipe_name}, {threads} threads"
        with torch.inference_mode():
            values = model.modulations(torch.tensor(self._times)).unbind(1)
            given = model.modulations(torch.zeros(1))[:, 0].numpy()
            self._network = HostNetwork(model.eval())
        self._values = [value.contiguous().numpy() for value in values]
        self._given = given
        self._steps = [self._network.modulations(value) for value in self._values]
        self._order = np.arange(model.config.horizon)[:, None]

    @property
    def description(self) -> str:
        """Device and route."""
        return self._about

    def memory_bytes(self) -> int:
        """Bytes of weights and buffers."""
        return self._network.nbytes()

    def close(self) -> None:
        """Drop the network."""
        del self._network

    @torch.inference_mode()
    def run(
        self, inputs: ModelInputs, noise: NDArray[np.float32], guidance: Guidance | None
    ) -> tuple[NDArray[np.float32], Mapping[str, float]]:
        """See `Backend.run`. Only the views that are there and the valid tokens are computed."""
        network = self._network
        with np.errstate(all="ignore"):  # the engine looks for what is not finite in the result
            begin = time.perf_counter()
            images = inputs.images if inputs.image_mask.all() else inputs.images[inputs.image_mask]
            count = network.vision(images)
            seen = time.perf_counter()
            network.prefix(count, inputs.tokens[: inputs.token_count], inputs.state[: self._state_dim])
            cached = time.perf_counter()
            x = noise.copy()
            self._flow(x, guidance)
            done = time.perf_counter()
        return x, {"vision": seen - begin, "prefix": cached - seen, "denoise": done - cached}

    def _flow(self, x: Floats, guidance: Guidance | None) -> None:
        """Euler steps on ``x`` [H, A] in place; see `runtime.rtc` for the guided step."""
        n = np.float32(len(self._times))
        clean = self._order < guidance.clean if guidance is not None and guidance.clean else None
        for i, (t, strength) in enumerate(zip(self._times, self._strengths, strict=True)):
            modulation = self._steps[i]
            if clean is not None and guidance is not None:
                np.copyto(x, guidance.target, where=clean)
                rows = np.where(clean, self._given[:, None], self._values[i][:, None])
                modulation = self._network.modulations(rows)
            v = self._network.velocity(x, modulation)
            if guidance is not None and strength:
                ahead = guidance.target - (x - np.float32(t) * v)
                v -= np.float32(strength) * guidance.weights[:, None] * ahead
            v /= n
            x -= v
        if clean is not None and guidance is not None:
            np.copyto(x, guidance.target, where=clean)
