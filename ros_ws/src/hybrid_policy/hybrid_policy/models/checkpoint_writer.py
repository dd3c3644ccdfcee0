"""Write our own checkpoint: a directory that LeRobot reads, with ``dims.json`` for what its config lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint_config import EMBEDDING, HEAD, LEROBOT_IMAGES, UNUSED_HEAD
from hybrid_policy.models.config import GEMMA_VARIANTS, GemmaConfig, Pi05Config
from hybrid_policy.models.normalization import STATISTICS, Normalization
from hybrid_policy.models.pi05 import Pi05

Statistics = Mapping[str, Mapping[str, "NDArray[np.floating[Any]] | Sequence[float]"]]

PREPROCESSOR = "policy_preprocessor"
POSTPROCESSOR = "policy_postprocessor"
#: LeRobot's name of PaliGemma's tokenizer; with a tokenizer of your own, override it when loading there
PALIGEMMA = "google/paligemma-3b-pt-224"


def save_checkpoint(
    directory: str | Path,
    model: Pi05,
    config: Pi05Config,
    statistics: Statistics,
    tokenizer: str | Path | None = None,
    *,
    normalization: Literal["quantiles", "mean_std", "min_max"] = "quantiles",
    action_names: Sequence[str] = (),
    relative_exclude: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint directory that ``load_checkpoint`` and LeRobot 0.6.1 read.

    Args:
        directory: made if need be; files of an earlier checkpoint in it are replaced.
        model: its parameters are written under LeRobot's names, the tied embedding as the head.
        config: the model's.
        statistics: ``{"state": {"q01": [...], "q99": [...]}, "action": {...}}``: at least those that
            ``normalization`` needs; others (mean, std, min, max) are kept too.
        tokenizer: a ``tokenizer.json`` or SentencePiece ``.model`` to copy into the directory.
        normalization: of state and action.
        action_names: names of the action dimensions, in their order.
        relative_exclude: given: actions are relative to the state, except dimensions whose name holds
            one of these words (LeRobot's ``relative_exclude_joints``). None: absolute.
        dtype: of the written weights; the model's own where None.

    Raises:
        InputError: statistics that do not fit.
    """
    folder = Path(directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for key, dimensions in (("state", config.state_dim), ("action", config.action_dim)):
        given = {k: np.asarray(v, dtype=np.float32) for k, v in statistics.get(key, {}).items()}
        Normalization.of(normalization, "lerobot", given, dimensions, f"statistics[{key!r}]")
    names = list(action_names)
    described = _lerobot_config(config, normalization, names, relative_exclude)
    described["dtype"] = "bfloat16" if (dtype or model.dtype) == torch.bfloat16 else "float32"
    _write(folder / "config.json", described)
    _write(folder / "dims.json", _dims(config))
    stored = {
        f"{long}.{name}": torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(-1).copy())
        for long, short in (("observation.state", "state"), ("action", "action"))
        for name, values in statistics[short].items()
    }
    before, after = _pipelines(config, normalization, names, relative_exclude)
    for pipeline in (before, after):
        for step in pipeline["steps"]:
            if "state_file" in step:
                save_file(stored, folder / step["state_file"])
        _write(folder / f"{pipeline['name']}.json", pipeline)
    save_file(_tensors(model, config, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        _copy_tokenizer(Path(tokenizer).expanduser(), folder)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tensors(model: Pi05, config: Pi05Config, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = {}
    for name, value in model.state_dict().items():
        stored = HEAD if name == EMBEDDING else name
        tensors[f"model.{stored}"] = value.detach().to("cpu", dtype or value.dtype).contiguous()
    if config.prefix in GEMMA_VARIANTS.values() and config.expert in GEMMA_VARIANTS.values():
        # sizes that LeRobot can build; its strict loading wants this head, which nothing uses
        head = tensors[f"model.{HEAD}"]
        tensors[f"model.{UNUSED_HEAD}"] = torch.zeros(config.vocab_size, config.expert.width, dtype=head.dtype)
    return tensors


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if not source.is_file() or source.suffix not in (".json", ".model"):
        raise InputError(f"{source}: no tokenizer.json and no SentencePiece .model")
    target = folder / ("tokenizer.json" if source.suffix == ".json" else "paligemma_tokenizer.model")
    if target.resolve() != source.resolve():
        shutil.copyfile(source, target)
    if source.suffix == ".json":  # lets transformers' AutoTokenizer open the directory
        _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _variant(config: GemmaConfig, default: str) -> str:
    return next((name for name, known in GEMMA_VARIANTS.items() if known == config), default)


def _features(config: Pi05Config) -> tuple[dict[str, Any], dict[str, Any]]:
    size = config.image_size
    visual = {LEROBOT_IMAGES + c: {"type": "VISUAL", "shape": [3, size, size]} for c in config.cameras}
    state = {"observation.state": {"type": "STATE", "shape": [config.state_dim]}}
    return {**visual, **state}, {"action": {"type": "ACTION", "shape": [config.action_dim]}}


def _norm_map(normalization: str) -> dict[str, str]:
    return {"VISUAL": "IDENTITY", "STATE": normalization.upper(), "ACTION": normalization.upper()}


def _lerobot_config(
    config: Pi05Config, normalization: str, names: list[str], exclude: Sequence[str] | None
) -> dict[str, Any]:
    inputs, outputs = _features(config)
    return {
        "type": config.kind,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "device": "cpu",
        "use_amp": False,
        "push_to_hub": False,
        "paligemma_variant": _variant(config.prefix, "gemma_2b"),
        "action_expert_variant": _variant(config.expert, "gemma_300m"),
        "dtype": "float32",
        "chunk_size": config.horizon,
        "n_action_steps": config.horizon,
        "max_state_dim": config.max_state_dim,
        "max_action_dim": config.max_action_dim,
        "num_inference_steps": config.num_steps,
        "min_period": config.min_period,
        "max_period": config.max_period,
        "use_relative_actions": exclude is not None,
        "relative_exclude_joints": list(exclude or ()),
        "action_feature_names": names or None,
        "image_resolution": [config.image_size, config.image_size],
        "empty_cameras": 0,
        "tokenizer_max_length": config.max_token_len,
        "normalization_mapping": _norm_map(normalization),
    }


def _gemma_dims(config: GemmaConfig) -> dict[str, int]:
    return {
        "width": config.width,
        "depth": config.depth,
        "mlp_dim": config.mlp_dim,
        "num_heads": config.heads,
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
    }


def _dims(config: Pi05Config) -> dict[str, Any]:
    """What LeRobot's config.json has no field for; the keys are listed in docs/checkpoints.md."""
    vision = config.vision
    return {
        "vlm": _gemma_dims(config.prefix),
        "expert": _gemma_dims(config.expert),
        "vision": {
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp_dim,
            "patch_size": vision.patch,
        },
        "vocab": config.vocab_size,
        "image": config.image_size,
        "cameras": len(config.cameras),
        "action_dof": config.action_dim,
        "horizon": config.horizon,
        "max_token_len": config.max_token_len,
        "steps": config.num_steps,
    }


def _pipelines(
    config: Pi05Config, normalization: str, names: list[str], exclude: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """LeRobot 0.6.1's processors of pi0.5 (and pi0, whose steps stand in another order)."""
    inputs, outputs = _features(config)

    def step(name: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {"registry_name": name, "config": dict(settings or {})}

    def with_state(pipeline: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
        for i, entry in enumerate(steps):
            if entry["registry_name"].endswith("normalizer_processor"):
                entry["state_file"] = f"{pipeline}_step_{i}_{entry['registry_name']}.safetensors"
        return {"name": pipeline, "steps": steps}

    norm = {"eps": 1e-8, "features": {**inputs, **outputs}, "norm_map": _norm_map(normalization)}
    relative = step(
        "relative_actions_processor",
        {
            "enabled": exclude is not None,
            "exclude_joints": list(exclude or ()),
            "action_names": names or None,
        },
    )
    tokens = step(
        "tokenizer_processor",
        {
            "max_length": config.max_token_len,
            "task_key": "task",
            "padding_side": "right",
            "padding": "max_length",
            "truncation": True,
            "tokenizer_name": PALIGEMMA,
        },
    )
    device = step("device_processor", {"device": "cpu", "float_dtype": None})
    first = [step("rename_observations_processor", {"rename_map": {}}), step("to_batch_processor")]
    normalizer = step("normalizer_processor", norm)
    if config.kind == "pi05":
        prompt = {} if config.state_in_prompt else {"include_state_in_prompt": False}
        build = step("pi05_prepare_state_tokenizer_processor_step", prompt)
        before = [*first, relative, normalizer, build, tokens, device]
    else:
        before = [*first, step("pi0_new_line_processor"), tokens, device, relative, normalizer]
    after = [
        step("unnormalizer_processor", {**norm, "features": outputs}),
        step("absolute_actions_processor", {"enabled": exclude is not None}),
        step("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    return with_state(PREPROCESSOR, before), with_state(POSTPROCESSOR, after)


def statistics_of(values: NDArray[np.floating[Any]]) -> dict[str, NDArray[np.floating[Any]]]:
    """All statistics that LeRobot keeps, from data [n, dimensions]."""
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    quantiles = {f"q{p:02d}": np.quantile(rows, p / 100, axis=0) for p in (1, 10, 50, 90, 99)}
    plain = {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0)}
    assert all(set(needed) <= {*quantiles, *plain} for needed in STATISTICS.values())
    return {**plain, **quantiles}
