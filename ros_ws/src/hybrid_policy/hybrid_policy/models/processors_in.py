"""Read the processors that a checkpoint prescribes: openpi's statistics or LeRobot's pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint_config import OPENPI_ASSETS, Description
from hybrid_policy.models.normalization import Floats, Mode, Normalization
from hybrid_policy.models.processors import Processors, PromptStyle
from hybrid_policy.models.tensor_files import TensorFile, read_json
from hybrid_policy.models.tokenizer import absent, find_tokenizer, load_tokenizer

_MODES: dict[str, Mode] = {
    "QUANTILES": "quantiles",
    "QUANTILE10": "quantile10",
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "IDENTITY": "identity",
}

#: LeRobot's steps that change nothing here: batching, devices, names (a robot file gives the model's)
_NEUTRAL = {"rename_observations_processor", "to_batch_processor", "device_processor"}
_KNOWN = _NEUTRAL | {
    "relative_actions_processor",
    "absolute_actions_processor",
    "normalizer_processor",
    "unnormalizer_processor",
    "tokenizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "pi0_new_line_processor",
}


def read_processors(directory: Path, description: Description, tokenizer: str | Path | None = None) -> Processors:
    """The processors of a checkpoint directory; what it lacks is listed in ``missing``, not raised.

    Raises:
        InputError: a file that is there and cannot be understood.
    """
    found = load_tokenizer(tokenizer) if tokenizer is not None else find_tokenizer(directory)
    read = _lerobot if description.form == "lerobot" else _openpi
    processors = read(directory, description)
    known = OPENPI_ASSETS.get(description.asset_id or "")
    processors.integrated = _integrated(directory / "dims.json", description, known.integrated if known else ())
    processors.config = processors.config.replace(state_in_prompt=processors.prompt_style == "state")
    processors.tokenizer = found
    if found is None:
        processors.missing.append(absent(directory))
    return processors


def _openpi(directory: Path, description: Description) -> Processors:
    config, asset_id = description.config, description.asset_id
    style: PromptStyle = "state" if config.state_in_prompt else "openpi_plain"
    known = OPENPI_ASSETS.get(asset_id or "")
    relative = _relative(directory / "dims.json", description, known.relative if known else ())
    path = directory / "assets" / (asset_id or "<id>") / "norm_stats.json"
    if ".." in Path(asset_id or "").parts or Path(asset_id or "").is_absolute():
        raise InputError.at(directory / "dims.json", "asset_id", asset_id, "a folder below assets/")
    if not path.exists():
        missing = [f"{path}: no statistics (openpi's norm_stats.json)"]
        return Processors(config, None, None, style, None, relative, missing=missing)
    stats = read_json(path).get("norm_stats")
    mode: Mode = "quantiles" if config.kind == "pi05" else "mean_std"  # openpi: use_quantile_norm

    def part(key: str, dimensions: int) -> Normalization:
        table = stats.get(key) if isinstance(stats, dict) else None
        if not isinstance(table, dict):
            raise InputError.at(path, f"norm_stats.{key}", table, "an object with mean, std, q01 and q99")
        values = {name: _numbers(path, f"{key}.{name}", value) for name, value in table.items() if value is not None}
        return Normalization.of(mode, "openpi", values, dimensions, f"{path}: {key}")

    return Processors(
        config, part("state", config.state_dim), part("actions", config.action_dim), style, None, relative
    )


def _numbers(path: Path, key: str, value: Any) -> Floats:
    try:
        return np.asarray(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise InputError.at(path, key, value, "a list of numbers") from error


def _relative(path: Path, description: Description, default: tuple[bool, ...]) -> tuple[bool, ...]:
    given = description.dims.get("relative_actions")
    if given is None:
        return default
    limit = min(description.config.action_dim, description.config.state_dim)
    booleans = isinstance(given, list) and all(isinstance(v, bool) for v in given)
    if not booleans or len(given) > limit:
        raise InputError.at(path, "relative_actions", given, "a list of true and false, one an action dimension")
    return tuple(given)


def _integrated(path: Path, description: Description, default: tuple[float, ...]) -> tuple[float, ...]:
    """Velocities among the actions: dims.json's ``integrated_actions``, else what the published one has."""
    given, limit = description.dims.get("integrated_actions"), description.config.action_dim
    if given is None:
        return default
    numbers = isinstance(given, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in given)
    if not numbers or len(given) > min(limit, description.config.state_dim):
        raise InputError.at(path, "integrated_actions", given, "a list of numbers, at most one an action dimension")
    return tuple(float(v) for v in given)


