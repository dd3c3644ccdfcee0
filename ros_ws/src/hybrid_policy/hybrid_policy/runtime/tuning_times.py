"""How long vision, prefix and expert take on this device, in each combination of precisions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid_policy.models.checkpoint import Checkpoint
from hybrid_policy.models.pi05 import keeps_float32
from hybrid_policy.models.processors import ModelInputs
from hybrid_policy.runtime.cuda_backend import bucket_of, row_buckets
from hybrid_policy.runtime.loading import build_backend
from hybrid_policy.runtime.packer import Report
from hybrid_policy.runtime.recipe import Recipe
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.sites import Packed, ReferenceSite, model_sites, pack_sites
from hybrid_policy.runtime.tuning import Group, PartTime, Read, combinations, rules_of

#: layers whose weights are timed in turn on a CPU, so that no weight stays in a cache
_ROTATED = 6
#: inferences of a backend: what is thrown away, and what the median is of
_WARM, _TIMED = 3, 30
#: the engine's names of the parts
_STAGES = {"vision": "vision", "prefix": "prefix", "expert": "denoise"}


def time_on_cpu(groups: Sequence[Group], read: Read, report: Report) -> list[PartTime]:
    """Each combination as the sum of its groups' launches in the reference; one report a group and precision."""
    seconds = {}
    for group in groups:
        for precision in group.candidates(None):
            seconds[group.name, precision] = _time_group(group, precision, read)
            report(f"time of {group.name} in {precision}")
    return [
        PartTime(part, precisions, sum(seconds[item] for item in precisions.items()))
        for part, chosen in combinations(groups, None).items()
        for precisions in chosen
    ]


def _time_group(group: Group, precision: str, read: Read) -> float:
    """Seconds that the group takes in one inference: the median of passes over several layers."""
    calls = [_reference_call(group, precision, layer, read) for layer in range(min(group.layers, _ROTATED))]
    for call in calls:
        call()
    seconds = []
    for _ in range(3):
        clock = time.perf_counter()
        for call in calls:
            call()
        seconds.append((time.perf_counter() - clock) / len(calls))
    return float(np.median(seconds)) * group.calls


def _reference_call(group: Group, precision: str, layer: int, read: Read) -> Callable[[], object]:
    packed = [weight for _, weight in pack_sites(read, dict.fromkeys(group.sites(layer), precision))]
    modules = [ReferenceSite(weight, precision, None) for weight in packed]
    inputs = [torch.randn(group.rows, module.get_buffer("weight").shape[1]) for module in modules]
    return lambda: [module(x) for module, x in zip(modules, inputs, strict=True)]


def builds_on_gpu(groups: Sequence[Group], capability: tuple[int, int]) -> int:
    """How many engines `time_on_gpu` builds."""
    return max(len(chosen) for chosen in combinations(groups, capability).values())


def time_on_gpu(
    checkpoint: Checkpoint, groups: Sequence[Group], tokens: int, device: torch.device, report: Report
) -> list[PartTime]:
    """Each combination as the engine runs it: one engine after the other, the next combination of every part in each.

    A part's launches depend on all of its precisions (kernels that serve one combination and not another), so none is
    worked out from others. One report an engine.

    Args:
        checkpoint: its weights are held on the device meanwhile, in bf16.
        tokens: of the prompt.
    """
    chosen = combinations(groups, torch.cuda.get_device_capability(device))
    engines = _Engines(checkpoint, groups, tokens, device)
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for i in range(builds_on_gpu(groups, torch.cuda.get_device_capability(device))):
        turn = {part: i % len(combined) for part, combined in chosen.items()}
        precisions = {name: p for part, at in turn.items() for name, p in chosen[part][at].items()}
        for part, value in engines.time(precisions).items():
            seconds[part, turn[part]].append(value)
        report(f"engine {i + 1}")
    return [PartTime(part, chosen[part][at], float(np.median(values))) for (part, at), values in seconds.items()]


class _Engines:
    """Builds and times engines from weights that stay on the device."""

    def __init__(self, checkpoint: Checkpoint, groups: Sequence[Group], tokens: int, device: torch.device) -> None:
        self._checkpoint, self._groups, self._device = checkpoint, groups, device
        config = checkpoint.config
        views = len(config.cameras)
        buckets = row_buckets(views, config.image_tokens, config.max_token_len)
        self._buckets = (bucket_of(buckets, views * config.image_tokens + tokens),)
        self._sites = model_sites(config)
        self._weights: dict[str, Tensor] = {}
        self._nvfp4: dict[str, Packed] = {}  # the search for its scales takes seconds
        random = np.random.default_rng(0)
        ids = np.zeros(config.max_token_len, np.int64)
        ids[:tokens] = random.integers(0, config.vocab_size, tokens)
        self._inputs = ModelInputs(
            images=random.integers(0, 256, (views, config.image_size, config.image_size, 3), dtype=np.uint8),
            image_mask=np.ones(views, np.bool_),
            tokens=ids,
            token_count=tokens,
            state=np.zeros(config.max_action_dim, np.float32),
            prompt="",
        )
        self._noise = random.standard_normal((config.horizon, config.max_action_dim), dtype=np.float32)

    def _source(self, name: str) -> Tensor:
        if name not in self._weights:
            dtype = torch.float32 if keeps_float32(name) else torch.bfloat16
            self._weights[name] = self._checkpoint.tensor(name, self._device, dtype)
        return self._weights[name]

    def _packed(self, recipe: Recipe) -> Iterator[tuple[str, Packed]]:
        """The NVFP4 sites of a recipe."""
        wanted = {site: p for site, p in recipe.assign(self._sites).items() if p.startswith("nvfp4")}
        missing = {site: p for site, p in wanted.items() if site not in self._nvfp4}
        self._nvfp4 |= dict(pack_sites(lambda site: self._source(site + ".weight"), missing))
        return ((site, self._nvfp4[site]) for site in wanted)

    def time(self, precisions: Mapping[str, str]) -> dict[str, float]:
        """Part -> the median of its seconds, with the precision of each group."""
        recipe = Recipe(name="tuning", rules=rules_of(self._groups, precisions, "tuning"), source="tuning")
        backend = build_backend(
            self._checkpoint.config, self._source, recipe, self._device, RealTimeChunking("off"), timing=True,
            buckets=self._buckets, packed=dict(self._packed(recipe)),
        )  # fmt: skip
        runs = [backend.run(self._inputs, self._noise, None)[1] for _ in range(_WARM + _TIMED)][_WARM:]
        backend.close()
        return {part: float(np.median([run[stage] for run in runs])) for part, stage in _STAGES.items()}
