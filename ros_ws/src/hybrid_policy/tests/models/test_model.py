"""The network against a second, slow statement of it, and what training and chunking need of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hybrid_policy.errors import InputError
from hybrid_policy.models.config import PI0_FULL, PI05_FULL, GemmaConfig, Pi05Config, small_config
from hybrid_policy.models.flow import euler, real_time_guidance
from hybrid_policy.models.pi05 import Pi05, keeps_float32


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE as rotation of complex numbers: x [B, S, heads, D], positions [B, S]."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones(1).double(), positions[..., None, None] * frequency)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((z.real, z.imag), -1)


def joint_velocity(model: Pi05, batch, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """openpi's joint pass in float64: both transformers layer by layer, one attention with a block mask."""
    config = model.config
    model = copy.deepcopy(model).double()
    prefix, valid = model.embed_prefix(batch.images.double(), *batch.prefix[1:])
    fraction = torch.linspace(0, 1, config.expert.width // 2).double()
    angle = t.double()[:, None] * 2 * math.pi / (0.004 * 1000**fraction)
    time = torch.cat((angle.sin(), angle.cos()), -1)
    suffix, condition = model.action_in_proj(x.double()), None
    blocks = [0] * prefix.shape[1]
    if config.kind == "pi05":
        condition = F.silu(model.time_mlp_out(F.silu(model.time_mlp_in(time))))
    else:
        both = torch.cat((suffix, time[:, None].expand_as(suffix)), -1)
        suffix = model.action_time_mlp_out(F.silu(model.action_time_mlp_in(both)))
        suffix = torch.cat((model.state_proj(batch.state.double())[:, None], suffix), 1)
        blocks += [1]
    blocks = torch.tensor(blocks + [2] * config.horizon)
    there = F.pad(valid, (0, suffix.shape[1]), value=True)
    allowed = (blocks[None, :] <= blocks[:, None])[None] & there[:, None, :]
    positions = there.cumsum(1) - 1

    def norm(module, h):
        scaled = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if not hasattr(module, "dense"):
            return scaled * (1 + module.weight), 1.0
        scale, shift, gate = module.dense(condition)[:, None].chunk(3, -1)
        return scaled * (1 + scale) + shift, gate

    streams, count = [prefix, suffix], prefix.shape[1]
    for pair in zip(model.prefix.layers, model.expert.layers):
        q, k, v, gates = [], [], [], []
        for layer, h in zip(pair, streams):
            y, gate = norm(layer.input_layernorm, h)
            gates.append(gate)
            for out, projection in zip((q, k, v), ("q_proj", "k_proj", "v_proj")):
                heads = getattr(layer.self_attn, projection)(y)
                out.append(heads.unflatten(-1, (-1, config.prefix.head_dim)))
        places = (positions[:, :count], positions[:, count:])
        keys = torch.cat([rotate(a, p) for a, p in zip(k, places)], 1)
        values = torch.cat(v, 1)
        rows = (allowed[:, :count], allowed[:, count:])
        for i, layer in enumerate(pair):
            groups = q[i].shape[2] // config.prefix.kv_heads
            seen_k, seen_v = keys.repeat_interleave(groups, 2), values.repeat_interleave(groups, 2)
            scores = torch.einsum("bshd,bthd->bhst", rotate(q[i], places[i]), seen_k) / config.prefix.head_dim**0.5
            weights = scores.masked_fill(~rows[i][:, None], -1e30).softmax(-1)
            h = (
                streams[i]
                + layer.self_attn.o_proj(torch.einsum("bhst,bthd->bshd", weights, seen_v).flatten(2)) * gates[i]
            )
            y, gate = norm(layer.post_attention_layernorm, h)
            mlp = layer.mlp
            streams[i] = h + mlp.down_proj(F.gelu(mlp.gate_proj(y), approximate="tanh") * mlp.up_proj(y)) * gate
    return model.action_out_proj(norm(model.expert.norm, streams[1])[0][:, -config.horizon :])


def test_velocity_is_the_joint_pass(small_model, make_batch) -> None:
    batch = make_batch(small_model.config)
    t = torch.tensor([0.7, 0.2])
    cache = small_model.prefix_cache(*small_model.embed_prefix(*batch.prefix), batch.state)
    ours = small_model.velocity(batch.noise, t, cache)
    theirs = joint_velocity(small_model, batch, batch.noise, t)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    cut = small_model.velocity(batch.noise, t, small_model.encode(*batch.prefix, batch.state))
    torch.testing.assert_close(cut, ours, rtol=1e-4, atol=1e-5)


def test_last_prefix_layer_gives_only_keys_and_values(small_model, make_batch) -> None:
    batch = make_batch(small_model.config)
    before = small_model.sample_actions(*batch.prefix, batch.noise, state=batch.state)
    last = small_model.prefix.layers[-1]
    for module in (
        last.self_attn.q_proj,
        last.self_attn.o_proj,
        last.mlp.up_proj,
        last.post_attention_layernorm,
    ):
        torch.nn.init.constant_(module.weight, math.nan)
    torch.nn.init.constant_(small_model.prefix.norm.weight, math.nan)
    assert torch.equal(small_model.sample_actions(*batch.prefix, batch.noise, state=batch.state), before)


def test_an_absent_camera_is_not_seen(small_model, make_batch) -> None:
    batch = make_batch(small_model.config)
    before = small_model.sample_actions(*batch.prefix, batch.noise, state=batch.state)
    batch.images[1, 1] = 0.5
    assert torch.equal(small_model.sample_actions(*batch.prefix, batch.noise, state=batch.state), before)
    batch.images[1, 2] = 0.5
    assert not torch.equal(small_model.sample_actions(*batch.prefix, batch.noise, state=batch.state), before)


def test_uint8_images_are_mapped_to_minus_one_to_one(small_model, make_batch) -> None:
    size = small_model.config.image_size
    pixels = torch.randint(0, 256, (2, 3, size, size, 3), dtype=torch.uint8)
    floats = pixels.float().permute(0, 1, 4, 2, 3) / 255 * 2 - 1
    torch.testing.assert_close(small_model.embed_images(pixels), small_model.embed_images(floats))


def test_one_time_an_action_equals_one_time_a_sample(small_model, make_batch) -> None:
    batch, config = make_batch(small_model.config), small_model.config
    cache = small_model.encode(*batch.prefix, batch.state)
    t = torch.tensor([0.9, 0.4])
    whole = small_model.velocity(batch.noise, t, cache)
    each = t[:, None].expand(2, config.horizon).contiguous()
    torch.testing.assert_close(small_model.velocity(batch.noise, each, cache), whole)
    each[:, 0] = 0.0
    assert not torch.allclose(small_model.velocity(batch.noise, each, cache), whole, atol=1e-4)
    shape = small_model.modulations(each).shape
    sites, width = (config.modulation_sites, 3) if config.kind == "pi05" else (1, 1)
    assert shape == (sites, 2, config.horizon, width * config.expert.width)


def test_given_actions_stay_as_they_are(small_model, make_batch) -> None:
    batch = make_batch(small_model.config)
    given = torch.randn_like(batch.noise)
    arguments = (*batch.prefix, batch.noise)
    actions = small_model.sample_actions(*arguments, state=batch.state, clean=given, clean_count=2)
    assert torch.equal(actions[:, :2], given[:, :2])
    free = small_model.sample_actions(*arguments, state=batch.state)
    assert torch.equal(small_model.sample_actions(*arguments, state=batch.state, clean=given, clean_count=0), free)
    assert not torch.allclose(actions[:, 2:], free[:, 2:], atol=1e-4)


def test_guidance_pulls_towards_the_previous_chunk(small_model, make_batch) -> None:
    batch = make_batch(small_model.config)
    previous = torch.randn_like(batch.noise)
    weights = torch.tensor([1.0, 1.0, 0.5, 0.2, 0.0, 0.0])
    guide = real_time_guidance(previous, weights, beta=5.0)
    free = small_model.sample_actions(*batch.prefix, batch.noise, state=batch.state)
    guided = small_model.sample_actions(*batch.prefix, batch.noise, state=batch.state, guidance=guide)
    near, far = (guided - previous).abs().mean((0, 2)), (free - previous).abs().mean((0, 2))
    assert (near[:2] < 0.5 * far[:2]).all()


def test_guidance_against_its_formula() -> None:
    x, v, y = (torch.full((1, 2, 1), value) for value in (0.5, 2.0, 1.0))
    guide = real_time_guidance(y, torch.tensor([1.0, 0.5]), beta=5.0)
    # t = 0.5: x - t v = -0.5, Y - that = 1.5, strength = min(5, 0.5 / 0.25) = 2
    assert guide(v, x, 0.5).flatten().tolist() == [2.0 - 2 * 1.5, 2.0 - 2 * 0.5 * 1.5]
    assert guide(v, x, 1.0).flatten().tolist() == [2.0 - 5 * 2.5, 2.0 - 5 * 0.5 * 2.5]


def test_euler_follows_a_field_that_is_known() -> None:
    # v = x / t has straight paths to 0 from anywhere: exact in any number of steps
    noise = torch.randn(1, 3, 2)
    for steps in (1, 3, 10):
        times = [1 - k / steps for k in range(steps)]
        assert euler(lambda k, t, x: x / t, noise, times).abs().max() < 1e-6


def test_training_reaches_every_used_parameter(small_model, make_batch) -> None:
    batch, config = make_batch(small_model.config), small_model.config
    cache = small_model.prefix_cache(*small_model.embed_prefix(*batch.prefix), batch.state).repeat(3)
    actions, noise = torch.randn(2, 6, config.horizon, config.max_action_dim)
    t = torch.rand(6)
    loss = small_model.training_loss(cache, actions, noise, t, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert loss.shape == (6, config.horizon)
    assert (loss[2, :2] == 0).all()
    assert (loss[3] > 0).all()
    loss.mean().backward()
    last = f"language_model.layers.{config.prefix.depth - 1}."
    unused = {n for n, p in small_model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    expected = {
        name
        for name, _ in small_model.named_parameters()
        if "language_model.norm" in name
        or (last in name and not any(k in name for k in ("k_proj", "v_proj", "input_layernorm")))
    }
    assert unused == expected


def test_repeat_keeps_rows_together(small_model, make_batch) -> None:
    batch = make_batch(small_model.config)
    cache = small_model.encode(*batch.prefix, batch.state)
    t = torch.tensor([0.3, 0.6])
    one = small_model.velocity(batch.noise, t, cache)
    twice = small_model.velocity(batch.noise.repeat_interleave(2, 0), t.repeat_interleave(2), cache.repeat(2))
    torch.testing.assert_close(twice, one.repeat_interleave(2, 0), rtol=1e-4, atol=1e-6)


def test_full_sizes() -> None:
    with torch.device("meta"):
        pi05, pi0 = Pi05(PI05_FULL), Pi05(PI0_FULL)
    count = sum(p.numel() for p in pi05.parameters())
    assert count == 4_143_404_816 - 257152 * 2048 - 257152 * 1024  # 813 keys less the two heads
    assert PI05_FULL.modulation_sites == 37
    assert PI05_FULL.prefix_tokens == 968
    assert pi0.state_proj.weight.shape == (1024, 32)
    assert pi0.action_time_mlp_in.weight.shape == (1024, 2048)
    kept = sum(p.numel() for n, p in pi05.named_parameters() if keeps_float32(n))
    assert 0.11e9 < kept < 0.13e9


def test_small_config_is_small_and_runs() -> None:
    config = small_config(cameras=("a", "b"), state_dim=14, action_dim=14, vocab_size=512)
    model = Pi05(config)
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 20e6
    images = torch.zeros(1, 2, config.image_size, config.image_size, 3, dtype=torch.uint8)
    tokens = torch.ones(1, config.max_token_len, dtype=torch.int64)
    actions = model.sample_actions(images, None, tokens, torch.tensor([9]), torch.randn(1, 16, 14))
    assert torch.isfinite(actions).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "pi1"}, "expected 'pi05' or 'pi0'"),
        ({"horizon": 0}, "horizon: 0 given"),
        ({"action_dim": 33}, "above max_action_dim"),
        ({"cameras": ()}, "at least one"),
        ({"cameras": ("a", "a")}, "none twice"),
        ({"expert": GemmaConfig(1024, 18, 4096, 8, 1, 128)}, "head_dim is 256 and expert.head_dim is 128"),
        ({"min_period": 5.0}, "0 < min < max"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, words) -> None:
    with pytest.raises(InputError, match=words):
        Pi05Config().replace(**change)


def test_heads_must_divide() -> None:
    with pytest.raises(InputError, match="no multiple of kv_heads"):
        GemmaConfig(64, 2, 64, 6, 4, 16)
    with pytest.raises(InputError, match="odd"):
        GemmaConfig(64, 2, 64, 4, 1, 15)
