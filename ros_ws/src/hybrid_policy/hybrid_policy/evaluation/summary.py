"""The figures that one looks at first and ``--fail-if`` can name: one number a recipe, over all bags."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_policy.errors import InputError

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One figure. ``path`` leads to it in a bag's recipe (or in the bag itself where ``of_bag``).

    over_bags: how the bags' values become one: mean (weighted by chunks), min, max or sum.
    """

    name: str
    path: tuple[str, ...]
    over_bags: str
    unit: str
    meaning: str
    of_bag: bool = False


FIGURES = (
    Figure("action_cosine", ("against_first", "action_cosine", "mean"), "mean", "",
           "mean cosine of a chunk with the first recipe's on the same observation and noise"),
    Figure("action_cosine_min", ("against_first", "action_cosine", "min"), "min", "", "the worst chunk's"),
    Figure("action_mae", ("against_first", "mae"), "mean", "rad",
           "mean absolute difference to the first recipe"),
    Figure("action_max", ("against_first", "max"), "max", "rad", "largest difference to the first recipe"),
    Figure("recorded_cosine", ("against_recorded", "action_cosine", "mean"), "mean", "",
           "mean cosine of a chunk with the recorded actions"),
    Figure("recorded_mae", ("against_recorded", "mae"), "mean", "rad",
           "mean absolute error to the recorded actions"),
    Figure("recorded_mse", ("against_recorded", "mse"), "mean", "rad^2",
           "mean squared error to the recorded actions"),
    Figure("recorded_max", ("against_recorded", "max"), "max", "rad",
           "largest error to the recorded actions"),
    Figure("motion_cosine", ("against_recorded", "motion_cosine", "mean"), "mean", "",
           "mean cosine of displacements from where the robot was: direction of motion"),
    Figure("skill", ("against_recorded", "skill"), "mean", "",
           "1 - mse / mse of standing still; above 0 the policy says more than nothing"),
    Figure("executed_mae", ("against_recorded", "executed_mae"), "mean", "rad",
           "mean absolute error of what the robot would have been told, tick by tick"),
    Figure("seam_position", ("seams", "position", "max"), "max", "rad", "largest disagreement at a seam"),
    Figure("seam_velocity", ("seams", "velocity", "max"), "max", "rad/s", "largest velocity jump at a seam"),
    Figure("seam_acceleration", ("seams", "acceleration", "p99"), "max", "rad/s^2", "p99 over seams"),
    Figure("guard_limited", ("guard", "chunks_limited"), "sum", "chunks", "chunks that the guard limited"),
    Figure("guard_refused", ("refused",), "sum", "chunks", "chunks that the guard refused"),
    Figure("holds", ("holds",), "sum", "", "times the robot would have been held"),
    Figure("missed_starts", ("missed_starts",), "sum", "",
           "inferences not started: the one before still ran"),
    Figure("chunks", ("chunks",), "sum", "chunks", "inferences"),
    Figure("skew", ("skew", "max"), "max", "s", "largest spread of an observation's stamps"),
    Figure("input_gaps", ("inputs", "gaps"), "sum", "", "intervals over 2.5 expected ones, all inputs", True),
    Figure("longest_gap", ("inputs", "longest_gap"), "max", "s", "the longest of them", True),
    Figure("latency_p50", ("latency", "infer", "p50"), "mean", "ms", "inference on this machine, median"),
    Figure("latency_p99", ("latency", "infer", "p99"), "max", "ms", "inference on this machine"),
)  # fmt: skip
NAMES = {figure.name: figure for figure in FIGURES}
#: With a single recipe there is no first one to compare with: the recorded actions take its place.
_ALONE = {"action_cosine": "recorded_cosine", "action_mae": "recorded_mae", "action_max": "recorded_max"}
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_FORM = re.compile(r"^\s*(?:(?P<recipe>[^\s<>=]+)\s*:\s*)?(?P<name>\w+)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>\S+)\s*$")


