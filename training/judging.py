"""What a run is judged by: where the network believes the cube to be, and lines for the log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collect import Frames
from hybrid_policy.sim.kinematics import tip_of
from hybrid_policy.sim.tasks import PROMPTS, TASK_COLOURS
from network import Grounding, TrainingPolicy


def localisation(frames: Frames, policy: TrainingPolicy, head: Grounding) -> dict[str, float]:
    """Errors (mm) on scenes not trained on, from the start pose.

    cube: of the grounding head, horizontally. target: between the tips that the policy's and the
    expert's last actions command.
    """
    errors, targets = [], []
    noise = np.random.default_rng(0)
    for index, colour in enumerate(TASK_COLOURS):
        ids, counts = policy.tokens([PROMPTS[0].format(colour)] * len(frames), frames.state)
        for at in range(0, len(frames), 256):
            rows = slice(at, at + 256)
            images = torch.from_numpy(frames.images[rows]).to(policy.device)
            words, used = (torch.from_numpy(x[rows]).to(policy.device) for x in (ids, counts))
            shape = (len(images), policy.config.horizon, policy.config.max_action_dim)
            start = torch.from_numpy(noise.standard_normal(shape, dtype=np.float32)).to(policy.device)
            with torch.no_grad():
                cache = policy.model.encode(images, None, words, used)
                place = head(cache.hidden, used)[0].cpu().numpy()
                actions = policy.model.sample_actions(images, None, words, used, start).cpu().numpy()
            errors.append(np.linalg.norm(place[:, :2] - frames.cubes[rows, index, :2], axis=-1))
            last = policy.action.unnormalize(actions)[:, -1, 7:13].astype(np.float64)
            wanted = frames.actions[rows, index, -1, 7:13].astype(np.float64)
            targets.append(np.linalg.norm(tip_of(last) - tip_of(wanted), axis=-1))
    out = {}
    for name, values in (("cube", np.concatenate(errors)), ("target", np.concatenate(targets))):
        out[f"{name}_median_mm"] = float(np.median(values) * 1e3)
        out[f"{name}_p95_mm"] = float(np.percentile(values, 95) * 1e3)
    return out


def short(summary: dict[str, Any]) -> dict[str, float]:
    """The figures of a summary that fit on a line."""
    seconds = summary["seconds_to_success"] or {"median": math.nan}
    return {
        "success": summary["success"],
        "wrong": summary["wrong_cube"],
        "seconds": seconds["median"],
        "refused": summary["refused_chunks"],
    }


def line(values: dict[str, float]) -> str:
    """Names and values, for people."""
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def statistics_of(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The statistics that a checkpoint directory of ours holds."""
    from safetensors.numpy import load_file

    file = next(checkpoint.glob("policy_preprocessor*.safetensors"))
    out: dict[str, dict[str, Any]] = {"state": {}, "action": {}}
    for name, values in load_file(file).items():
        owner, _, statistic = name.rpartition(".")
        out["state" if owner == "observation.state" else "action"][statistic] = values
    return out
