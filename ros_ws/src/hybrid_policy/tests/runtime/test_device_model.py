"""The device's sequence of launches, in plain PyTorch on a CPU, against the model."""

import dataclasses

import numpy as np
import pytest
import torch
from hybrid_policy.kernels.down_product import down_reference
from hybrid_policy.kernels.flow_step import Guide
from hybrid_policy.kernels.gate_up_product import gate_up_reference
from hybrid_policy.kernels.norm_product import norm_product_reference
from hybrid_policy.kernels.qkv_product import qkv_product_reference
from hybrid_policy.models.checkpoint import open_checkpoint
from hybrid_policy.runtime import device_model
from hybrid_policy.runtime.backend import Guidance
from hybrid_policy.runtime.device_model import DeviceModel, Inputs
from hybrid_policy.runtime.device_weights import build_weights
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.sites import model_sites
from hybrid_policy.runtime.stages import plain_table

from .golden import CASES, GOLDEN, golden_case


def build(recipe="bf16", rtc=None, views=2):
    checkpoint = open_checkpoint(GOLDEN)
    precisions = load_recipe(recipe).assign(model_sites(checkpoint.config))

    def source(name):
        return checkpoint.tensor(name, "cpu", torch.float32)

    if recipe == "bf16":  # float32 weights through the bf16 route: the launches alone are under test
        precisions = dict.fromkeys(precisions, "float32")
    weights = build_weights(checkpoint.config, source, precisions, dtype=torch.float32, expert="split")
    return DeviceModel(weights, plain_table(), rtc or RealTimeChunking("off"), torch.float32, views)


def inputs_of(model, inputs, noise, guidance=None, views=2):
    config = model.config
    seen = views * config.image_tokens
    rows = torch.zeros(model.max_rows, dtype=torch.int64)
    rows[: seen + inputs.token_count] = torch.arange(seen + inputs.token_count)
    guidance = guidance or Guidance(np.zeros_like(noise), np.zeros(len(noise), np.float32))
    return Inputs(
        images=torch.from_numpy(inputs.images),
        tokens=torch.from_numpy(inputs.tokens),
        rows=rows,
        valid=torch.tensor([seen + inputs.token_count], dtype=torch.int32),
        noise=torch.from_numpy(noise),
        guide=Guide(
            torch.from_numpy(guidance.target),
            torch.from_numpy(guidance.weights),
            torch.tensor([guidance.clean], dtype=torch.int32),
        ),
    )


def run(model, inputs, rows=None):
    with torch.inference_mode():
        model.run_vision(inputs)
        model.run_prefix(inputs, rows or model.max_rows)
        model.run_denoise(inputs)
    return model.x.numpy().copy()


@pytest.mark.parametrize("case", CASES)
def test_golden_through_the_launches(case):
    inputs, noise, actions = golden_case(case)
    model = build()
    result = run(model, inputs_of(model, inputs, noise))
    np.testing.assert_allclose(result[:, :7], actions, atol=1e-4)


def test_fewer_rows_give_the_same(monkeypatch):
    inputs, noise, actions = golden_case(2)  # 20 of 24 tokens are padding
    model = build()
    rows = 2 * model.config.image_tokens + inputs.token_count
    np.testing.assert_allclose(run(model, inputs_of(model, inputs, noise), rows)[:, :7], actions, atol=1e-4)


@pytest.mark.parametrize("vision", ["bf16", "fp8_w8a8"])
def test_fp8_launches_agree_with_the_fp8_sites(vision, tmp_path):
    from hybrid_policy.runtime.engine import Engine

    inputs, noise, _ = golden_case(0)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"include: fp8\nsites: {{'*vision_tower*': {vision}}}\n")
    model = build(recipe)
    expected, _ = Engine.from_checkpoint(GOLDEN, recipe, "cpu").run(inputs, noise)
    result = run(model, inputs_of(model, inputs, noise))
    error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
    assert error < 2e-2  # the same arithmetic; roundings of activations fall differently


