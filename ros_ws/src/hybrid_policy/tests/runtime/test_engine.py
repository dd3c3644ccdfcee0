import numpy as np
import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import Continuation, Observation
from hybrid_policy.runtime.engine import STAGES, Engine
from hybrid_policy.runtime.random_policy import random_checkpoint
from hybrid_policy.runtime.rtc import RealTimeChunking

from .golden import CASES, GOLDEN, golden_case

HORIZON, JOINTS = 16, 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(
        tmp_path_factory.mktemp("policy"),
        cameras=("base_0_rgb", "right_wrist_0_rgb"),
        state_range=[(-1.5, 1.5)] * JOINTS,
        action_range=[(-1.0, 1.0)] * JOINTS,
        horizon=HORIZON,
        num_steps=4,
    )


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine.from_checkpoint(checkpoint, "float32", "cpu", seed=1)


def observation(seed=0, cameras=("base_0_rgb", "right_wrist_0_rgb")):
    random = np.random.default_rng(seed)
    images = {name: random.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in cameras}
    state = random.uniform(-1, 1, JOINTS).astype(np.float32)
    return Observation(images, state, "pick up the red cube", {"joints": 123})


@pytest.mark.parametrize("case", CASES)
def test_golden_on_cpu(case):
    inputs, noise, actions = golden_case(case)
    normalised, _ = Engine.from_checkpoint(GOLDEN, "float32", "cpu").run(inputs, noise)
    np.testing.assert_allclose(normalised[:, :7], actions, atol=1e-4)


@pytest.mark.parametrize(("recipe", "bound"), [("bf16", 2e-2), ("fp8", 0.1), ("seed", 0.15), ("w4a4", 0.25)])
def test_golden_by_recipe(recipe, bound):
    inputs, noise, actions = golden_case(0)
    normalised, _ = Engine.from_checkpoint(GOLDEN, recipe, "cpu").run(inputs, noise)
    error = np.linalg.norm(normalised[:, :7] - actions) / np.linalg.norm(actions)
    assert 1e-5 < error < bound  # each recipe does something, and not too much


def test_chunk(engine):
    chunk = engine.infer(observation())
    assert chunk.actions.shape == (HORIZON, JOINTS)
    assert chunk.actions.dtype == np.float32
    assert chunk.normalised.shape == (HORIZON, engine.spec.max_action_dim)
    assert chunk.stamp == 123
    assert tuple(chunk.timings) == STAGES
    assert all(v >= 0 for v in chunk.timings.values())


def test_same_noise_same_bits_other_noise_other_chunk(engine):
    noise = engine.noise()
    first, second = engine.infer(observation(), noise), engine.infer(observation(), noise)
    np.testing.assert_array_equal(first.normalised, second.normalised)
    assert np.abs(engine.infer(observation()).normalised - first.normalised).max() > 1e-3


def test_absent_camera_counts_for_nothing(engine):
    one = observation(cameras=("base_0_rgb",))
    assert np.isfinite(engine.infer(one).actions).all()
    noise = engine.noise()
    assert np.abs(engine.infer(one, noise).normalised - engine.infer(observation(), noise).normalised).max() > 0


def test_guidance_draws_the_chunk_to_the_previous_one(checkpoint):
    engine = Engine.from_checkpoint(checkpoint, "float32", "cpu", seed=1)
    previous = engine.infer(observation(0), engine.noise()).normalised
    noise = engine.noise()
    consumed, delay = 5, 3
    continuation = Continuation(previous, consumed, delay)
    free = engine.infer(observation(1), noise).normalised
    held = engine.infer(observation(1), noise, continuation).normalised
    target = previous[consumed:]

    def distance(chunk):
        return np.abs(chunk[:delay] - target[:delay]).mean()

    assert distance(held) < 0.5 * distance(free)
    prior = Engine.from_checkpoint(
        checkpoint, "float32", "cpu", rtc=RealTimeChunking("prior_corrected", beta=4, prior_std=0.2)
    )
    assert distance(prior.infer(observation(1), noise, continuation).normalised) < distance(free)
    off = Engine.from_checkpoint(checkpoint, "float32", "cpu", rtc=RealTimeChunking("off"))
    np.testing.assert_array_equal(off.infer(observation(1), noise, continuation).normalised, free)


def test_clean_prefix_is_kept_exactly(checkpoint):
    engine = Engine.from_checkpoint(checkpoint, "float32", "cpu", rtc=RealTimeChunking("prefix"))
    previous = engine.infer(observation(0)).normalised
    chunk = engine.infer(observation(1), None, Continuation(previous, 5, 3)).normalised
    np.testing.assert_array_equal(chunk[:3], previous[5:8])
    assert np.abs(chunk[3:6] - previous[8:11]).max() > 1e-3


def test_clean_prefix_agrees_with_the_model(checkpoint):
    from hybrid_policy.models.checkpoint import load_checkpoint

    engine = Engine.from_checkpoint(checkpoint, "float32", "cpu", rtc=RealTimeChunking("prefix"))
    policy = load_checkpoint(checkpoint)
    previous = engine.infer(observation(0)).normalised
    noise = engine.noise()
    inputs = policy.processors.prepare(observation(1))
    target = np.zeros_like(previous)
    target[: HORIZON - 5] = previous[5:]
    expected = policy.model.sample_actions(
        torch.from_numpy(inputs.images)[None],
        torch.from_numpy(inputs.image_mask)[None],
        torch.from_numpy(inputs.tokens)[None],
        torch.tensor([inputs.token_count]),
        torch.from_numpy(noise)[None],
        clean=torch.from_numpy(target)[None],
        clean_count=3,
    )
    chunk = engine.infer(observation(1), noise, Continuation(previous, 5, 3)).normalised
    np.testing.assert_allclose(chunk, expected[0].numpy(), atol=1e-5)


def test_mistakes_are_named(checkpoint, engine):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="sees no CUDA device"):
            Engine.from_checkpoint(checkpoint, "bf16", "cuda")
    with pytest.raises(InputError, match="auto, cpu or cuda"):
        Engine.from_checkpoint(checkpoint, "bf16", "tpu")
    with pytest.raises(InputError, match="float32"):
        engine.infer(observation(), np.zeros((3, 2), np.float32))
    with pytest.raises(InputError, match="no such file"):
        Engine.from_checkpoint(checkpoint, "nonsense", "cpu")
