"""From an opened checkpoint and a recipe to a backend, weight by weight, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import Checkpoint
from hybrid_policy.models.pi05 import Pi05
from hybrid_policy.runtime.backend import Backend
from hybrid_policy.runtime.quantized_checkpoint import quantised_sites, read_packed
from hybrid_policy.runtime.recipe import Recipe
from hybrid_policy.runtime.reference_backend import ReferenceBackend
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.sites import model_sites, pack_sites, swap_sites


class Progress:
    """Steps of a load; shown as a bar only where it was asked for."""

    def __init__(self, advance: object = None) -> None:
        self._advance = advance

    def step(self, text: str) -> None:
        """One more thing is done."""
        if self._advance is not None:
            self._advance(text)  # type: ignore[operator]


@contextmanager
def progress_bar(show: bool, total: int, title: str) -> Iterator[Progress]:
    """A rich progress bar of ``total`` steps, or nothing."""
    if not show:
        yield Progress()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield Progress(lambda text: bar.update(task, advance=1, description=f"{title}: {text}"))


def load_reference(checkpoint: Checkpoint, recipe: Recipe, rtc: RealTimeChunking, progress: bool) -> Backend:
    """The CPU's backend: the plain model in float32 with the recipe's sites."""
    sites = model_sites(checkpoint.config)
    precisions = recipe.assign(sites)
    device = torch.device("cpu")
    packed, scales = read_packed(checkpoint.store, quantised_sites(checkpoint.directory), device)
    with torch.device("meta"):
        model = Pi05(checkpoint.config)
    with progress_bar(progress, len(checkpoint.names) + len(sites), "loading") as bar:
        for name in checkpoint.names:
            owner, _, leaf = name.rpartition(".")
            value = checkpoint.tensor(name, device, torch.float32)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
            bar.step(owner.rpartition(".")[2])

        def read(site: str) -> torch.Tensor:
            return model.get_submodule(site).weight.detach()  # type: ignore[union-attr, return-value]

        for site, weight in pack_sites(read, precisions, packed):
            swap_sites(model, [(site, weight)], precisions, scales)
            bar.step(site.rpartition(".")[2])
    return ReferenceBackend(model, rtc, recipe.name)


def load_cuda(
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: torch.device,
    rtc: RealTimeChunking,
    timing: bool,
    progress: bool,
) -> Backend:
    """The GPU's backend: weights in their final form on the device, graphs captured."""
    if checkpoint.config.kind != "pi05":
        raise InputError(f"{checkpoint.directory}: pi0 runs on device cpu only; the CUDA engine serves pi0.5")
    raise InputError("device: the CUDA engine is not built yet")
