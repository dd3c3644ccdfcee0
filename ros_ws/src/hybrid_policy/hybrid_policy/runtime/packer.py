"""Packs a model's sites on demand, for the stages that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hybrid_policy.runtime.sites import Packed, dense, pack_sites

#: parameter name -> tensor on the device; float32 where exactness is cheap, else the model's dtype
Source = Callable[[str], Tensor]
#: called with a word after each step of loading
Report = Callable[[str], None]


class Packer:
    """Packs sites on demand and notes which route each kind of site took."""

    def __init__(
        self,
        source: Source,
        precisions: Mapping[str, str],
        packed: Mapping[str, Packed],
        dtype: torch.dtype,
        report: Report,
    ) -> None:
        self._source, self._precisions, self._held, self._report = source, precisions, packed, report
        self.dtype = dtype
        self.routes: dict[str, str] = {}

    def precision(self, site: str) -> str:
        """What a site is served in."""
        return self._precisions[site]

    def many(self, *sites: str) -> list[Packed]:
        """The packed weights of sites that one product serves."""
        result = self._read(*sites)
        for site in sites:
            self._report(site.rpartition(".")[2])
        return [self._matched(site, result[site]) for site in sites]

    def multiplied(self, site: str) -> Tensor:
        """What a site multiplies by, float32 [N, K]: the weight after its rounding, from wherever it comes."""
        return dense(self._read(site)[site])

    def one(self, site: str) -> Packed:
        """The packed weight of one site."""
        return self.many(site)[0]

    def _read(self, *sites: str) -> dict[str, Packed]:
        wanted = {site: self._precisions[site] for site in sites}
        return dict(pack_sites(lambda site: self._source(site + ".weight"), wanted, self._held))

    def _matched(self, site: str, weight: Packed) -> Packed:
        return weight.to(self.dtype) if self._precisions[site] == "bf16" and isinstance(weight, Tensor) else weight

    def note(self, part: str, route: str) -> None:
        """Remember which route a part took, for the engine's log."""
        self.routes[part] = route
