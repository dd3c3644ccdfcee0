"""What `hybrid-policy tune` decides from: each group's time in each precision, and what it does to the action."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybrid_policy.errors import InputError
from hybrid_policy.kernels import expert, hopper_product
from hybrid_policy.kernels.fp8 import FP8Tensor
from hybrid_policy.kernels.gate_up import prepare_gate_up
from hybrid_policy.kernels.linear import prepare
from hybrid_policy.kernels.norm import gelu_quantise, quantise_rows
from hybrid_policy.kernels.qkv import rope_tables
from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.pi05 import EXPERT, PREFIX, VISION
from hybrid_policy.runtime.projection import Projection, padded_between
from hybrid_policy.runtime.sites import Packed, ReferenceSite, pack_sites

#: group's kind -> the leaves that one launch serves
KINDS: dict[str, tuple[str, ...]] = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "self_attn.out": ("self_attn.out_proj",),
    "mlp.fc": ("mlp.fc1", "mlp.fc2"),
}
_PARTS = {"vision": VISION + "encoder.", "prefix": PREFIX, "expert": EXPERT}
#: layers whose weights are timed in turn, so that no weight stays in a cache
_ROTATED = 6

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Group:
    """Sites of one part that have one shape and share a launch in every layer.

    rows: tokens that pass through. shape: (out_features, in_features) of the stacked launch; of fc1, where fc1 and fc2
    are one group (the GELU between them is in the form that fc2 takes).
    calls: launches an inference. heads: query heads, key/value heads, head dimension.
    """

    part: str
    kind: str
    rows: int
    shape: tuple[int, int]
    calls: int
    layers: int
    heads: tuple[int, int, int]

    @property
    def name(self) -> str:
        """``prefix.mlp.down``."""
        return f"{self.part}.{self.kind}"

    def sites(self, layer: int) -> list[str]:
        """The sites of one layer."""
        return [f"{_PARTS[self.part]}layers.{layer}.{leaf}" for leaf in KINDS[self.kind]]

    def all_sites(self) -> list[str]:
        """The sites of every layer."""
        return [site for layer in range(self.layers) for site in self.sites(layer)]

    def patterns(self) -> list[str]:
        """Recipe patterns that match exactly these sites."""
        return [f"{_PARTS[self.part]}layers.*.{leaf}" for leaf in KINDS[self.kind]]

    def candidates(self, capability: tuple[int, int] | None) -> list[str]:
        """Precisions that a device of this compute capability (None: a CPU) serves, bf16 first."""
        found = ["bf16"]
        if self.shape[1] % 16 == 0 and self.shape[0] % 16 == 0:
            found.append("fp8_w8a8")
        if self.part != "vision" and self.kind.startswith("mlp") and self.shape[1] % 16 == 0:
            found.append("nvfp4_w4a16")
            if capability is None or capability[0] >= 10:
                found.append("nvfp4_w4a4")
        return found


def groups_of(config: Pi05Config, tokens: int) -> list[Group]:
    """Vision's three groups and the four of each Gemma."""
    vision = config.vision
    found = [
        Group(
            "vision",
            kind,
            len(config.cameras) * config.image_tokens,
            shape,
            vision.depth,
            vision.depth,
            (vision.heads, vision.heads, vision.head_dim),
        )
        for kind, shape in (
            ("self_attn.qkv", (3 * vision.width, vision.width)),
            ("self_attn.out", (vision.width, vision.width)),
            ("mlp.fc", (vision.mlp_dim, vision.width)),
        )
    ]
    prefix_rows = len(config.cameras) * config.image_tokens + tokens
    for part, gemma, rows, calls in (
        ("prefix", config.prefix, prefix_rows, 1),
        ("expert", config.expert, config.horizon, config.num_steps),
    ):
        heads = gemma.heads * gemma.head_dim
        shapes = {
            "self_attn.qkv": (heads + 2 * gemma.kv_heads * gemma.head_dim, gemma.width),
            "self_attn.o": (gemma.width, heads),
            "mlp.gate_up": (2 * gemma.mlp_dim, gemma.width),
            "mlp.down": (gemma.width, gemma.mlp_dim),
        }
        found += [
            Group(
                part,
                kind,
                rows,
                shape,
                calls * gemma.depth,
                gemma.depth,
                (gemma.heads, gemma.kv_heads, gemma.head_dim),
            )
            for kind, shape in shapes.items()
        ]
    return found


@dataclass
class Measured:
    """One group in one precision: seconds an inference, and relative error of the action where it alone changes."""

    group: Group
    precision: str
    seconds: float
    error: float = 0.0