def _steps(path: Path) -> list[tuple[str, dict[str, Any], str | None]]:
    """(registry name, config, state file) of a LeRobot pipeline."""
    steps = read_json(path).get("steps")
    if not isinstance(steps, list):
        raise InputError.at(path, "steps", steps, "a list of steps")
    read = []
    for i, step in enumerate(steps):
        if not isinstance(step, dict) or not isinstance(step.get("config", {}), dict):
            raise InputError.at(path, f"steps[{i}]", step, "an object with registry_name and config")
        name, state_file = step.get("registry_name"), step.get("state_file")
        if name not in _KNOWN:
            raise InputError.at(path, f"steps[{i}].registry_name", name or step.get("class"), "a known step")
        if state_file is not None and (not isinstance(state_file, str) or Path(state_file).name != state_file):
            raise InputError.at(path, f"steps[{i}].state_file", state_file, "the name of a file in this directory")
        read.append((str(name), step.get("config", {}), state_file))
    return read


def _lerobot(directory: Path, description: Description) -> Processors:
    config = description.config
    style: PromptStyle = "state" if config.kind == "pi05" else "lerobot_plain"
    processors = Processors(config, None, None, style, None)
    before, after = directory / "policy_preprocessor.json", directory / "policy_postprocessor.json"
    for path in (before, after):
        if not path.exists():
            processors.missing.append(f"{path}: no such file (LeRobot saves it with a policy)")
    if before.exists():
        for name, step, state_file in _steps(before):
            if name == "normalizer_processor":
                found = _Step(before, step, state_file)
                processors.state = found.part("STATE", "observation.state", config.state_dim, processors.missing)
            elif name == "pi05_prepare_state_tokenizer_processor_step":
                processors.prompt_style = "state" if step.get("include_state_in_prompt", True) else "task"
            elif name == "relative_actions_processor":
                processors.relative = _relative_mask(before, step, config.action_dim)
                wanted = bool(description.raw.get("use_relative_actions", False))
                if bool(step.get("enabled", False)) != wanted:
                    raise InputError.at(
                        before, f"{name}.enabled", step.get("enabled"), f"{wanted}, as config.json says"
                    )
    if after.exists():
        for name, step, state_file in _steps(after):
            if name == "unnormalizer_processor":
                found = _Step(after, step, state_file)
                processors.action = found.part("ACTION", "action", config.action_dim, processors.missing)
            elif name == "absolute_actions_processor" and not step.get("enabled", False):
                processors.relative = ()
    for path, there, what in (
        (before, processors.state, "normalizer"),
        (after, processors.action, "unnormalizer"),
    ):
        if path.exists() and there is None and not processors.missing:
            processors.missing.append(f"{path}: has no {what}_processor step")
    return processors


@dataclass(frozen=True)
class _Step:
    """A LeRobot normalizer or unnormalizer step."""

    path: Path
    config: dict[str, Any]
    state_file: str | None

    def part(self, kind: str, key: str, dimensions: int, missing: list[str]) -> Normalization | None:
        """The normalisation of ``key``, or None and a line in ``missing`` where there are no statistics."""
        norm_map = self.config.get("norm_map", {})
        if not isinstance(norm_map, dict):
            raise InputError.at(self.path, "norm_map", norm_map, "an object")
        name, visual = norm_map.get(kind, "IDENTITY"), norm_map.get("VISUAL", "IDENTITY")
        mode = _MODES.get(str(name))
        if mode is None:
            raise InputError.at(self.path, f"norm_map.{kind}", name, f"one of {', '.join(_MODES)}")
        if visual != "IDENTITY":
            raise InputError.at(self.path, "norm_map.VISUAL", visual, "IDENTITY: images are mapped to -1...1")
        eps = self.config.get("eps", 1e-8)
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0:
            raise InputError.at(self.path, "eps", eps, "a small positive number")
        if mode == "identity":
            return Normalization(mode, "lerobot", eps)
        if self.state_file is None:
            missing.append(f"{self.path}: no statistics (no state_file) for {key}")
            return None
        file = TensorFile(self.path.parent / self.state_file)
        statistics: dict[str, Floats] = {}
        for full in file.infos:
            owner, _, statistic = full.rpartition(".")
            if owner == key:
                statistics[statistic] = file.read(full).double().numpy()
        if not statistics:
            missing.append(f"{file.path}: no statistics for {key}")
            return None
        return Normalization.of(mode, "lerobot", statistics, dimensions, f"{file.path}: {key}", eps=eps)


def _relative_mask(path: Path, step: dict[str, Any], action_dim: int) -> tuple[bool, ...]:
    """Which dimensions are relative: all but those whose name holds one of ``exclude_joints``."""
    if not step.get("enabled", False):
        return ()
    names, excluded = step.get("action_names"), step.get("exclude_joints") or []
    if not isinstance(excluded, list) or not (names is None or isinstance(names, list)):
        raise InputError.at(path, "relative_actions_processor", step, "lists action_names and exclude_joints")
    if names is None or not excluded:
        return (True,) * action_dim
    words = [str(word).lower() for word in excluded if word]
    mask = [not any(word in str(name).lower() for word in words) for name in names[:action_dim]]
    return tuple(mask + [True] * (action_dim - len(mask)))
