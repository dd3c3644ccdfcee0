import json

import numpy as np
import pytest
import torch
from hybrid_policy.cli import main
from hybrid_policy.errors import InputError
from hybrid_policy.models.config import small_config
from hybrid_policy.models.tensor_files import TensorStore
from hybrid_policy.runtime.calibration import read_observations, write_observation
from hybrid_policy.runtime.engine import Engine
from hybrid_policy.runtime.quantized_checkpoint import quantised_sites, read_packed, read_recipe
from hybrid_policy.runtime.random_policy import random_checkpoint

from .test_engine import observation

JOINTS = 6
LAYER = "paligemma_with_expert.gemma_expert.model.layers.0."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return random_checkpoint(
        tmp_path_factory.mktemp("source"),
        cameras=("base_0_rgb", "right_wrist_0_rgb"),
        state_range=[(-1.5, 1.5)] * JOINTS,
        action_range=[(-1.0, 1.0)] * JOINTS,
        config=small_config(
            cameras=("base_0_rgb", "right_wrist_0_rgb"), state_dim=JOINTS, action_dim=JOINTS, vocab_size=512,
            image_size=28, max_token_len=160, width=64, depth=3, num_steps=2,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def quantised(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantised") / "seed"
    assert main(["quantize", str(source), "seed", str(out), "--device", "cpu"]) == 0
    return out


def test_layers_and_tensors_are_modelopts(quantised):
    config = json.loads((quantised / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"][LAYER + "mlp.gate_proj"] == {
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
    }
    assert config["quantized_layers"][LAYER + "mlp.down_proj"] == {"quant_algo": "FP8"}
    assert LAYER + "self_attn.q_proj" not in config["quantized_layers"]
    store = TensorStore.open(quantised)
    weight = store.read(LAYER + "mlp.gate_proj.weight")
    assert weight.dtype == torch.uint8
    rows, half = weight.shape
    scale = store.read(LAYER + "mlp.gate_proj.weight_scale")
    assert (scale.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, (rows, half * 2 // 16))
    shared = [store.read(f"{LAYER}mlp.{leaf}.weight_scale_2") for leaf in ("gate_proj", "up_proj")]
    assert torch.equal(*shared)
    assert shared[0].dtype == torch.float32
    assert store.read(LAYER + "mlp.down_proj.weight").dtype == torch.float8_e4m3fn


def test_quantised_checkpoint_runs_by_its_own_recipe(source, quantised):
    engine = Engine.from_checkpoint(quantised, None, "cpu")
    assert engine.recipe.name == "seed"
    noise = engine.noise()
    direct = Engine.from_checkpoint(source, "seed", "cpu").infer(observation(), noise).normalised
    read = engine.infer(observation(), noise).normalised
    # the same packed sites; what is not quantised was rounded to bf16 on the way
    assert np.linalg.norm(read - direct) / np.linalg.norm(direct) < 2e-2


def test_sites_with_a_bias(source, tmp_path):
    recipe = tmp_path / "vision.yaml"
    recipe.write_text("include: bf16\nsites: {'*vision_tower*': fp8_w8a8}\n")
    assert main(["quantize", str(source), str(recipe), str(tmp_path / "out"), "--device", "cpu"]) == 0
    ours = Engine.from_checkpoint(tmp_path / "out", None, "cpu", seed=3).infer(observation()).normalised
    direct = Engine.from_checkpoint(source, recipe, "cpu", seed=3).infer(observation()).normalised
    assert np.linalg.norm(ours - direct) < 2e-2 * np.linalg.norm(direct)


def test_packed_bits_are_those_of_direct_packing(source, quantised):
    from hybrid_policy.models.checkpoint import open_checkpoint
    from hybrid_policy.runtime.sites import pack

    site = LAYER + "mlp.down_proj"
    weight = open_checkpoint(source).tensor(site + ".weight", "cpu", torch.float32)
    packed, _ = read_packed(TensorStore.open(quantised), quantised_sites(quantised), torch.device("cpu"))
    expected = pack(weight, "fp8_w8a8")
    assert torch.equal(packed[site].values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(packed[site].scale, expected.scale)


def test_recipe_without_its_file(quantised, tmp_path):
    (tmp_path / "hf_quant_config.json").write_text((quantised / "hf_quant_config.json").read_text())
    recipe = read_recipe(tmp_path)
    assert dict((rule.pattern, rule.precision) for rule in recipe.rules)[LAYER + "mlp.gate_proj"] == "nvfp4_w4a16"


def test_another_recipe_on_a_quantised_checkpoint_is_refused(quantised):
    with pytest.raises(InputError, match="the recipe wants fp8_w8a8"):
        Engine.from_checkpoint(quantised, "fp8", "cpu")


def test_static_calibration(source, tmp_path):
    folder = tmp_path / "observations"
    folder.mkdir()
    for i in range(3):
        write_observation(folder / f"{i}.npz", observation(i))
    assert len(list(read_observations(folder, 2))) == 2
    out = tmp_path / "static"
    arguments = [
        "quantize",
        str(source),
        "seed",
        str(out),
        "--device",
        "cpu",
        "--calibrate",
        str(folder),
        "--static",
    ]
    assert main(arguments) == 0
    _, scales = read_packed(TensorStore.open(out), quantised_sites(out), torch.device("cpu"))
    assert set(scales) <= {s for s, p in quantised_sites(out).items() if p == "fp8_w8a8"}
    assert scales[LAYER + "mlp.down_proj"] > 0
    engine = Engine.from_checkpoint(out, None, "cpu")
    assert np.isfinite(engine.infer(observation()).actions).all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quant_algo": "INT4"}, "MIXED_PRECISION"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "AWQ"}}}, "AWQ"),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers"),
    ],
)
def test_other_quantisations_are_refused(tmp_path, change, expected):
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": change}))
    with pytest.raises(InputError, match=expected):
        quantised_sites(tmp_path)


def test_missing_packed_tensors_are_listed(quantised):
    wanted = {"nowhere.to.be.found": "nvfp4_w4a16", **quantised_sites(quantised)}
    with pytest.raises(InputError, match=r"nowhere\.to\.be\.found\.weight_scale_2: missing"):
        read_packed(TensorStore.open(quantised), wanted, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--static"], "expected observations to calibrate on"),
        (["--calibrate", "nowhere"], "no observations"),
    ],
)
def test_command_mistakes(source, tmp_path, capsys, arguments, expected):
    code = main(["quantize", str(source), "seed", str(tmp_path / "out"), "--device", "cpu", *arguments])
    assert code == 2
    assert expected in capsys.readouterr().err


def test_command_refuses_a_full_folder_and_a_second_quantisation(source, quantised, capsys, tmp_path):
    assert main(["quantize", str(source), "seed", str(quantised), "--device", "cpu"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["quantize", str(quantised), "seed", str(tmp_path / "x"), "--device", "cpu"]) == 2
    assert "quantised already" in capsys.readouterr().err