def summarise(bags: Sequence[Result], recipes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Recipe -> figure -> value over all bags that were replayed; None where nothing says it."""
    used = [bag for bag in bags if bag.get("status") == "replayed"]
    return {recipe: {f.name: _over(used, recipe, f) for f in FIGURES} for recipe in recipes}


def _over(bags: Sequence[Result], recipe: str, figure: Figure) -> float | None:
    found = [(value, bag["recipes"][recipe]["chunks"]) for bag in bags
             if (value := _value(bag, recipe, figure)) is not None]  # fmt: skip
    if not found:
        return None
    values = [value for value, _ in found]
    if figure.over_bags == "mean":
        weight = sum(chunks for _, chunks in found)
        return sum(v * c for v, c in found) / weight if weight else None
    if figure.over_bags == "sum":
        return sum(values)
    return min(values) if figure.over_bags == "min" else max(values)


def _value(bag: Result, recipe: str, figure: Figure) -> float | None:
    if figure.of_bag:
        values = [one[figure.path[-1]] for one in bag["inputs"]]
        return sum(values) if figure.over_bags == "sum" else max(values, default=None)
    at: Any = bag["recipes"].get(recipe, {})
    if figure.path[0] == "latency":
        at = {"latency": bag.get("measured", {}).get("latency", {}).get(recipe, {})}
    for key in figure.path:
        at = at.get(key) if isinstance(at, Mapping) else None
    return None if at is None else float(at)


@dataclass(frozen=True)
class Condition:
    """``[recipe:]figure<bound``: what must not be."""

    text: str
    recipe: str
    figure: Figure
    sign: str
    bound: float


@dataclass(frozen=True)
class Check:
    """A condition held against one recipe. failed: it holds (which must not be), or cannot be told."""

    condition: str
    recipe: str
    figure: str
    value: float | None
    failed: bool

    @property
    def line(self) -> str:
        """For people."""
        word = "FAILED" if self.failed else "ok"
        value = "not available" if self.value is None else f"{self.value:.6g}"
        return f"{word}: {self.recipe}: {self.figure} is {value} (fail if {self.condition})"


def parse_conditions(texts: Sequence[str], recipes: Sequence[str]) -> list[Condition]:
    """The user's ``--fail-if``; several may be joined by commas.

    Raises:
        InputError: not of the form ``[recipe:]figure<number``, an unknown figure or recipe.
    """
    found = []
    for text in (part for given in texts for part in given.split(",") if part.strip()):
        match = _FORM.match(text)
        if match is None:
            raise InputError(f"--fail-if: {text!r} given, expected [recipe:]figure<number, e.g. action_cosine<0.99")
        name, recipe = match["name"], match["recipe"] or ""
        if name not in NAMES:
            raise InputError(f"--fail-if: {name!r} given, expected one of {', '.join(NAMES)}")
        if recipe and recipe not in recipes:
            raise InputError(f"--fail-if: recipe {recipe!r} given, expected one of {', '.join(recipes)}")
        try:
            bound = float(match["bound"])
        except ValueError:
            raise InputError(f"--fail-if: {match['bound']!r} given in {text!r}, expected a number") from None
        if not math.isfinite(bound):
            raise InputError(f"--fail-if: {match['bound']!r} given in {text!r}, expected a finite number")
        found.append(Condition(text.strip(), recipe, NAMES[name], match["sign"], bound))
    return found


def check(
    conditions: Sequence[Condition], summary: Mapping[str, Mapping[str, float | None]], recipes: Sequence[str]
) -> list[Check]:
    """Hold every condition against every recipe it concerns. A figure that is not available fails.

    Figures against the first recipe concern the others; with a single recipe they mean the recorded actions.
    """
    checks = []
    for condition in conditions:
        compared = condition.figure.path[0] == "against_first"
        name = _ALONE.get(condition.figure.name, condition.figure.name) if len(recipes) == 1 else condition.figure.name
        for i, recipe in enumerate(recipes):
            if condition.recipe and recipe != condition.recipe:
                continue
            if compared and i == 0 and len(recipes) > 1 and not condition.recipe:
                continue
            value = summary.get(recipe, {}).get(name)
            failed = value is None or _OPERATORS[condition.sign](value, condition.bound)
            checks.append(Check(condition.text, recipe, name, value, failed))
    return checks
