"""Linear layers on a CPU in float32: stacked, transposed once, with the sites' rounding of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybrid_policy.runtime.host_blas import Floats, affine
from hybrid_policy.runtime.sites import ReferenceSite


class Buffers:
    """Memory by name, as large as its largest use; what was written stays until the name is asked for again."""

    def __init__(self) -> None:
        self._held: dict[str, Floats] = {}

    def take(self, name: str, *shape: int) -> Floats:
        """float32 of a shape, contiguous, not cleared."""
        size = 1
        for extent in shape:
            size *= extent
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, np.float32)
        return held[:size].reshape(shape)

    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(held.nbytes for held in self._held.values())


def numbers(tensor: Tensor) -> Floats:
    """A copy as float32 array."""
    return tensor.detach().float().numpy().copy()


def release(module: nn.Module) -> None:
    """Drop a module's parameters and buffers, whose numbers were taken over."""
    for owner in module.modules():
        for held in (owner._parameters, owner._buffers):
            for name in held:
                held[name] = None


class HostLinear:
    """Linear layers of one input as one product: y = x W.T + b. Takes the modules' weights from them.

    order: a permutation of the stacked outputs.
    """

    def __init__(self, modules: Sequence[nn.Module], order: NDArray[np.intp] | None = None) -> None:
        stacked = torch.cat([cast(Tensor, module.weight).detach().float() for module in modules])
        if order is not None:
            stacked = stacked[torch.from_numpy(order)]
        #: [K, N]: products of few rows are up to twice as quick as with [N, K]
        self.weight: Floats = stacked.t().contiguous().numpy()
        self.bias: Floats | None = None
        if modules[0].bias is not None:
            self.bias = numbers(torch.cat([cast(Tensor, module.bias) for module in modules]))
        self._site = modules[0] if rounds(modules[0]) else None
        for module in modules:
            if module is not self._site:
                release(module)
        if isinstance(self._site, ReferenceSite):
            self._site._buffers["weight"] = None

    @property
    def width(self) -> int:
        """Outputs."""
        return self.weight.shape[1]

    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rounded(self, x: Floats) -> Floats:
        """The input as the precision has it; the same array where it rounds the weight alone."""
        if not isinstance(self._site, ReferenceSite):
            return x
        return self._site.rounded(torch.from_numpy(x)).numpy()

    def product(self, x: Floats, out: Floats) -> Floats:
        """x [M, K], rounded already -> ``out`` [M, N]."""
        affine(x, self.weight, self.bias, out)
        return out

    def __call__(self, x: Floats, out: Floats) -> Floats:
        """x [M, K] -> ``out`` [M, N]."""
        return self.product(self.rounded(x), out)


class SharedInput:
    """Linear layers of one input that write beside each other: one product where they round the input alike."""

    def __init__(self, modules: Sequence[nn.Module], orders: Sequence[NDArray[np.intp]]) -> None:
        widths = [cast(Tensor, module.weight).shape[0] for module in modules]
        starts = np.cumsum([0, *widths])
        self.width = int(starts[-1])
        if all(same_rounding(modules[0], module) for module in modules[1:]):
            order = np.concatenate([order + start for order, start in zip(orders, starts)])
            self._parts = [(slice(0, self.width), HostLinear(modules, order))]
        else:
            self._parts = [
                (slice(int(start), int(start) + width), HostLinear([module], order))
                for start, width, module, order in zip(starts, widths, modules, orders)
            ]

    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(part.nbytes() for _, part in self._parts)

    def __call__(self, x: Floats, out: Floats) -> Floats:
        """x [M, K] -> ``out`` [M, N], the layers' outputs in their order."""
        for columns, part in self._parts:
            part(x, out[:, columns])
        return out


def rounds(module: nn.Module) -> bool:
    """Whether the layer's precision rounds its activations."""
    return isinstance(module, ReferenceSite) and module.precision in ("fp8_w8a8", "nvfp4_w4a4")


def same_rounding(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers have the same activations of one input."""
    if not (rounds(one) and rounds(other)):
        return rounds(one) == rounds(other)
    assert isinstance(one, ReferenceSite)
    assert isinstance(other, ReferenceSite)
    if one.precision != other.precision:
        return False
    if one.input_scale is None or other.input_scale is None:
        return one.input_scale is other.input_scale
    return torch.equal(one.input_scale, other.input_scale)
