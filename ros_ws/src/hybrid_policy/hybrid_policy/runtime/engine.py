"""The engine: a checkpoint with a recipe applied, everything allocated, ready to infer.

engine = Engine.from_checkpoint("checkpoints/aloha", "seed")
chunk = engine.infer(observation)
"""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import Checkpoint, open_checkpoint
from hybrid_policy.models.observation import ActionChunk, Continuation, Observation, PolicySpec
from hybrid_policy.models.processors import ModelInputs, Processors
from hybrid_policy.runtime.backend import Backend, Guidance
from hybrid_policy.runtime.quantized_checkpoint import quantised_sites, read_recipe
from hybrid_policy.runtime.recipe import Recipe, load_recipe
from hybrid_policy.runtime.rtc import RealTimeChunking, overlap_weights, shifted

log = logging.getLogger(__name__)

STAGES = ("preprocess", "vision", "prefix", "denoise", "postprocess")


def choose_device(device: str) -> torch.device:
    """``auto`` takes a CUDA device where there is one, and logs what it took.

    Raises:
        InputError: ``cuda`` without a CUDA device, or an unknown name.
    """
    available = torch.cuda.is_available()
    if device == "auto":
        chosen = torch.device("cuda" if available else "cpu")
        log.info("device auto: %s", torch.cuda.get_device_name() if available else "cpu (no CUDA device)")
        return chosen
    if device == "cpu" or (device.startswith("cuda") and available):
        return torch.device(device)
    if device.startswith("cuda"):
        raise InputError(f"device: {device!r} given, but torch {torch.__version__} sees no CUDA device; use 'cpu'")
    raise InputError.at("engine", "device", device, "auto, cpu or cuda")


