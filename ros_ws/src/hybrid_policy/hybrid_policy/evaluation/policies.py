"""The engine that ships, as a replay loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hybrid_policy.evaluation.node_parameters import NodeParameters
from hybrid_policy.models.observation import Policy

if TYPE_CHECKING:
    from hybrid_policy.runtime.rtc import Mode, Schedule


def load_engine(checkpoint: str, recipe: str, device: str, node: NodeParameters) -> Policy:
    """``runtime.Engine`` of a checkpoint with a recipe (a file, or the name of one that ships), as the node has it.

    Raises:
        InputError: the checkpoint or the recipe cannot be used.
    """
    import torch

    from hybrid_policy.runtime.engine import Engine
    from hybrid_policy.runtime.rtc import RealTimeChunking
    from hybrid_policy.share import resolve

    if node.cpu_threads > 0:
        torch.set_num_threads(node.cpu_threads)
    rtc = RealTimeChunking(
        mode=cast("Mode", node.rtc__mode if node.chunking == "rtc" else "off"),
        schedule=cast("Schedule", node.rtc__schedule),
        beta=node.rtc__beta,
        prior_std=node.rtc__prior_std,
    )
    return Engine.from_checkpoint(checkpoint, resolve(recipe, "config/recipes"), device, rtc=rtc, seed=node.seed)
