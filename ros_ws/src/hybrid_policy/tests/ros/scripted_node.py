"""The policy node with a policy that does what the prompt says: swing, raise, stall, NaN, out of limits."""

from __future__ import annotations

import sys
import time

import numpy as np
from hybrid_policy.models.observation import ActionChunk, Continuation, Observation, Policy, PolicySpec
from hybrid_policy.ros.policy_node import PolicyNode, main

HORIZON = 30


class ScriptedPolicy:
    """Swings the joints as a function of time, so that chunks agree; misbehaves on request."""

    spec = PolicySpec("scripted", ("front", "wrist"), 3, 3, 32, HORIZON)

    def __init__(self) -> None:
        self._raised = False

    def infer(
        self,
        observation: Observation,
        noise: np.ndarray | None = None,
        previous: Continuation | None = None,
    ) -> ActionChunk:
        """Follow the script named by the prompt."""
        script = observation.prompt
        if script == "raise" or (script == "raise once" and not self._raised):
            self._raised = True
            raise RuntimeError("the scripted policy was asked to raise")
        if script == "stall":
            time.sleep(2.0)
        begin = time.perf_counter()
        seconds = observation.stamp * 1e-9 % 1000 + 0.05 * np.arange(HORIZON)
        swing = 0.3 * np.sin(2 * np.pi * 0.5 * seconds)
        actions = np.stack([swing, 0.5 + swing, 0.5 + 0 * swing], axis=1).astype(np.float32)
        if script == "nan":
            actions[7, 1] = np.nan
        if script == "far":
            actions *= 10
        if script == "short":
            actions = actions[:-1]
        normalised = np.zeros((HORIZON, 32), np.float32)
        return ActionChunk(actions, normalised, observation.stamp, {"denoise": time.perf_counter() - begin})


class ScriptedNode(PolicyNode):
    """The node under test: everything but the policy is what ships."""

    def make_policy(self, recipe: str) -> Policy:
        """The scripted one."""
        del recipe
        return ScriptedPolicy()


if __name__ == "__main__":
    sys.exit(main(ScriptedNode))
