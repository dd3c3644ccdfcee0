"""Every form of checkpoint that people have, and our own, loaded to the same model."""

from __future__ import annotations

import ast
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hybrid_policy.cli import main
from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import load_checkpoint, open_checkpoint
from hybrid_policy.models.checkpoint_config import EMBEDDING, HEAD, UNUSED_HEAD, canonical, describe
from hybrid_policy.models.checkpoint_writer import save_checkpoint, statistics_of
from hybrid_policy.models.config import PI05_FULL
from hybrid_policy.models.pi05 import Pi05, keeps_float32
from safetensors.torch import load_file, save_file

from .conftest import Batch, make_config, randomize


def published_shapes(fixtures: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of LeRobot's full-size state dict."""
    lines = gzip.decompress((fixtures / "pi05_keys.txt.gz").read_bytes()).decode().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return {name: ast.literal_eval(shape) for name, shape, _ in rows}


def test_every_published_tensor_has_its_place(fixtures) -> None:
    published = {canonical(name): shape for name, shape in published_shapes(fixtures).items()}
    assert len(published) == 813
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in Pi05(PI05_FULL).named_parameters()}
    assert published.pop(HEAD) == ours[EMBEDDING]
    assert published.pop(UNUSED_HEAD) == (257152, 1024)
    assert published == ours


def test_full_size_directories_are_described_from_their_own_files(fixtures, tmp_path) -> None:
    shapes = {canonical(name): shape for name, shape in published_shapes(fixtures).items()}
    del shapes[EMBEDDING]  # published files hold the head only
    for asset, horizon, state, action, cameras, in_prompt in (
        ("trossen", 50, 14, 14, 3, True),
        ("droid", 15, 8, 8, 2, True),
        ("physical-intelligence/libero", 10, 8, 7, 2, False),
    ):
        folder = tmp_path / asset / "assets" / asset
        folder.mkdir(parents=True)
        (folder / "norm_stats.json").write_text("{}")
        described = describe(tmp_path / asset, shapes)
        assert (described.form, described.asset_id) == ("openpi", asset)
        config = described.config
        assert (config.horizon, config.state_dim, config.action_dim) == (horizon, state, action)
        assert (len(config.cameras), config.state_in_prompt) == (cameras, in_prompt)
        full = PI05_FULL.replace(horizon=1, state_dim=1, action_dim=1, cameras=("a",), state_in_prompt=True)
        assert config.replace(horizon=1, state_dim=1, action_dim=1, cameras=("a",), state_in_prompt=True) == full


def sampled(policy: object) -> torch.Tensor:
    batch = Batch(policy.config)  # type: ignore[attr-defined]
    return policy.model.sample_actions(*batch.prefix, batch.noise, state=batch.state)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_our_own_comes_back(tmp_path, statistics, kind) -> None:
    config = make_config(kind)
    model = randomize(Pi05(config)).eval()
    save_checkpoint(tmp_path, model, config, statistics)
    policy = load_checkpoint(tmp_path)
    assert policy.config == config
    batch = Batch(config)
    expected = model.sample_actions(*batch.prefix, batch.noise, state=batch.state)
    assert torch.equal(sampled(policy), expected)
    assert policy.spec.cameras == ("front", "wrist", "side")
    assert (policy.spec.state_dim, policy.spec.action_dim, policy.spec.max_action_dim) == (5, 5, 9)
    assert not any(p.requires_grad for p in policy.model.parameters())


