"""The policy node with a policy that does what the prompt says: swing, raise, stall, NaN, out of limits."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.models.observation import ActionChunk, Continuation, Observation, Policy, PolicySpec
from hybrid_policy.ros.policy_node import PolicyNode, main

HORIZON = 30


class ScriptedPolicy:
    """Swings the joints as a function of time, so that chunks agree; misbehaves on request."""

    def __init__(self, robot: RobotFile) -> None:
        cameras = tuple(camera.name for camera in robot.cameras)
        self.spec = PolicySpec("scripted", cameras, len(robot.state_names), len(robot.action_names), 32, HORIZON)
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
        actions = np.repeat(swing[:, None], self.spec.action_dim, axis=1).astype(np.float32)
        actions[:, 1] += 0.5
        actions[:, -1] = 0.5
        if script == "nan":
            actions[7, 1] = np.nan
        if script == "far":
            actions *= 10
        if script == "short":
            actions = actions[:-1]
        normalised = np.zeros((HORIZON, 32), np.float32)
        normalised[: len(actions), : self.spec.action_dim] = np.nan_to_num(actions)
        return ActionChunk(actions, normalised, observation.stamp, {"denoise": time.perf_counter() - begin})


class Other:
    """Another recipe: the same policy, a little (or, for the prompt "differ", very much) different."""

    def __init__(self, policy: ScriptedPolicy) -> None:
        self._policy, self.spec = policy, policy.spec

    def infer(
        self,
        observation: Observation,
        noise: np.ndarray | None = None,
        previous: Continuation | None = None,
    ) -> ActionChunk:
        """The policy's chunk, disturbed."""
        chunk = self._policy.infer(observation, noise, previous)
        rest = np.random.default_rng(0).standard_normal(chunk.normalised.shape).astype(np.float32)
        size = 10.0 if observation.prompt == "differ" else 0.001
        return replace(chunk, normalised=chunk.normalised + size * rest)


class ScriptedNode(PolicyNode):
    """The node under test: everything but the policy is what ships."""

    def make_policy(self, recipe: str) -> Policy:
        """The scripted one."""
        policy = ScriptedPolicy(self.robot)
        return policy if recipe == "bf16" else Other(policy)


if __name__ == "__main__":
    sys.exit(main(ScriptedNode))
