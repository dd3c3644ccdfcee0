"""The engine that ships, as a replay loads it."""

from __future__ import annotations

from hybrid_policy.models.observation import Policy


def load_engine(checkpoint: str, recipe: str, device: str) -> Policy:
    """``runtime.Engine`` of a checkpoint with a recipe (a file, or the name of one that ships).

    Raises:
        InputError: the checkpoint or the recipe cannot be used.
    """
    from hybrid_policy.runtime.engine import Engine
    from hybrid_policy.share import resolve

    return Engine.from_checkpoint(checkpoint, resolve(recipe, "config/recipes"), device)
