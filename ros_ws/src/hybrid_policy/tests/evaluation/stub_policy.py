"""A policy for tests of the replay: says to go on as the joints stand, plus noise by the recipe's name."""

from __future__ import annotations

import os

import numpy as np
from hybrid_policy.models.observation import ActionChunk, PolicySpec

HORIZON = 16
#: recipe -> how much of the given noise is added
NOISE = {"exact": 0.0, "fine": 1e-4, "rough": 0.02, "nan": float("nan")}


class StubPolicy:
    def __init__(self, amount: float, cameras: tuple[str, ...], dim: int) -> None:
        self.spec = PolicySpec("stub", cameras, dim, dim, 32, HORIZON)
        self.amount = amount

    def infer(self, observation, noise=None, previous=None):
        dim = self.spec.action_dim
        bright = sum(float(image[::8, ::8].mean()) for image in observation.images.values()) * 1e-5
        actions = np.repeat(observation.state[None], HORIZON, axis=0) + np.float32(bright)
        actions = (actions + self.amount * noise[:, :dim]).astype(np.float32)
        if previous is not None:
            first = round(previous.consumed)
            keep = previous.normalised[first : first + previous.delay, :dim]
            actions[: len(keep)] = keep
        normalised = np.zeros((HORIZON, 32), np.float32)
        normalised[:, :dim] = actions
        timings = dict.fromkeys(("preprocess", "vision", "prefix", "denoise", "postprocess"), 1e-4)
        return ActionChunk(actions, normalised, observation.stamp, timings)


def make(checkpoint: str, recipe: str, device: str, node: object) -> StubPolicy:
    if recipe == "crash":
        os._exit(3)  # a worker that dies, as one that is killed for memory
    if checkpoint == "g1":
        return StubPolicy(NOISE[recipe], ("base_0_rgb",), 26)
    return StubPolicy(NOISE[recipe], ("base_0_rgb", "right_wrist_0_rgb"), 14)