def norm_product_on_the_cpu(a, weight, scale, x, norm, bias, *, pdl=False):
    """What norm_product.py makes of its arguments."""
    total, normed = norm_product_reference(a, weight, scale, x, norm, bias)
    x.copy_(total)
    assert normed.abs().amax() <= 448
    return normed.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("vision", "together"),
    [({"": "fp8_w8a8"}, True), ({"": "bf16"}, False), ({"": "fp8_w8a8", ".mlp": "bf16"}, False)],
)
def test_vision_norms_in_the_launch_before(vision, together, tmp_path, monkeypatch):
    calls = []
    own = lambda *a, **k: calls.append(1) or norm_product_on_the_cpu(*a, **k)  # noqa: E731
    monkeypatch.setattr(device_model, "norm_product", own)
    recipe = tmp_path / "mine.yaml"
    sites = ", ".join(f"'*vision_tower*{part}*': {precision}" for part, precision in vision.items())
    recipe.write_text(f"include: fp8\nsites: {{{sites}}}\n")
    inputs, noise, _ = golden_case(0)
    model = build(recipe)
    given = inputs_of(model, inputs, noise)
    with torch.inference_mode():
        model.run_vision(given)
    expected, stream = model.features.clone(), model.vision_x.clone()
    assert not calls
    model.table = dataclasses.replace(model.table, vision_norm="out")
    with torch.inference_mode():
        model.run_vision(given)
    assert len(calls) == (len(model.weights.vision) if together else 0)
    for ours, theirs in ((model.features, expected), (model.vision_x, stream)):
        # the same arithmetic; a value here and there rounds to its neighbour
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def gate_up_on_the_cpu(x, weight, *, row_scale=None, squares=None, out_scale=None, out_factor=1.0, pdl=False, **scale):
    """What gate_up_product.py makes of its arguments."""
    result = gate_up_reference(x, weight, row_scale=row_scale, **scale)
    if x.dtype != torch.float8_e4m3fn:
        return result.to(x.dtype)
    out_scale.copy_(squares * out_factor)
    scaled = result / out_scale[:, None]
    assert scaled.abs().amax() <= 448
    return scaled.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("recipe", "down", "taken"), [("bf16", None, True), ("fp8", None, True), ("fp8", "bf16", False)]
)
def test_gate_and_up_in_one_launch(recipe, down, taken, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(device_model, "gate_up_product", lambda *a, **k: calls.append(1) or gate_up_on_the_cpu(*a, **k))
    if down is not None:
        mine = tmp_path / "mine.yaml"
        mine.write_text(f"include: {recipe}\nsites: {{'*language_model*down_proj': {down}}}\n")
        recipe = mine
    inputs, noise, _ = golden_case(0)
    model = build(recipe)
    expected = run(model, inputs_of(model, inputs, noise))
    model.table = dataclasses.replace(model.table, gate_up="hopper")
    assert not calls
    result = run(model, inputs_of(model, inputs, noise))
    assert len(calls) == (len(model.weights.prefix) - 1 if taken else 0)
    error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
    assert error < (1e-4 if recipe == "bf16" else 2e-2)  # other roundings of the activations


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_q_k_v_in_one_launch(recipe, monkeypatch):
    calls = []

    def qkv(*args, pdl, **options):
        calls.append(1)
        qkv_product_reference(*args, **options)

    monkeypatch.setattr(device_model, "qkv_product", qkv)
    inputs, noise, _ = golden_case(0)
    model = build(recipe)
    expected = run(model, inputs_of(model, inputs, noise))
    assert not calls
    model.table = dataclasses.replace(model.table, qkv="hopper")
    result = run(model, inputs_of(model, inputs, noise))
    assert len(calls) == len(model.weights.prefix)
    error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
    assert error < (1e-4 if recipe == "bf16" else 2e-2)  # other roundings of the activations


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
@pytest.mark.parametrize("gate_up", ["library", "hopper"])
def test_down_in_pairs(recipe, gate_up, monkeypatch):
    calls = []

    def down(x, weight, scale, *, pdl):
        calls.append(1)
        return down_reference(x, weight, scale).float()

    monkeypatch.setattr(device_model, "down_product", down)
    monkeypatch.setattr(device_model, "gate_up_product", gate_up_on_the_cpu)
    inputs, noise, _ = golden_case(0)
    model = build(recipe)
    model.table = dataclasses.replace(model.table, gate_up=gate_up)
    expected = run(model, inputs_of(model, inputs, noise))
    monkeypatch.setattr(device_model, "pays_in_pairs", lambda dtype, m, *_: m != len(noise))
    assert not calls
    model.table = dataclasses.replace(model.table, down="hopper")
    result = run(model, inputs_of(model, inputs, noise))
    assert len(calls) == len(model.weights.prefix) - 1
    error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
    assert error < (1e-4 if recipe == "bf16" else 2e-2)  # other roundings of the activations


@pytest.mark.parametrize("mode", ["guided", "prior_corrected", "prefix"])
def test_real_time_chunking_through_the_launches(mode):
    from hybrid_policy.runtime.engine import Engine

    rtc = RealTimeChunking(mode)
    inputs, noise, _ = golden_case(1)
    target = np.random.default_rng(0).standard_normal(noise.shape).astype(np.float32)
    weights = np.linspace(1, 0, len(noise), dtype=np.float32)
    guidance = Guidance(target, weights, 0) if mode != "prefix" else Guidance(target, 0 * weights, 5)
    model = build(rtc=rtc)
    expected, _ = Engine.from_checkpoint(GOLDEN, "float32", "cpu", rtc=rtc).run(inputs, noise, guidance)
    result = run(model, inputs_of(model, inputs, noise, guidance))
    np.testing.assert_allclose(result, expected, atol=2e-4)
    if mode == "prefix":
        np.testing.assert_array_equal(result[:5], target[:5])
