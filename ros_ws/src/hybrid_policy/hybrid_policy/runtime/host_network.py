"""The policy's network for one observation on a CPU, built from the plain model, whose weights it takes over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hybrid_policy.models.gemma import Gemma, Layer
from hybrid_policy.models.pi05 import PROJECTOR, Pi05
from hybrid_policy.runtime.host_blas import Floats
from hybrid_policy.runtime.host_layers import (
    HostLayer,
    HostVision,
    Memory,
    Modulation,
    plain_norm,
    rms_norm,
    rotations,
)
from hybrid_policy.runtime.host_linear import Buffers, HostLinear

#: of every norm of the expert, in the order in which a pass meets them, and pi0's time embedding
StepModulations = tuple[Sequence[Modulation], Floats | None]


class HostNetwork:
    """`vision`, `prefix`, then `velocity` at each step of the flow; what one writes the next reads."""

    def __init__(self, model: Pi05) -> None:
        config = self._config = model.config
        self._prefix_norms = [plain_norm(norm) for norm in model.prefix.norms()]
        self._expert_norms = [plain_norm(n) for n in model.expert.norms()] if config.kind == "pi0" else []
        self._words: Floats = model.prefix.embed_tokens.weight.detach().float().numpy()
        projector = model.get_submodule(PROJECTOR[:-1])
        self._vision = HostVision(model.vision, projector, config.vision, config.image_size)
        self._buffers = Buffers()
        self._prefix = [HostLayer(layer, config.prefix, self._buffers) for layer in _layers(model.prefix)]
        self._expert = [HostLayer(layer, config.expert, self._buffers) for layer in _layers(model.expert)]
        names = ["action_in_proj", "action_out_proj"]
        if config.kind == "pi0":
            names += ["state_proj", "action_time_mlp_in", "action_time_mlp_out"]
        self._flow = {name: HostLinear([cast(nn.Module, getattr(model, name))]) for name in names}
        places = config.prefix_tokens + 1 + config.horizon
        self._turns = rotations(places, config.prefix.head_dim)
        self._memory = [Memory.of(config.prefix, places) for _ in range(config.prefix.depth)]
        self._tokens = np.empty((config.prefix_tokens, config.prefix.width), np.float32)
        self._seen = 0

    def nbytes(self) -> int:
        """Bytes of weights and buffers."""
        layers = sum(layer.nbytes() for layer in (*self._prefix, *self._expert))
        memory = sum(one.keys.nbytes + one.values.nbytes for one in self._memory)
        flow = sum(part.nbytes() for part in self._flow.values())
        own = self._words.nbytes + self._tokens.nbytes + self._turns.nbytes + self._buffers.nbytes()
        return layers + memory + flow + own + self._vision.nbytes()

    def vision(self, images: NDArray[np.uint8] | Floats) -> int:
        """The cameras that are there: uint8 [V, S, S, 3], or float32 [V, 3, S, S]; the number of their tokens."""
        count = len(images) * self._config.image_tokens
        self._vision(images, self._tokens[:count])
        return count

    def prefix(self, image_tokens: int, words: NDArray[np.int64], state: Floats) -> None:
        """Keys and values of the images' tokens, then the prompt's; for pi0 also of the state's.

        Args:
            image_tokens: from `vision`. words: int64 [count], all of them valid. state: [max_state_dim].
        """
        count = image_tokens + len(words)
        x = self._tokens[:count]
        np.take(self._words, words, axis=0, out=x[image_tokens:])
        x[image_tokens:] *= np.float32(math.sqrt(x.shape[1]))
        turns = self._turns[:count]
        norms = self._prefix_norms
        for i, layer in enumerate(self._prefix[:-1]):
            layer(x, turns, self._memory[i], 0, (norms[2 * i], norms[2 * i + 1]))
        last = len(self._prefix) - 1
        self._prefix[last].keys_values(x, norms[2 * last], turns, self._memory[last], 0)
        self._seen = count
        if self._config.kind == "pi0":
            token = self._flow["state_proj"](state[None], np.empty((1, self._config.expert.width), np.float32))
            self._layers(token, self._expert_norms)
            self._seen += 1

    def velocity(self, x: Floats, step: StepModulations) -> Floats:
        """The learnt field at noisy actions [H, max_action_dim], the same form; overwritten by the next call."""
        rows, width = len(x), self._config.expert.width
        h = self._flow["action_in_proj"](x, self._buffers.take("actions", rows, width))
        norms, time = step
        if time is not None:
            both = self._buffers.take("both", rows, 2 * width)
            both[:, :width], both[:, width:] = h, time
            inner = torch.from_numpy(self._flow["action_time_mlp_in"](both, self._buffers.take("time", rows, width)))
            h = self._flow["action_time_mlp_out"](torch.nn.functional.silu(inner).numpy(), h)
        self._layers(h, norms)
        last = rms_norm(h, norms[-1], self._buffers.take("normed", rows, width))
        return self._flow["action_out_proj"](last, self._buffers.take("velocity", rows, x.shape[1]))

    def modulations(self, values: Floats) -> StepModulations:
        """What `Pi05.modulations` gives at one time ([sites, C]), or at a time an action ([sites, H, C])."""
        if self._config.kind == "pi0":
            return self._expert_norms, values[0]
        found = []
        for value in values:
            scale, shift, gate = (np.ascontiguousarray(part) for part in np.split(value, 3, axis=-1))
            found.append(Modulation(scale + np.float32(1.0), shift, gate))
        return found, None

    def _layers(self, x: Floats, norms: Sequence[Modulation]) -> None:
        """The expert over ``x`` [rows, width] in place, behind the tokens that were seen."""
        turns = self._turns[self._seen : self._seen + len(x)]
        for i, layer in enumerate(self._expert):
            layer(x, turns, self._memory[i], self._seen, (norms[2 * i], norms[2 * i + 1]))


def _layers(gemma: Gemma) -> list[Layer]:
    return [cast(Layer, layer) for layer in gemma.layers]
