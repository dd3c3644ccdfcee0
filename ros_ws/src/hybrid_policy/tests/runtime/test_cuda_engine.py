"""The engine on a GPU: golden cases, bit-identical replays, nothing allocated, real-time chunking."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hybrid_policy.runtime.backend import Guidance
from hybrid_policy.runtime.engine import Engine
from hybrid_policy.runtime.rtc import RealTimeChunking

from .golden import CASES, GOLDEN, golden_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OFF = RealTimeChunking("off")


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def engine(recipe="bf16", rtc=OFF, **options):
    return Engine.from_checkpoint(GOLDEN, recipe, "cuda", rtc=rtc, float_images=True, **options)


@pytest.fixture(scope="module")
def bf16():
    return engine()


@pytest.mark.parametrize("case", CASES)
def test_golden_in_bf16(bf16, case):
    inputs, noise, actions = golden_case(case)
    result, stages = bf16.run(inputs, noise)
    assert relative(result[:, :7], actions) < 2e-2
    assert set(stages) == {"vision", "prefix", "denoise"}


@pytest.mark.parametrize("table", ["plain", "expert=split", "pdl=off", ""])
def test_every_stage_table_gives_the_golden_actions(monkeypatch, table):
    monkeypatch.setenv("HYBRID_POLICY_STAGES", table)
    inputs, noise, actions = golden_case(0)
    assert relative(engine().run(inputs, noise)[0][:, :7], actions) < 2e-2


@pytest.mark.parametrize("recipe", ["fp8", "seed"])
def test_recipes_agree_with_the_cpu_reference(recipe):
    inputs, noise, actions = golden_case(0)
    expected, _ = Engine.from_checkpoint(GOLDEN, recipe, "cpu", rtc=OFF).run(inputs, noise)
    result, _ = engine(recipe).run(inputs, noise)
    assert relative(result, expected) < 4e-2
    assert relative(result[:, :7], actions) < 0.15


def test_replays_are_bit_identical(bf16):
    inputs, noise, _ = golden_case(0)
    first = bf16.run(inputs, noise)[0]
    for _ in range(20):
        np.testing.assert_array_equal(bf16.run(inputs, noise)[0], first)


def test_prompt_lengths_do_not_leak_into_each_other(bf16):
    results = {}
    for _ in range(2):
        for case in CASES:
            inputs, noise, _ = golden_case(case)
            result = bf16.run(inputs, noise)[0]
            np.testing.assert_array_equal(results.setdefault(case, result), result)


def test_one_graph_and_three_give_the_same_bits(bf16):
    inputs, noise, _ = golden_case(1)
    one, stages = engine(timing=False).run(inputs, noise)
    np.testing.assert_array_equal(one, bf16.run(inputs, noise)[0])
    assert stages == {}


def test_any_stream_and_thread_gives_the_same_bits(bf16):
    inputs, noise, _ = golden_case(0)
    results = [bf16.run(inputs, noise)[0]]
    with torch.cuda.stream(torch.cuda.Stream()):
        results.append(bf16.run(inputs, noise)[0])
    with ThreadPoolExecutor(1) as pool:
        results.append(pool.submit(lambda: bf16.run(inputs, noise)[0]).result())
    assert all(np.array_equal(results[0], other) for other in results)


def test_nothing_is_allocated_after_the_first_call(bf16):
    inputs, noise, _ = golden_case(0)
    bf16.run(inputs, noise)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for case in CASES:
        bf16.run(*golden_case(case)[:2])
    after = torch.cuda.memory_stats()
    for key in ("allocation.all.allocated", "segment.all.allocated", "num_device_alloc"):
        assert after.get(key, 0) == before.get(key, 0), key


def test_an_absent_view_is_left_out(bf16):
    inputs, noise, _ = golden_case(0)
    one = type(inputs)(**{**vars(inputs), "image_mask": np.array([True, False])})
    expected, _ = Engine.from_checkpoint(GOLDEN, "float32", "cpu", rtc=OFF).run(one, noise)
    assert relative(bf16.run(one, noise)[0], expected) < 2e-2


@pytest.mark.parametrize("mode", ["guided", "prior_corrected", "prefix"])
def test_real_time_chunking_agrees_with_the_cpu(mode):
    rtc = RealTimeChunking(mode)
    inputs, noise, _ = golden_case(1)
    target = np.random.default_rng(0).standard_normal(noise.shape).astype(np.float32)
    weights = np.linspace(1, 0, len(noise), dtype=np.float32)
    guidance = Guidance(target, weights, 0) if mode != "prefix" else Guidance(target, 0 * weights, 5)
    expected, _ = Engine.from_checkpoint(GOLDEN, "float32", "cpu", rtc=rtc).run(inputs, noise, guidance)
    on_device = engine(rtc=rtc)
    assert relative(on_device.run(inputs, noise, guidance)[0], expected) < 2e-2
    free, _ = Engine.from_checkpoint(GOLDEN, "float32", "cpu", rtc=rtc).run(inputs, noise)
    assert relative(on_device.run(inputs, noise)[0], free) < 2e-2
    assert relative(expected, free) > 0.05


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A policy small enough for the CPU whose sizes the full model's kernels take."""
    from hybrid_policy.models.config import GemmaConfig, Pi05Config, VisionConfig
    from hybrid_policy.runtime.random_policy import random_checkpoint

    config = Pi05Config(
        vision=VisionConfig(width=128, depth=2, mlp_dim=256, heads=2, patch=14),
        prefix=GemmaConfig(512, 3, 1024, 4, 1, 256),
        expert=GemmaConfig(512, 3, 1024, 4, 1, 256),
        vocab_size=512,
        image_size=56,
        cameras=("a", "b"),
        horizon=50,
        max_token_len=64,
        num_steps=4,
    )
    return random_checkpoint(
        tmp_path_factory.mktemp("middle"),
        cameras=("a", "b"),
        state_range=[(-1, 1)] * 32,
        action_range=[(-1, 1)] * 32,
        config=config,
    )


