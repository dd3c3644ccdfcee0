"""A model without its weights: names and shapes, to be filled from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.pi05 import Pi05


class _Undrawn(TorchFunctionMode):
    """Leaves parameters as they are allocated.

    Drawing them on the meta device does nothing, and ``normal_`` there imports torch's compiler: seconds
    of every process's start.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(config: Pi05Config) -> Pi05:
    """The model on the meta device: every parameter has its shape and no memory."""
    with torch.device("meta"), _Undrawn():
        return Pi05(config)
