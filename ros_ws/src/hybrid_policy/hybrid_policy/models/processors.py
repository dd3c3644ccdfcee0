"""Between a robot's numbers and the model's: images, state, prompt in; actions out. numpy and OpenCV."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError
from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.images import resize_with_pad
from hybrid_policy.models.normalization import Normalization, discretize
from hybrid_policy.models.observation import Observation
from hybrid_policy.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)

#: How the prompt is written (``build_prompt``).
PromptStyle = Literal["state", "task", "openpi_plain", "lerobot_plain"]


@dataclass(frozen=True)
class ModelInputs:
    """One observation as the model takes it (no batch axis).

    images: uint8 [V, S, S, 3], in the order of the config's cameras; the model maps 0...255 to -1...1.
    image_mask: bool [V], False for a camera that the observation lacks (its image is black).
    tokens: int64 [max_token_len], padded with 0 on the right. token_count: how many are valid.
    state: float32 [max_state_dim], normalised and zero-padded; only pi0 reads it.
    prompt: the text that was tokenised.
    """

    images: NDArray[np.uint8]
    image_mask: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    token_count: int
    state: NDArray[np.float32]
    prompt: str


def clean_prompt(text: str) -> str:
    """One line without underscores, as openpi and LeRobot write it."""
    return text.strip().replace("_", " ").replace("\n", " ")


def build_prompt(style: PromptStyle, text: str, state: NDArray[np.floating]) -> str:
    """The text that is tokenised.

    state: ``Task: {text}, State: {bins};\\nAction: ``, pi0.5's usual form.
    task: ``Task: {text};\\nAction: ``, LeRobot's where the state is kept out of the prompt.
    openpi_plain: ``{text}``; a newline follows as a token of its own (pi0, pi05_libero).
    lerobot_plain: ``{text}\\n`` as the user wrote it (LeRobot's pi0).
    """
    if style == "state":
        bins = " ".join(str(b) for b in discretize(state))
        return f"Task: {clean_prompt(text)}, State: {bins};\nAction: "
    if style == "task":
        return f"Task: {clean_prompt(text)};\nAction: "
    if style == "openpi_plain":
        return clean_prompt(text)
    return text if text.endswith("\n") else f"{text}\n"


@dataclass
class Processors:
    """Everything around the model that a checkpoint prescribes.

    state, action: normalisation, None where the checkpoint has no statistics.
    relative: bool [action_dim] or shorter: dimensions predicted relative to the state; empty for none.
    integrated: [action_dim] or shorter: what one unit of a velocity moves in one step, 0 for a dimension
        that is none; velocities are clipped to [-1, 1] and added up from the state. Empty for none.
    missing: what the checkpoint lacks to run, each a sentence; ``prepare`` refuses while there is any.
    """

    config: Pi05Config
    state: Normalization | None
    action: Normalization | None
    prompt_style: PromptStyle
    tokenizer: Tokenizer | None
    relative: tuple[bool, ...] = ()
    integrated: tuple[float, ...] = ()
    missing: list[str] = field(default_factory=list)
    _cached: tuple[str, list[int]] | None = field(default=None, repr=False)
    _warned: bool = field(default=False, repr=False)

    def check_ready(self) -> None:
        """Raise one InputError that lists all that is missing; call it when configuring."""
        if self.missing:
            raise InputError("\n".join(self.missing))

    def normalized_state(self, state: NDArray[np.floating]) -> NDArray[np.floating]:
        """[state_dim] in the checkpoint's units -> normalised, not padded.

        Raises:
            InputError: another length, or NaN or infinity in it.
        """
        wanted = self.config.state_dim
        if state.shape != (wanted,):
            raise InputError(f"state: shape {state.shape} given, expected ({wanted},)")
        if not np.isfinite(state).all():
            raise InputError(f"state: {state.tolist()} given, expected finite numbers")
        if self.state is None:
            raise InputError("\n".join(self.missing) or "state: the checkpoint has no statistics")
        return self.state.normalize(state)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a built prompt, at most ``max_token_len``; kept until the text changes.

        Raises:
            InputError: no tokenizer, or one that does not belong to the checkpoint.
        """
        if self._cached is not None and self._cached[0] == text:
            return self._cached[1]
        if self.tokenizer is None:
            raise InputError("\n".join(self.missing) or "no tokenizer")
        ids = self.tokenizer.encode(text, newline_apart=self.prompt_style == "openpi_plain")
        if max(ids, default=0) >= self.config.vocab_size:
            raise InputError(
                f"{self.tokenizer.path}: gives token {max(ids)}, the checkpoint knows {self.config.vocab_size}"
            )
        if not ids:
            raise InputError(f"{self.tokenizer.path}: gives no token for the prompt {text!r}")
        limit = self.config.max_token_len
        if len(ids) > limit and not self._warned:
            self._warned = True
            log.warning("prompt of %d tokens cut to %d, as openpi and LeRobot do: %r", len(ids), limit, text)
        self._cached = (text, ids[:limit])
        return self._cached[1]

    def prepare(self, observation: Observation) -> ModelInputs:
        """An observation as the model takes it.

        Raises:
            InputError: no camera at all, an unknown camera, a bad image or state, or anything in ``missing``.
        """
        self.check_ready()
        config, size = self.config, self.config.image_size
        unknown = sorted(set(observation.images) - set(config.cameras))
        if unknown or not observation.images:
            given = ", ".join(observation.images) or "none"
            raise InputError(f"images: {given} given, expected {', '.join(config.cameras)}")
        images = np.zeros((len(config.cameras), size, size, 3), dtype=np.uint8)
        mask = np.zeros(len(config.cameras), dtype=np.bool_)
        for i, name in enumerate(config.cameras):
            if name in observation.images:
                try:
                    images[i] = resize_with_pad(observation.images[name], size, size)
                except InputError as error:
                    raise InputError(f"camera {name}: {error}") from error
                mask[i] = True
        normalized = self.normalized_state(observation.state)
        prompt = build_prompt(self.prompt_style, observation.prompt, normalized)
        ids = self.tokenize(prompt)
        tokens = np.zeros(config.max_token_len, dtype=np.int64)
        tokens[: len(ids)] = ids
        state = np.zeros(max(config.max_state_dim, config.state_dim), dtype=np.float32)
        state[: config.state_dim] = normalized
        return ModelInputs(images, mask, tokens, len(ids), state, prompt)

    def finish(self, normalized: NDArray[np.floating], observation: Observation) -> NDArray[np.float32]:
        """The model's chunk in the checkpoint's units, absolute.

        Args:
            normalized: float [H, max_action_dim] (or [H, action_dim]).
            observation: that it was inferred from; relative actions and velocities count from its state.

        Returns:
            float32 [H, action_dim].
        """
        if self.action is None:
            raise InputError("\n".join(self.missing) or "action: the checkpoint has no statistics")
        actions = self.action.unnormalize(normalized[..., : self.config.action_dim]).astype(np.float64)
        if any(self.integrated):
            on, step = self._velocities()
            moved = np.cumsum(np.clip(actions[..., on], -1.0, 1.0) * step, axis=-2)
            actions[..., on] = observation.state[on] + moved
        if any(self.relative):
            n = len(self.relative)
            actions[..., :n] += np.where(self.relative, observation.state[:n], 0.0)
        return actions.astype(np.float32)

    def _velocities(self) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Which dimensions are velocities, and what one unit of each moves in one step."""
        steps = np.asarray(self.integrated, dtype=np.float64)
        on = np.flatnonzero(steps)
        return on, steps[on]

    def normalized_actions(self, actions: NDArray[np.floating], state: NDArray[np.floating]) -> NDArray[np.float32]:
        """The inverse of ``finish``, for training: [..., H, action_dim] -> [..., H, max_action_dim].

        Args:
            actions: absolute, in the checkpoint's units; the padding of the result is 0.
            state: [..., state_dim] that relative dimensions count from, not normalised.
        """
        if self.action is None:
            raise InputError("\n".join(self.missing) or "action: the checkpoint has no statistics")
        values = np.array(actions, dtype=np.float64)
        if any(self.integrated):
            on, step = self._velocities()
            before = np.concatenate((state[..., None, on], values[..., :-1, on]), axis=-2)
            values[..., on] = (values[..., on] - before) / step
        if any(self.relative):
            n = len(self.relative)
            values[..., :n] -= np.where(self.relative, state[..., None, :n], 0.0)
        padded = np.zeros((*values.shape[:-1], self.config.max_action_dim), dtype=np.float32)
        padded[..., : self.config.action_dim] = self.action.normalize(values)
        return padded
