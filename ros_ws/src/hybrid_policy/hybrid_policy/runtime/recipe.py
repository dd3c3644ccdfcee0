"""Recipes: which precision each site of a model runs in.

A recipe is a YAML file::

    name: seed
    description: Gate and up in NVFP4 with bf16 activations, down in FP8, the rest bf16.
    include: [bf16]                 # rules of other recipes, which come first
    sites:                          # ordered; where several match a site, the last one counts
      "*.mlp.gate_proj": nvfp4_w4a16
      "*.mlp.up_proj": nvfp4_w4a16
      "*.mlp.down_proj": fp8_w8a8
    prefix_cache: bf16              # keys and values of the prefix: bf16 or fp8

A site is one linear layer by its checkpoint name; a pattern is a glob (`fnmatch`) over those names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from hybrid_policy.errors import InputError
from hybrid_policy.share import resolve

#: precision -> the inner dimension must be a multiple of this
PRECISIONS: dict[str, int] = {"float32": 1, "bf16": 1, "fp8_w8a8": 16, "nvfp4_w4a16": 16, "nvfp4_w4a4": 16}
CACHE_PRECISIONS = ("float32", "bf16", "fp8")
#: sites that one kernel serves, and that therefore share a precision
FUSED = (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj"))
_KEYS = {"name", "description", "include", "sites", "prefix_cache", "device", "measured"}


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: it would silently keep the last."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        value = loader.construct_object(value_node, deep=True)
        if key in seen:
            raise InputError(
                f"{node.start_mark.name}: {key}: given twice ({seen[key]!r} and {value!r}), expected one meaning"
            )
        seen[key] = value
    return seen


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


@dataclass(frozen=True)
class Rule:
    """One pattern and the file it came from."""

    pattern: str
    precision: str
    source: str


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules.

    prefix_cache: precision of the prefix's keys and values.
    """

    name: str
    rules: tuple[Rule, ...]
    prefix_cache: str = "bf16"
    description: str = ""
    source: str = "<recipe>"
    measured: Mapping[str, Any] = field(default_factory=dict)

    def assign(self, sites: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Site -> precision, for sites given as name -> (out_features, in_features).

        Raises:
            InputError: a pattern matches no site, every site of a pattern has another meaning in the
                same file, a site has no precision, a precision cannot serve a site, or sites that one
                kernel serves differ. One line a problem.
        """
        problems: list[str] = []
        chosen: dict[str, Rule] = {}
        by_pattern: dict[Rule, list[str]] = {}
        for rule in self.rules:
            matched = [site for site in sites if fnmatchcase(site, rule.pattern)]
            by_pattern[rule] = matched
            if not matched:
                problems.append(
                    f"{rule.source}: sites: {rule.pattern!r} matches no site of this checkpoint; "
                    f"its sites are named like {_examples(sites)}"
                )
            for site in matched:
                chosen[site] = rule
        for rule, matched in by_pattern.items():
            winners = {chosen[site] for site in matched}
            if matched and rule not in winners and all(w.source == rule.source for w in winners):
                other = chosen[matched[0]]
                if other.precision != rule.precision:
                    problems.append(
                        f"{rule.source}: sites: {matched[0]} has two meanings, {rule.precision} ({rule.pattern!r}) "
                        f"and {other.precision} ({other.pattern!r}), expected one"
                    )
        for site, (out_features, in_features) in sites.items():
            if site not in chosen:
                problems.append(f"{self.source}: sites: no pattern matches {site}, expected a precision for each site")
                continue
            rule = chosen[site]
            multiple = PRECISIONS[rule.precision]
            if in_features % multiple:
                problems.append(
                    f"{rule.source}: sites: {rule.pattern!r}: {rule.precision} cannot serve {site} "
                    f"[{out_features}, {in_features}], expected an inner dimension that is a multiple of {multiple}"
                )
        problems += _fused_problems(self.source, {site: rule.precision for site, rule in chosen.items()})
        if problems:
            raise InputError("\n".join(problems))
        return {site: chosen[site].precision for site in sites}


def _examples(sites: Iterable[str]) -> str:
    names = sorted(sites)
    return ", ".join(names[:: max(1, len(names) // 3)][:3])


def _fused_problems(source: str, precisions: Mapping[str, str]) -> list[str]:
    problems = []
    for first, *others in FUSED:
        for site, precision in precisions.items():
            if not site.endswith("." + first):
                continue
            for other in others:
                sibling = site.removesuffix(first) + other
                if precisions.get(sibling, precision) != precision:
                    problems.append(
                        f"{source}: sites: {site} is {precision} and {sibling} is {precisions[sibling]}, "
                        "expected one precision: one kernel serves both"
                    )
    return problems


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by its shipped name (``seed``) or its file.

    Raises:
        InputError: no such recipe, not YAML, an unknown key or precision, an include that includes itself.
    """
    return _load(resolve(str(name_or_path), "config/recipes"), ())


def _load(path: Path, including: tuple[Path, ...]) -> Recipe:
    path = path.resolve()
    if path in including:
        chain = " -> ".join(p.name for p in (*including, path))
        raise InputError(f"{path.name}: include: a recipe includes itself ({chain}), expected no cycle")
    data = _read(path)
    unknown = sorted(set(data) - _KEYS)
    if unknown:
        raise InputError.at(path, unknown[0], data[unknown[0]], "one of the keys " + ", ".join(sorted(_KEYS)))
    rules: list[Rule] = []
    prefix_cache = "bf16"
    includes = data.get("include", [])
    for entry in [includes] if isinstance(includes, str) else includes:
        beside = path.parent / f"{entry}.yaml"
        included = beside if beside.exists() else resolve(str(entry), "config/recipes")
        base = _load(included, (*including, path))
        rules += base.rules
        prefix_cache = base.prefix_cache
    sites = data.get("sites", {})
    if not isinstance(sites, dict):
        raise InputError.at(path, "sites", sites, "a mapping from site pattern to precision")
    for pattern, precision in sites.items():
        if precision not in PRECISIONS:
            raise InputError.at(path, f"sites[{pattern!r}]", precision, "one of " + ", ".join(PRECISIONS))
        rules.append(Rule(str(pattern), precision, str(path)))
    if not rules:
        raise InputError.at(path, "sites", sites, "at least one site pattern, or an include that has one")
    prefix_cache = data.get("prefix_cache", prefix_cache)
    if prefix_cache not in CACHE_PRECISIONS:
        raise InputError.at(path, "prefix_cache", prefix_cache, "one of " + ", ".join(CACHE_PRECISIONS))
    return Recipe(
        name=str(data.get("name", path.stem)),
        rules=tuple(rules),
        prefix_cache=prefix_cache,
        description=str(data.get("description", "")),
        source=str(path),
        measured=data.get("measured", {}) or {},
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError.at(path, "(top)", data, "a mapping with the key sites")
    return data


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe file that `load_recipe` reads back to the same rules."""
    data: dict[str, Any] = {"name": recipe.name, "description": recipe.description}
    data["sites"] = {rule.pattern: rule.precision for rule in recipe.rules}
    data["prefix_cache"] = recipe.prefix_cache
    if recipe.measured:
        data["measured"] = dict(recipe.measured)
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=110), encoding="utf-8")
