"""The engine that ships, as a replay loads it."""

from __future__ import annotations

from hybrid_policy.models.observation import Policy


def load_engine(checkpoint: str, recipe: str, device: str, threads: int) -> Policy:
    """``runtime.Engine`` of a checkpoint with a recipe (a file, or the name of one that ships).

    threads: of PyTorch on the CPU; sums are ordered by it, so another number gives other last digits.

    Raises:
        InputError: the checkpoint or the recipe cannot be used.
    """
    import torch

    from hybrid_policy.runtime.engine import Engine
    from hybrid_policy.share import resolve

    torch.set_num_threads(threads)
    return Engine.from_checkpoint(checkpoint, resolve(recipe, "config/recipes"), device)
