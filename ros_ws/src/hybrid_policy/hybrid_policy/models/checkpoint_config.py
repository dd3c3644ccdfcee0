"""What a checkpoint directory says of itself: ``config.json``, ``dims.json`` and its tensors' shapes.

``config.json`` is LeRobot's or openpi's. Neither says every dimension (LeRobot names ``gemma_2b``,
openpi not even whether it is pi0 or pi0.5), so ``dims.json`` beside it may; docs/checkpoints.md lists
its keys. What is said nowhere follows from the tensors' shapes, except the split of a projection into
heads, which no shape tells.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hybrid_policy.errors import InputError
from hybrid_policy.models.config import (
    GEMMA_VARIANTS,
    OPENPI_CAMERAS,
    PI0_FULL,
    PI05_FULL,
    GemmaConfig,
    Pi05Config,
    VisionConfig,
)
from hybrid_policy.models.pi05 import EXPERT, PREFIX, VISION
from hybrid_policy.models.tensor_files import read_json

LEROBOT_IMAGES = "observation.images."
HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
EMBEDDING = PREFIX + "embed_tokens.weight"

#: no dimension of a policy is near this; it keeps a broken file from asking for the impossible
MAX_DIMENSION = 1 << 20

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class KnownAssets:
    """What openpi's own code knows of a published checkpoint and its files do not say.

    cameras: those that its robot has (openpi masks the others, which is the same as leaving them out).
    relative: which action dimensions are relative to the state (openpi's ``AbsoluteActions``).
    integrated: what one unit of a velocity moves in one step; 0 for a position (DROID's
        ``joint_velocity_to_delta``: 0.2 rad).
    Source: openpi ``training/config.py`` and ``policies/*_policy.py``.
    """

    state_dim: int
    action_dim: int
    horizon: int
    cameras: tuple[str, ...]
    relative: tuple[bool, ...] = ()
    integrated: tuple[float, ...] = ()
    state_in_prompt: bool = True


_SIX_AND_GRIPPER = (True,) * 6 + (False,)

#: openpi's asset ids (``assets/<id>/norm_stats.json``) of the published pi0.5 checkpoints
OPENPI_ASSETS = {
    "trossen": KnownAssets(14, 14, 50, OPENPI_CAMERAS, _SIX_AND_GRIPPER * 2),
    "droid": KnownAssets(8, 8, 15, OPENPI_CAMERAS[:2], integrated=(0.2,) * 7 + (0.0,)),
    "physical-intelligence/libero": KnownAssets(8, 7, 10, OPENPI_CAMERAS[:2], state_in_prompt=False),
}


@dataclass(frozen=True)
class Description:
    """A checkpoint's form and dimensions, and the raw files that its processors read further."""

    form: Literal["lerobot", "openpi"]
    config: Pi05Config
    raw: dict[str, Any]
    dims: dict[str, Any]
    asset_id: str | None = None


class _Table:
    """A JSON object whose values are taken with their type checked; errors name file and key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    def integer(self, key: str, default: int) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not 1 <= value <= MAX_DIMENSION:
            raise InputError.at(self.path, key, value, f"a whole number from 1 to {MAX_DIMENSION}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            raise InputError.at(self.path, key, value, "a number below 1e9")
        return float(value)

    def table(self, key: str) -> _Table:
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise InputError.at(self.path, key, value, "an object")
        return _Table(self.path, value)


def canonical(name: str) -> str:
    """A tensor's name without LeRobot's ``model.``: openpi's, which is also ours."""
    return name.removeprefix("model.")


def describe(directory: Path, shapes: Shapes) -> Description:
    """Read a directory's form and dimensions.

    Args:
        directory: of the checkpoint.
        shapes: of its tensors, by canonical name.

    Raises:
        InputError: a file that cannot be understood, naming file, key and what was expected.
    """
    config_path, dims_path = directory / "config.json", directory / "dims.json"
    raw = read_json(config_path) if config_path.exists() else {}
    dims = read_json(dims_path) if dims_path.exists() else {}
    assets = sorted((directory / "assets").rglob("norm_stats.json"))
    said = _Said(_Table(config_path, raw), _Table(dims_path, dims), shapes)
    if "type" in raw or "input_features" in raw:
        return Description("lerobot", _lerobot(said), raw, dims)
    asset_id = str(dims.get("asset_id") or "") or None
    if asset_id is None and len(assets) == 1:
        asset_id = assets[0].parent.relative_to(directory / "assets").as_posix()
    if asset_id is None and len(assets) > 1:
        ids = ", ".join(a.parent.relative_to(directory / "assets").as_posix() for a in assets)
        raise InputError(f"{directory}/assets: several statistics ({ids}); name one as asset_id in dims.json")
    if not raw and not dims and asset_id is None:
        raise InputError(f"{directory}: no config.json, dims.json or assets/<id>/norm_stats.json: not a checkpoint")
    return Description("openpi", _openpi(said, asset_id), raw, dims, asset_id)


def _kind(shapes: Shapes) -> Literal["pi05", "pi0"]:
    return "pi0" if "action_time_mlp_in.weight" in shapes else "pi05"


def _layers(shapes: Shapes, prefix: str) -> int:
    found = (re.match(re.escape(prefix) + r"layers\.(\d+)\.", name) for name in shapes)
    return 1 + max((int(m.group(1)) for m in found if m), default=-1)


def _depth(said: int, found: int, path: Path, prefix: str) -> int:
    if found and said != found:
        raise InputError.at(path, f"depth of {prefix}", said, f"{found}, the layers in the weights")
    return said


def _size(shapes: Shapes, name: str, axis: int, default: int) -> int:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis and shape[axis] > 0 else default


def _gemma(path: Path, name: Any, dims: _Table, shapes: Shapes, prefix: str) -> GemmaConfig:
    """Sizes of one transformer: dims.json, else shapes; heads: dims.json, else the named variant."""
    variant = GEMMA_VARIANTS.get(str(name).removesuffix("_lora"))
    if variant is None:
        raise InputError.at(path, "variant", name, f"one of {', '.join(GEMMA_VARIANTS)}")
    first, found = prefix + "layers.0.", _layers(shapes, prefix)
    config = GemmaConfig(
        width=dims.integer("width", _size(shapes, first + "self_attn.q_proj.weight", 1, variant.width)),
        depth=_depth(dims.integer("depth", found or variant.depth), found, dims.path, prefix),
        mlp_dim=dims.integer("mlp_dim", _size(shapes, first + "mlp.up_proj.weight", 0, variant.mlp_dim)),
        heads=dims.integer("num_heads", variant.heads),
        kv_heads=dims.integer("num_kv_heads", variant.kv_heads),
        head_dim=dims.integer("head_dim", variant.head_dim),
    )
    rows = _size(shapes, first + "self_attn.q_proj.weight", 0, config.heads * config.head_dim)
    if rows != config.heads * config.head_dim:
        raise InputError(
            f"{first}self_attn.q_proj.weight: {rows} rows given, expected {config.heads} heads of "
            f"{config.head_dim}; dims.json beside it can give num_heads, num_kv_heads and head_dim"
        )
    return config


def _vision(dims: _Table, shapes: Shapes) -> VisionConfig:
    default = VisionConfig()
    first, found = VISION + "encoder.layers.0.", _layers(shapes, VISION + "encoder.")
    patch = VISION + "embeddings.patch_embedding.weight"
    return VisionConfig(
        width=dims.integer("hidden_size", _size(shapes, patch, 0, default.width)),
        depth=_depth(dims.integer("num_hidden_layers", found or default.depth), found, dims.path, VISION),
        mlp_dim=dims.integer("intermediate_size", _size(shapes, first + "mlp.fc1.weight", 0, default.mlp_dim)),
        heads=dims.integer("num_attention_heads", default.heads),
        patch=dims.integer("patch_size", _size(shapes, patch, 2, default.patch)),
    )


def _cameras(dims: _Table, known: tuple[str, ...]) -> tuple[str, ...]:
    """dims.json's list of names; else those that config.json says; else as many as dims.json counts."""
    given = dims.values.get("cameras")
    if isinstance(given, list) and given and all(isinstance(name, str) and name for name in given):
        return tuple(given)
    if given is not None and type(given) is not int:
        raise InputError.at(dims.path, "cameras", given, "a list of names, or their number")
    return known or tuple(f"cam{i}" for i in range(dims.integer("cameras", 1)))


def _feature_dim(path: Path, features: dict[str, Any], key: str, default: int) -> int:
    feature = features.get(key)
    if feature is None:
        return default
    shape = feature.get("shape") if isinstance(feature, dict) else None
    if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] > 0):
        raise InputError.at(path, key, feature, "a feature with a one-dimensional shape")
    return shape[0]


@dataclass(frozen=True)
class _Said:
    """All that a directory says: config.json and dims.json (where dims.json speaks, it wins), and shapes."""

    config: _Table
    dims: _Table
    shapes: Shapes

    def common(self, kind: Literal["pi05", "pi0"]) -> dict[str, Any]:
        """The fields that both forms of checkpoint give in the same way."""
        names = self.config.values
        vlm = self.dims.table("vlm")
        vocab = _size(self.shapes, EMBEDDING, 0, _size(self.shapes, HEAD, 0, 257152))
        variants = (
            names.get("paligemma_variant", "gemma_2b"),
            names.get("action_expert_variant", "gemma_300m"),
        )
        return {
            "kind": kind,
            "vision": _vision(self.dims.table("vision"), self.shapes),
            "prefix": _gemma(self.config.path, variants[0], vlm, self.shapes, PREFIX),
            "expert": _gemma(self.config.path, variants[1], self.dims.table("expert"), self.shapes, EXPERT),
            "vocab_size": self.dims.integer("vocab", vocab),
            "min_period": self.config.number("min_period", 4e-3),
            "max_period": self.config.number("max_period", 4.0),
        }


def _lerobot(said: _Said) -> Pi05Config:
    config, dims, raw = said.config, said.dims, said.config.values
    kind = raw.get("type")
    if kind not in ("pi05", "pi0"):
        raise InputError.at(config.path, "type", kind, "pi05 or pi0 (other policies are not supported)")
    for key in ("use_visual_memory", "use_proprioceptive_memory"):
        if raw.get(key):
            raise InputError.at(config.path, key, raw[key], "false: memory (MEM) policies are not supported")
    resolution = raw.get("image_resolution", [224, 224])
    if not (isinstance(resolution, list) and len(resolution) == 2 and resolution[0] == resolution[1]):
        raise InputError.at(config.path, "image_resolution", resolution, "two equal numbers of pixels")
    image_size = _Table(config.path, {"image_resolution": resolution[0]}).integer("image_resolution", 224)
    inputs, outputs = config.table("input_features").values, config.table("output_features").values
    max_state_dim = config.integer("max_state_dim", 32)
    max_action_dim = config.integer("max_action_dim", 32)
    visual = [key for key, f in inputs.items() if isinstance(f, dict) and f.get("type") == "VISUAL"]
    names = [key.removeprefix(LEROBOT_IMAGES).removeprefix("observation.") for key in visual]
    # LeRobot fills these with masked images, which nothing attends to: leaving them out is the same
    cameras = tuple(name for name in names if not re.fullmatch(r"empty_camera_\d+", name))
    token_len = config.integer("tokenizer_max_length", 200 if kind == "pi05" else 48)
    action_dim = _feature_dim(config.path, outputs, "action", max_action_dim)
    state_dim = _feature_dim(config.path, inputs, "observation.state", max_state_dim)
    return Pi05Config(
        **said.common(kind),
        image_size=dims.integer("image", image_size),
        cameras=_cameras(dims, cameras),
        max_action_dim=dims.integer("max_action_dim", max_action_dim),
        action_dim=dims.integer("action_dof", action_dim),
        max_state_dim=max_state_dim,
        state_dim=dims.integer("state_dim", state_dim),
        horizon=dims.integer("horizon", config.integer("chunk_size", 50)),
        max_token_len=dims.integer("max_token_len", token_len),
        num_steps=dims.integer("steps", config.integer("num_inference_steps", 10)),
        state_in_prompt=kind == "pi05",
    )


def _openpi_cameras(dims: _Table) -> tuple[str, ...]:
    """openpi's names, as many as dims.json counts; none of them where it counts more than there are."""
    count = dims.integer("cameras", len(OPENPI_CAMERAS)) if type(dims.values.get("cameras")) is int else 3
    return OPENPI_CAMERAS[:count] if count <= len(OPENPI_CAMERAS) else ()


def _openpi(said: _Said, asset_id: str | None) -> Pi05Config:
    config, dims = said.config, said.dims
    kind = _kind(said.shapes)
    full = PI05_FULL if kind == "pi05" else PI0_FULL
    known = OPENPI_ASSETS.get(asset_id or "")
    in_weights = _size(said.shapes, "action_in_proj.weight", 1, full.max_action_dim)
    max_dim = dims.integer("max_action_dim", config.integer("action_dim", in_weights))
    if not ("horizon" in dims.values or "action_horizon" in config.values or known):
        raise InputError(
            f"{config.path}: action_horizon is not said; give it there or as horizon in {dims.path.name} "
            "(50 for openpi's base and ALOHA, 15 for pi05_droid, 10 for pi05_libero)"
        )
    horizon = config.integer("action_horizon", known.horizon if known else full.horizon)
    in_prompt = dims.values.get("state_in_prompt", (known.state_in_prompt if known else True) and kind == "pi05")
    if not isinstance(in_prompt, bool):
        raise InputError.at(dims.path, "state_in_prompt", in_prompt, "true or false")
    return Pi05Config(
        **said.common(kind),
        image_size=dims.integer("image", 224),
        cameras=_cameras(dims, known.cameras if known else _openpi_cameras(dims)),
        max_action_dim=max_dim,
        action_dim=dims.integer("action_dof", known.action_dim if known else max_dim),
        max_state_dim=max_dim,
        state_dim=dims.integer("state_dim", known.state_dim if known else max_dim),
        horizon=dims.integer("horizon", horizon),
        max_token_len=dims.integer("max_token_len", config.integer("max_token_len", full.max_token_len)),
        num_steps=dims.integer("steps", 10),
        state_in_prompt=in_prompt,
    )