@pytest.mark.parametrize("recipe", ["bf16", "seed", "fp8", "h100", "hybrid"])
@pytest.mark.parametrize(
    "table", ["", "expert=fused", "expert=split", "gate_up=library", "qkv=library", "vision_norm=apart"]
)
def test_expert_kernels_agree_with_the_cpu_reference(middle, monkeypatch, recipe, table):
    from hybrid_policy.models.processors import ModelInputs

    monkeypatch.setenv("HYBRID_POLICY_STAGES", table)
    random = np.random.default_rng(0)
    inputs = ModelInputs(
        images=random.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8),
        image_mask=np.ones(2, np.bool_),
        tokens=random.integers(1, 256, 64),
        token_count=37,
        state=np.zeros(32, np.float32),
        prompt="",
    )
    noise = random.standard_normal((50, 32), dtype=np.float32)
    expected, _ = Engine.from_checkpoint(middle, recipe, "cpu", rtc=OFF).run(inputs, noise)
    on_device = Engine.from_checkpoint(middle, recipe, "cuda", rtc=OFF)
    if table == "":
        assert "expert cluster" in on_device.description
        if torch.cuda.get_device_capability() == (9, 0):
            for choice in ("vision_norm out", "gate_up hopper", "qkv hopper"):
                assert choice in on_device.description
    result, _ = on_device.run(inputs, noise)
    assert relative(result, expected) < (1e-2 if recipe == "bf16" else 4e-2)
    np.testing.assert_array_equal(on_device.run(inputs, noise)[0], result)


@pytest.mark.parametrize("table", ["", "qkv=library"])
def test_the_prefix_cache_in_fp8(middle, monkeypatch, table):
    import dataclasses

    from hybrid_policy.models.processors import ModelInputs
    from hybrid_policy.runtime.recipe import load_recipe

    monkeypatch.setenv("HYBRID_POLICY_STAGES", table)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    tokens = random.integers(1, 256, 64)
    inputs = ModelInputs(images, np.ones(2, np.bool_), tokens, 37, np.zeros(32, np.float32), "")
    noise = random.standard_normal((50, 32), dtype=np.float32)
    recipe = dataclasses.replace(load_recipe("bf16"), prefix_cache="fp8")
    on_device = Engine.from_checkpoint(middle, recipe, "cuda", rtc=OFF)
    assert "expert fused" in on_device.description
    assert "prefix_attention kernel" in on_device.description
    if torch.cuda.get_device_capability() == (9, 0):
        assert (table or "qkv=hopper").replace("=", " ") in on_device.description
    exact, _ = Engine.from_checkpoint(middle, "float32", "cpu", rtc=OFF).run(inputs, noise)
    result, _ = on_device.run(inputs, noise)
    assert 1e-4 < relative(result, exact) < 6e-2
    np.testing.assert_array_equal(on_device.run(inputs, noise)[0], result)