@dataclass
class Choice:
    """Group name -> precision, and what it is predicted and measured to give."""

    precisions: dict[str, str]
    seconds: float
    predicted_error: float
    measured_error: float = float("nan")
    rejected: int = 0
    table: list[Measured] = field(default_factory=list)


def time_group(group: Group, precision: str, read: Read, device: torch.device, repeats: int = 15) -> float:
    """Seconds that the group's launches take in one inference; the median of ``repeats`` passes over several layers."""
    calls = [_call(group, precision, layer, read, device) for layer in range(min(group.layers, _ROTATED))]
    for call in calls:
        call()
    if device.type == "cpu":
        seconds = []
        for _ in range(3):
            clock = time.perf_counter()
            for call in calls:
                call()
            seconds.append((time.perf_counter() - clock) / len(calls))
        return float(np.median(seconds)) * group.calls
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            for call in calls:
                call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / (3 * len(calls)))
    return float(np.median(times)) * group.calls


def _call(group: Group, precision: str, layer: int, read: Read, device: torch.device) -> Callable[[], object]:
    """The launch as the engine makes it on this device, on random activations."""
    sites = group.sites(layer)
    packed = [w for _, w in pack_sites(read, dict.fromkeys(sites, precision))]
    x = torch.randn(group.rows, group.shape[1], device=device)
    if device.type == "cpu":
        modules = [ReferenceSite(weight, precision, None) for weight in packed]
        widths = [module.get_buffer("weight").shape[1] for module in modules]
        inputs = [x if width == x.shape[1] else torch.randn(group.rows, width) for width in widths]
        return lambda: [module(y) for module, y in zip(modules, inputs, strict=True)]
    x = x.to(torch.bfloat16)
    if group.part == "vision":
        return _vision_call(group, packed, x)
    if group.part == "expert" and _cluster_fits(group, packed[0], device):
        return _cluster_call(group, packed, x)
    if group.kind == "mlp.gate_up" and (group.part == "expert" or precision.startswith("nvfp4")):
        gate_up = prepare_gate_up(packed[0], packed[1], precision)  # type: ignore[arg-type]
        return lambda: gate_up(x, pdl=True)
    if group.part == "expert" and group.kind != "self_attn.qkv":
        linear = prepare(packed[0], precision)  # type: ignore[arg-type]
        residual = torch.zeros(group.rows, group.shape[0], dtype=torch.bfloat16, device=device)
        return lambda: linear(x, out=residual, residual=residual, pdl=True)
    product = Projection(packed, torch.bfloat16, precision=precision)
    if not product.quantised:
        return lambda: product(x)
    quantised = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=device)
    quantise_rows(x, quantised, torch.empty(group.rows, device=device))
    return lambda: product(quantised)


def _vision_call(group: Group, packed: Sequence[Packed], x: Tensor) -> Callable[[], object]:
    """The launches of a vision layer's qkv, output, or fc1 and fc2, with made-up biases and scales."""
    device, eight = x.device, isinstance(packed[0], FP8Tensor)
    bias = torch.zeros(group.shape[0], device=device)
    sites = [packed]
    if group.kind == "mlp.fc":
        fc1, bias, fc2 = padded_between(packed[0], bias, packed[1])
        sites = [[fc1], [fc2]]
    scale = 1.0 if eight else None
    products = [
        Projection(
            site,
            torch.bfloat16,
            None if i > 0 or group.kind == "self_attn.out" else bias,
            input_scale=scale,
        )
        for i, site in enumerate(sites)
    ]
    first = x.to(products[0].input_dtype)
    fits = hopper_product.fits(torch.cuda.get_device_capability(device), *group.shape)

    def product(i: int, y: Tensor, *, gelu: bool = False) -> Tensor:
        whole, out_scale = products[i].whole(), scale if gelu else None
        if fits and whole is not None and hopper_product.pays(y.dtype, y.shape[0], *whole[0].shape):
            bias = products[i].bias
            return hopper_product.hopper_product(y, *whole, bias=bias, gelu=gelu, out_scale=out_scale, pdl=True)
        if out_scale is None:
            return products[i].gelu(y) if gelu else products[i](y)
        h = products[i](y)
        act = torch.empty(h.shape, dtype=torch.float8_e4m3fn, device=device)
        gelu_quantise(h, act, out_scale, pdl=True)
        return act

    if group.kind != "mlp.fc":
        return lambda: product(0, first)
    return lambda: product(1, product(0, first, gelu=True))


_EPILOGUES = {
    "self_attn.qkv": expert.QKV,
    "self_attn.o": expert.RESIDUAL,
    "mlp.gate_up": expert.GEGLU,
    "mlp.down": expert.RESIDUAL,
}


