"""What `hybrid-policy tune` decides from: each part's time in each combination of precisions, the action's error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hybrid_policy.errors import InputError
from hybrid_policy.models.config import Pi05Config
from hybrid_policy.models.pi05 import EXPERT, PREFIX, VISION
from hybrid_policy.runtime.recipe import Rule
from hybrid_policy.runtime.sites import ReferenceSite, pack_sites

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
#: combinations that are measured as a whole before all groups stay in bf16
_MOST_TRIED = 24

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Group:
    """Sites of one part that have one shape and share a launch in every layer.

    rows: tokens that pass through. shape: (out_features, in_features) of the stacked launch; of fc1, where fc1 and fc2
    are one group (the GELU between them is in the form that fc2 takes). calls: launches an inference.
    """

    part: str
    kind: str
    rows: int
    shape: tuple[int, int]
    calls: int
    layers: int

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
        Group("vision", kind, len(config.cameras) * config.image_tokens, shape, vision.depth, vision.depth)
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
        found += [Group(part, kind, rows, shape, calls * gemma.depth, gemma.depth) for kind, shape in shapes.items()]
    return found


def rules_of(groups: Sequence[Group], precisions: Mapping[str, str], source: str) -> tuple[Rule, ...]:
    """The recipe rules of group name -> precision."""
    changed = [group for group in groups if precisions[group.name] != "bf16"]
    patterns = [Rule(pattern, precisions[group.name], source) for group in changed for pattern in group.patterns()]
    return (Rule("*", "bf16", source), *patterns)


@dataclass(frozen=True)
class PartTime:
    """Vision, prefix or expert as a whole: group name -> precision of all its groups, and seconds an inference."""

    part: str
    precisions: Mapping[str, str]
    seconds: float


def combinations(groups: Sequence[Group], capability: tuple[int, int] | None) -> dict[str, list[dict[str, str]]]:
    """Part -> every combination of its groups' precisions that a device of this compute capability serves."""
    result = {}
    for part in _PARTS:
        of_part = [group for group in groups if group.part == part]
        names = [group.name for group in of_part]
        candidates = (group.candidates(capability) for group in of_part)
        result[part] = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*candidates)]
    return result


@dataclass
class Measured:
    """One group in one precision, all others in bf16: seconds that its part takes, and relative error of the action."""

    group: Group
    precision: str
    seconds: float
    error: float


def table_of(
    groups: Sequence[Group], times: Sequence[PartTime], errors: Mapping[tuple[str, str], float]
) -> list[Measured]:
    """What each group alone does, from the times of whole parts and the errors of (group name, precision)."""
    table = []
    for group in groups:
        for time in times:
            others = {p for name, p in time.precisions.items() if name != group.name}
            if time.part == group.part and others <= {"bf16"}:
                precision = time.precisions[group.name]
                table.append(Measured(group, precision, time.seconds, errors[group.name, precision]))
    return table


@dataclass
class Choice:
    """Group name -> precision, and what it is predicted and measured to give."""

    precisions: dict[str, str]
    seconds: float
    predicted_error: float
    measured_error: float = float("nan")
    rejected: int = 0
    parts: tuple[PartTime, ...] = ()


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


def choose(
    times: Sequence[PartTime],
    errors: Mapping[tuple[str, str], float],
    bound: float,
    verify: Callable[[dict[str, str]], float],
) -> Choice:
    """The fastest assignment whose measured action error is at most ``bound``.

    Errors of groups are taken as independent (their squares add) to order the candidates; each candidate is then
    measured as a whole, fastest first, and the first that holds is taken.

    Args:
        times: of each part in each combination of its groups' precisions.
        errors: (group name, precision) -> relative error of the action where that group alone changes.
        verify: group name -> precision, to the measured relative error.

    Raises:
        InputError: not even all groups in bf16 hold the bound.
    """
    options = [[time for time in times if time.part == part] for part in dict.fromkeys(time.part for time in times)]
    candidates = []
    for parts in itertools.product(*options):
        precisions = {name: precision for part in parts for name, precision in part.precisions.items()}
        predicted = float(np.sqrt(sum(errors[item] ** 2 for item in precisions.items())))
        candidates.append((sum(part.seconds for part in parts), predicted, precisions, parts))
    candidates.sort(key=lambda c: c[0])
    # The prediction may be too high: what is predicted to miss by little is tried until one does miss. And what changes
    # all that a refused one changed, and more, is no better.
    limit, refused = 1.25 * bound, list[set[tuple[str, str]]]()
    for seconds, predicted, precisions, parts in candidates:
        changed = {item for item in precisions.items() if item[1] != "bf16"}
        if predicted > limit or len(refused) == _MOST_TRIED or any(one <= changed for one in refused):
            continue
        error = verify(precisions)
        if error <= bound:
            return Choice(precisions, seconds, predicted, error, len(refused), parts)
        limit = bound
        refused.append(changed)
    seconds, predicted, precisions, parts = next(c for c in candidates if set(c[2].values()) == {"bf16"})
    error = verify(precisions)
    if error > bound:
        raise InputError(f"--bound: {bound} given, but bf16 alone has an action error of {error:.4f}")
    return Choice(precisions, seconds, predicted, error, len(refused), parts)