def test_our_own_has_lerobots_files(tmp_path, statistics, tiny) -> None:
    config = make_config()
    save_checkpoint(tmp_path, Pi05(config), config, statistics, relative_exclude=["gripper"])
    theirs, ours = (json.loads((p / "config.json").read_text()) for p in (tiny, tmp_path))
    assert set(ours) <= set(theirs)
    before = json.loads((tmp_path / "policy_preprocessor.json").read_text())
    assert before["name"] == "policy_preprocessor"
    assert [step["registry_name"] for step in before["steps"]] == [
        "rename_observations_processor",
        "to_batch_processor",
        "relative_actions_processor",
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "device_processor",
    ]
    state = load_file(tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    assert torch.equal(state["action.q99"], torch.tensor(statistics["action"]["q99"]).float())
    assert (tmp_path / "policy_postprocessor_step_0_unnormalizer_processor.safetensors").exists()
    names = set(load_file(tmp_path / "model.safetensors"))
    assert f"model.{HEAD}" in names
    assert f"model.{EMBEDDING}" not in names


def test_openpi_directory(tmp_path, statistics) -> None:
    config = make_config(cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"))
    model = randomize(Pi05(config)).eval()
    save_checkpoint(tmp_path / "ours", model, config, statistics)
    folder = tmp_path / "openpi"
    (folder / "assets" / "me" / "robot").mkdir(parents=True)
    shutil.copy(tmp_path / "ours" / "dims.json", folder)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "action_dim": 9,
                "action_horizon": 6,
                "paligemma_variant": "gemma_2b",
                "action_expert_variant": "gemma_300m",
                "precision": "bfloat16",
            }
        )
    )
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    save_file({canonical(k): v for k, v in tensors.items()}, folder / "model.safetensors")
    stats = {
        key: {"mean": [0.0] * 9, "std": [1.0] * 9, "q01": [-1.0] * 9, "q99": [3.0] * 9} for key in ("state", "actions")
    }
    (folder / "assets" / "me" / "robot" / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    dims = json.loads((folder / "dims.json").read_text())
    dims |= {"state_dim": 5, "relative_actions": [True, True, False], "state_in_prompt": False}
    (folder / "dims.json").write_text(json.dumps(dims))
    policy = load_checkpoint(folder)
    assert policy.checkpoint.description.asset_id == "me/robot"
    assert policy.processors.prompt_style == "openpi_plain"
    assert policy.processors.relative == (True, True, False)
    assert policy.processors.state.style == "openpi"
    assert policy.processors.state.mode == "quantiles"
    assert torch.equal(sampled(policy), sampled(load_checkpoint(tmp_path / "ours")))
    (folder / "dims.json").write_text(json.dumps({k: v for k, v in dims.items() if k != "vlm"}))
    with pytest.raises(InputError, match=r"q_proj.weight: 48 rows given, expected 8 heads of 256"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [HEAD, EMBEDDING])
def test_the_tied_embedding_under_either_name(tiny_copy, tiny, keep) -> None:
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.{EMBEDDING if keep == HEAD else HEAD}"]
    save_file(tensors, path)
    assert torch.equal(sampled(load_checkpoint(tiny_copy)), sampled(load_checkpoint(tiny)))


def test_a_head_that_training_left_behind_is_noted_and_not_used(tiny_copy, tiny, capsys) -> None:
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.{HEAD}"] = tensors[f"model.{HEAD}"] + 1
    save_file(tensors, path)
    assert torch.equal(sampled(load_checkpoint(tiny_copy)), sampled(load_checkpoint(tiny)))
    assert main(["inspect", str(tiny_copy)]) == 0
    assert f"note: {HEAD} differs from" in capsys.readouterr().out


def shard(directory: Path, parts: int = 3) -> dict[str, str]:
    """Split model.safetensors into shards with an index, as transformers writes them."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::parts]}, directory / file)
        weight_map |= dict.fromkeys(names[i::parts], file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tiny_copy, tiny) -> None:
    shard(tiny_copy)
    assert torch.equal(sampled(load_checkpoint(tiny_copy)), sampled(load_checkpoint(tiny)))


@pytest.mark.parametrize("path", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "", 5])
def test_an_index_may_not_leave_the_directory(tiny_copy, path) -> None:
    weight_map = shard(tiny_copy)
    weight_map[next(iter(weight_map))] = path
    write_index(tiny_copy, weight_map)
    with pytest.raises(InputError, match="in this directory"):
        load_checkpoint(tiny_copy)


def test_an_index_that_lies_is_refused(tiny_copy) -> None:
    weight_map = shard(tiny_copy)
    names = list(weight_map)
    moved = {**weight_map, names[0]: weight_map[names[-1]], "model.more": weight_map[names[0]]}
    del moved[names[4]]
    write_index(tiny_copy, moved)
    with pytest.raises(InputError) as caught:
        load_checkpoint(tiny_copy)
    for part in (
        f"{names[0]}: said to be in",
        "model.more: said to be in",
        f"{names[4]}: in a shard, not in the index",
    ):
        assert part in str(caught.value)


def test_every_difference_is_listed_in_one_error(tiny_copy) -> None:
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.time_mlp_in.bias"]
    tensors["model.extra.weight"] = torch.zeros(3)
    tensors["model.action_in_proj.weight"] = torch.zeros(48, 31)
    tensors["model.action_out_proj.bias"] = torch.zeros(32, dtype=torch.int32)
    tensors[f"model.{HEAD}"] = tensors[f"model.{HEAD}"][1:].clone()
    save_file(tensors, path)
    with pytest.raises(InputError) as caught:
        open_checkpoint(tiny_copy)
    text = str(caught.value)
    for line in (
        "model.safetensors): 5 of 111 tensors",
        "time_mlp_in.bias: missing, expected (48,)",
        "extra.weight: unexpected",
        "action_in_proj.weight: (48, 31) given, expected (48, 32)",
        "action_out_proj.bias: I32 given",
        f"{HEAD}: (1023, 64) F32, but tied to (1024, 64) F32",
    ):
        assert line in text


def test_weights_that_are_not_finite_are_refused(tiny_copy) -> None:
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.time_mlp_in.bias"][3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"time_mlp_in.bias: holds NaN or infinity"):
        load_checkpoint(tiny_copy)


def test_pickles_are_refused_whatever_their_name(tiny_copy) -> None:
    path = tiny_copy / "model.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="pickle"):
        load_checkpoint(tiny_copy)
    path.rename(tiny_copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin may be pickles, which are never loaded"):
        load_checkpoint(tiny_copy)


def test_packed_sites_are_left_to_the_caller(tiny_copy) -> None:
    site = open_checkpoint(tiny_copy).sites()[-5]
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.{site}.weight_scale"] = torch.zeros(3)
    tensors[f"model.{site}.weight"] = torch.zeros(2, 2, dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(InputError):
        load_checkpoint(tiny_copy)
    model = load_checkpoint(tiny_copy, packed_sites=[site]).model
    assert [n for n, p in model.named_parameters() if p.is_meta] == [site + ".weight"]  # a bias is read as ever


def test_a_quantised_checkpoint_is_described_and_not_loaded_as_a_plain_one(tiny_copy, capsys) -> None:
    sites = open_checkpoint(tiny_copy).sites()[-5:-3]
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    for site in sites:
        tensors[f"model.{site}.weight"] = torch.zeros(2, 2, dtype=torch.uint8)
    save_file(tensors, path)
    layers = {f"model.{sites[0]}": {"quant_algo": "FP8"}, sites[1]: {"quant_algo": "NVFP4"}}
    quantised = tiny_copy / "hf_quant_config.json"
    quantised.write_text(json.dumps({"quantization": {"quantized_layers": layers}}))
    assert main(["inspect", str(tiny_copy)]) == 0
    assert "quantised linear layers: 1 in FP8, 1 in NVFP4" in capsys.readouterr().out
    assert main(["verify", str(tiny_copy)]) == 2
    assert "a quantised checkpoint" in capsys.readouterr().err
    quantised.write_text("{}")
    assert main(["inspect", str(tiny_copy)]) == 2


def test_dtypes_and_streaming(tiny) -> None:
    checkpoint = open_checkpoint(tiny)
    for name, tensor in checkpoint.tensors("cpu", torch.bfloat16):
        assert tensor.dtype == (torch.float32 if keeps_float32(name) else torch.bfloat16), name
    assert keeps_float32("time_mlp_in.weight")
    assert not keeps_float32(checkpoint.sites()[3] + ".weight")
    with torch.device("meta"):
        model = Pi05(checkpoint.config)
    assert set(checkpoint.sites()) <= {name for name, _ in model.named_modules()}


def test_half_precision_files(tiny_copy, tiny) -> None:
    path = tiny_copy / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(path).items()}, path)
    error = sampled(load_checkpoint(tiny_copy)) - sampled(load_checkpoint(tiny))
    assert 0 < error.norm() / sampled(load_checkpoint(tiny)).norm() < 0.02


def test_inspect(tiny, tmp_path, statistics, capsys) -> None:
    assert main(["inspect", str(tiny), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["parameters"].values()) == sum(p.numel() for p in load_checkpoint(tiny).model.parameters())
    assert len(found["missing"]) == 3
    config = make_config()
    save_checkpoint(tmp_path, Pi05(config), config, statistics)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for words in ("pi0.5", "front, wrist, side", "quantiles, 5 dimensions", "horizon 6", "no tokenizer"):
        assert words in text
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2


def test_statistics_of_data() -> None:
    data = np.random.default_rng(0).normal(size=(1000, 3))
    found = statistics_of(data)
    assert set(found) == {"mean", "std", "min", "max", "q01", "q10", "q50", "q90", "q99"}
    assert np.allclose(found["q50"], np.median(data, axis=0))


def test_statistics_that_do_not_fit_are_not_written(tmp_path, statistics) -> None:
    config = make_config()
    statistics["action"]["q99"] = statistics["action"]["q99"][:3]
    with pytest.raises(InputError, match=r"q99: 3 values given, expected 5"):
        save_checkpoint(tmp_path, Pi05(config), config, statistics)