def _cluster_fits(group: Group, weight: Packed, device: torch.device) -> bool:
    """Whether the engine would take the cluster kernels for this launch."""
    properties = torch.cuda.get_device_properties(device)
    limit = expert.shared_limit(device)
    epilogue, (n, k) = _EPILOGUES[group.kind], group.shape
    plan = expert.plan_gemm(epilogue, expert.format_of(weight), n, k, group.rows, limit)
    return properties.major >= 9 and plan is not None


def _cluster_call(group: Group, packed: Sequence[Packed], x: Tensor) -> Callable[[], object]:
    """One launch of kernels/expert.py, with made-up norm, shift, gate and cache."""
    heads, kv_heads, head_dim = group.heads
    gemm = expert.ExpertGemm(list(packed), _EPILOGUES[group.kind], group.rows, heads=group.heads)
    gemm.forget_source()
    n, k = group.shape
    device = x.device
    factor = torch.ones(k, dtype=torch.bfloat16, device=device)
    row = torch.zeros(n, device=device)
    if group.kind == "mlp.gate_up":
        out = torch.empty(group.rows, n // 2, dtype=torch.bfloat16, device=device)
        return lambda: gemm(x, out, factor=factor, shift=row)
    if group.kind == "self_attn.qkv":
        q = torch.empty(group.rows, heads, head_dim, dtype=torch.bfloat16, device=device)
        cache = torch.empty(group.rows, kv_heads, head_dim, dtype=torch.bfloat16, device=device)
        other = torch.empty_like(cache)
        start = torch.zeros(1, dtype=torch.int32, device=device)
        tables = rope_tables(group.rows, head_dim, device)
        return lambda: gemm(x, q, factor=factor, shift=row, caches=(cache, other), tables=tables, start=start)
    stream = torch.zeros(group.rows, n, dtype=torch.bfloat16, device=device)
    return lambda: gemm(x, stream, gate=row)


class ActionProbe:
    """The plain model with some groups swapped: how far its actions are from the unquantised ones.

    run: observations' prepared inputs -> normalised actions, through ``model`` as it stands.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[], NDArray[np.float64]], read: Read, groups: Sequence[Group]
    ) -> None:
        self._model, self._run, self._read = model, run, read
        self._groups = {group.name: group for group in groups}
        self._reference = run()

    def error(self, precisions: Mapping[str, str]) -> float:
        """Relative error of the actions, ‖a − a₀‖ / ‖a₀‖ over all observations, with these groups' precisions."""
        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for name, precision in precisions.items():
            group = self._groups[name]
            wanted = dict.fromkeys(group.all_sites(), precision)
            for site, weight in pack_sites(self._read, wanted):
                owner, _, leaf = site.rpartition(".")
                parent, old = self._model.get_submodule(owner), self._model.get_submodule(site)
                replaced.append((parent, leaf, old))
                setattr(parent, leaf, ReferenceSite(weight, precision, getattr(old, "bias", None)))
        try:
            actions = self._run()
        finally:
            for parent, leaf, old in replaced:
                setattr(parent, leaf, old)
        return float(np.linalg.norm(actions - self._reference) / np.linalg.norm(self._reference))


def choose(table: Sequence[Measured], bound: float, verify: Callable[[dict[str, str]], float]) -> Choice:
    """The fastest assignment whose measured action error is at most ``bound``.

    Errors of groups are taken as independent (their squares add) to order the candidates; each candidate is then
    measured as a whole, fastest first, and the first that holds is taken.

    Raises:
        InputError: not even all groups in bf16 hold the bound.
    """
    names = list(dict.fromkeys(m.group.name for m in table))
    options = [[m for m in table if m.group.name == name] for name in names]
    combinations = []
    for combination in itertools.product(*options):
        predicted = float(np.sqrt(sum(m.error**2 for m in combination)))
        combinations.append((sum(m.seconds for m in combination), predicted, combination))
    combinations.sort(key=lambda c: c[0])
    # the prediction may be wrong by a factor; what is predicted to miss by more is not tried
    rejected = 0
    for seconds, predicted, combination in combinations:
        if predicted > 1.25 * bound:
            continue
        precisions = {m.group.name: m.precision for m in combination}
        error = verify(precisions)
        if error <= bound:
            return Choice(precisions, seconds, predicted, error, rejected, list(table))
        rejected += 1
        if rejected >= 12:
            break
    precisions = dict.fromkeys(names, "bf16")
    error = verify(precisions)
    if error > bound:
        raise InputError(f"--bound: {bound} given, but bf16 alone has an action error of {error:.4f}")
    seconds = sum(m.seconds for m in table if m.precision == "bf16")
    return Choice(precisions, seconds, 0.0, error, rejected, list(table))