class Engine:
    """A policy that is ready to run. Made by `from_checkpoint`; not for use from two threads at once."""

    def __init__(
        self,
        spec: PolicySpec,
        processors: Processors,
        backend: Backend,
        recipe: Recipe,
        rtc: RealTimeChunking,
        seed: int | None = None,
    ) -> None:
        self._spec = spec
        self._processors = processors
        self._backend = backend
        self._recipe = recipe
        self._rtc = rtc
        self._random = np.random.default_rng(seed)
        #: (normalised chunk, the state it was inferred from): relative chunks are re-anchored by it
        self._recent: deque[tuple[NDArray[np.float32], NDArray[np.float32]]] = deque(maxlen=8)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        recipe: str | Path | Recipe | None = None,
        device: str = "auto",
        *,
        rtc: RealTimeChunking | None = None,
        tokenizer: str | Path | None = None,
        timing: bool = True,
        seed: int | None = None,
        progress: bool = False,
        float_images: bool = False,
    ) -> Engine:
        """Load a checkpoint, apply a recipe, allocate everything, capture graphs and warm up.

        Args:
            path: a checkpoint directory (openpi, LeRobot, ours, or one that ``hybrid-policy quantize`` wrote).
            recipe: a `Recipe`, a shipped recipe's name or a file; None takes a quantised checkpoint's own, else bf16.
            device: ``auto``, ``cpu`` or ``cuda``.
            rtc: how a chunk is tied to the previous one.
            tokenizer: where the directory has none.
            timing: record vision, prefix and denoise apart (on a GPU: three graphs instead of one).
            seed: of the noise that `infer` draws where it is given none.
            progress: show a progress bar while loading.
            float_images: on a GPU, `run` takes float32 [V, 3, S, S] images (golden cases) instead of uint8 ones.

        Raises:
            InputError: a checkpoint, recipe or device that cannot be used.
        """
        chosen_device = choose_device(device)
        packed = quantised_sites(Path(path))
        checkpoint = open_checkpoint(path, tokenizer, packed)
        if recipe is None:
            applied = read_recipe(Path(path)) if packed else load_recipe("bf16")
        else:
            applied = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        rtc = rtc or RealTimeChunking()
        backend = _make_backend(checkpoint, applied, chosen_device, rtc, timing, progress, float_images)
        log.info("engine: %s, recipe %s, %s", checkpoint.directory, applied.name, backend.description)
        return cls(checkpoint.spec, checkpoint.processors, backend, applied, rtc, seed)

    @property
    def spec(self) -> PolicySpec:
        """Cameras, dimensions and horizon."""
        return self._spec

    @property
    def recipe(self) -> Recipe:
        """The recipe that was applied."""
        return self._recipe

    @property
    def rtc(self) -> RealTimeChunking:
        """How a chunk is tied to the previous one."""
        return self._rtc

    @property
    def description(self) -> str:
        """One line: device and routes."""
        return self._backend.description

    def memory_bytes(self) -> int:
        """Device memory held at steady state."""
        return self._backend.memory_bytes()

    def noise(self) -> NDArray[np.float32]:
        """A fresh float32 [horizon, max_action_dim] of standard normal noise."""
        return self._random.standard_normal((self._spec.horizon, self._spec.max_action_dim), dtype=np.float32)

    def infer(
        self,
        observation: Observation,
        noise: NDArray[np.float32] | None = None,
        previous: Continuation | None = None,
    ) -> ActionChunk:
        """One chunk of actions for one observation.

        Args:
            observation: images, state and prompt.
            noise: float32 [horizon, max_action_dim]; drawn if None. The same noise gives the same bits.
            previous: the chunk being executed, for real-time chunking; ignored where the mode is ``off``.

        Raises:
            InputError: an observation, noise or continuation that does not fit.
        """
        begin = time.perf_counter()
        inputs = self._processors.prepare(observation)
        guidance = self._guidance(previous, observation)
        prepared = time.perf_counter()
        normalised, stages = self.run(inputs, noise, guidance)
        finishing = time.perf_counter()
        if not np.isfinite(normalised).all():
            raise FloatingPointError(
                "the model gave NaN or infinity: weights or inputs are not finite, or an activation outgrew FP8 "
                "(recipes bf16 and hybrid keep the action expert's in bf16)"
            )
        actions = self._processors.finish(normalised, observation)
        if any(self._processors.relative):
            self._recent.append((normalised, observation.state.copy()))
        timings = {
            "preprocess": prepared - begin,
            **(stages or {"vision": 0.0, "prefix": 0.0, "denoise": finishing - prepared}),
            "postprocess": time.perf_counter() - finishing,
        }
        return ActionChunk(actions, normalised, observation.stamp, timings)

    def run(
        self, inputs: ModelInputs, noise: NDArray[np.float32] | None = None, guidance: Guidance | None = None
    ) -> tuple[NDArray[np.float32], dict[str, float]]:
        """The model alone: prepared inputs to normalised actions float32 [horizon, max_action_dim], and seconds."""
        if noise is None:
            noise = self.noise()
        expected = (self._spec.horizon, self._spec.max_action_dim)
        if noise.shape != expected or noise.dtype != np.float32:
            raise InputError.at("infer", "noise", (noise.shape, str(noise.dtype)), f"float32 {expected}")
        normalised, stages = self._backend.run(inputs, noise, guidance)
        return normalised, dict(stages)

    def warm_up(self, runs: int = 2) -> None:
        """Run on made-up inputs, so that the first real inference is as quick as the next."""
        config = self._processors.config
        size, views = config.image_size, len(config.cameras)
        inputs = ModelInputs(
            images=np.zeros((views, size, size, 3), np.uint8),
            image_mask=np.ones(views, np.bool_),
            tokens=np.ones(config.max_token_len, np.int64),
            token_count=config.max_token_len,
            state=np.zeros(max(config.max_state_dim, config.state_dim), np.float32),
            prompt="",
        )
        noise = np.zeros((self._spec.horizon, self._spec.max_action_dim), np.float32)
        for _ in range(runs):
            self._backend.run(inputs, noise, None)

    def close(self) -> None:
        """Give the device's memory back."""
        self._backend.close()

    def _guidance(self, previous: Continuation | None, observation: Observation) -> Guidance | None:
        """Y, W and the clean count of one inference; None where nothing ties it to the previous chunk."""
        if previous is None or self._rtc.mode == "off":
            return None
        horizon, width = self._spec.horizon, self._spec.max_action_dim
        target = shifted(self._anchored(previous, observation), horizon, width)
        if self._rtc.mode == "prefix":
            return Guidance(target, np.zeros(horizon, np.float32), previous.delay)
        return Guidance(target, overlap_weights(horizon, previous.delay, previous.consumed, self._rtc.schedule))

    def _anchored(self, previous: Continuation, observation: Observation) -> Continuation:
        """``previous`` as seen from the observation's state, where the checkpoint predicts relative actions."""
        if not any(self._processors.relative):
            return previous
        for chunk, state in reversed(self._recent):
            if np.array_equal(chunk, previous.normalised):
                absolute = self._processors.finish(chunk, Observation(images={}, state=state, prompt=""))
                moved = self._processors.normalized_actions(absolute, observation.state)
                used = self._spec.action_dim
                moved[:, used:] = chunk[:, used:]  # padding has no units to move
                return Continuation(moved, previous.consumed, previous.delay)
        raise InputError(
            "previous: a chunk that this engine did not give lately; this checkpoint predicts actions relative "
            "to the state, so the engine must know the state it counts from"
        )


def _make_backend(
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: torch.device,
    rtc: RealTimeChunking,
    timing: bool,
    progress: bool,
    float_images: bool,
) -> Backend:
    from hybrid_policy.runtime.loading import load_cuda, load_reference

    if device.type == "cpu":
        return load_reference(checkpoint, recipe, rtc, progress)
    return load_cuda(checkpoint, recipe, device, rtc, timing, progress, float_images=float_images)
