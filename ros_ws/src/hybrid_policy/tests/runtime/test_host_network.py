"""The CPU's network against the plain model that it is built from."""

import copy

import numpy as np
import pytest
import torch
from hybrid_policy.models.config import GemmaConfig, Pi05Config, VisionConfig
from hybrid_policy.models.pi05 import EXPERT, PREFIX, VISION, Pi05
from hybrid_policy.models.processors import ModelInputs
from hybrid_policy.runtime import host_blas
from hybrid_policy.runtime.backend import Guidance
from hybrid_policy.runtime.reference_backend import ReferenceBackend
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.sites import pack_sites, swap_sites

HORIZON, ACTIONS = 6, 5


def config(kind="pi05", kv_heads=1, head_dim=16, cameras=2):
    return Pi05Config(
        kind=kind,
        vision=VisionConfig(width=48, depth=2, mlp_dim=64, heads=3, patch=14),
        prefix=GemmaConfig(width=64, depth=3, mlp_dim=96, heads=4, kv_heads=kv_heads, head_dim=head_dim),
        expert=GemmaConfig(width=32, depth=3, mlp_dim=80, heads=4, kv_heads=kv_heads, head_dim=head_dim),
        vocab_size=50,
        image_size=45,  # no multiple of the patch
        cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")[:cameras],
        max_action_dim=ACTIONS,
        action_dim=ACTIONS,
        max_state_dim=4,
        state_dim=4,
        horizon=HORIZON,
        max_token_len=9,
        num_steps=3,
        state_in_prompt=kind == "pi05",
    )


def drawn(shape: Pi05Config, seed: int = 0) -> Pi05:
    """A model of which every parameter matters."""
    torch.manual_seed(seed)
    model = Pi05(shape).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.normal_(std=0.02 if "position" in name else spread)
    return model


def inputs(shape: Pi05Config, absent: tuple[int, ...] = (), words: int = 7) -> ModelInputs:
    random = np.random.default_rng(4)
    views, size = len(shape.cameras), shape.image_size
    mask = np.array([i not in absent for i in range(views)])
    return ModelInputs(
        images=random.integers(0, 256, (views, size, size, 3), dtype=np.uint8),
        image_mask=mask,
        tokens=np.pad(random.integers(0, 50, words), (0, shape.max_token_len - words)),
        token_count=words,
        state=random.standard_normal(4).astype(np.float32),
        prompt="",
    )


def noise() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((HORIZON, ACTIONS), dtype=np.float32)


def expected(model: Pi05, given: ModelInputs, **more) -> np.ndarray:
    """What the plain model says."""
    actions = model.sample_actions(
        torch.from_numpy(given.images)[None],
        torch.from_numpy(given.image_mask)[None],
        torch.from_numpy(given.tokens)[None],
        torch.tensor([given.token_count]),
        torch.from_numpy(noise())[None],
        state=torch.from_numpy(given.state)[None] if model.config.kind == "pi0" else None,
        **more,
    )
    return actions[0].numpy()


def backend(model: Pi05, mode="off") -> ReferenceBackend:
    return ReferenceBackend(copy.deepcopy(model), RealTimeChunking(mode), "test")


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("kind", ["pi05", "pi0"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 16), (2, 16), (4, 10)])
def test_it_is_the_model(kind, kv_heads, head_dim, numpy, monkeypatch):
    monkeypatch.setattr(host_blas, "by_numpy", lambda: numpy)
    shape = config(kind, kv_heads, head_dim)
    model = drawn(shape)
    ours = backend(model)
    for given in (inputs(shape), inputs(shape, absent=(0,)), inputs(shape, words=1), inputs(shape, words=9)):
        wanted = expected(model, given)
        assert np.abs(wanted - noise()).mean() > 0.1  # the flow moves
        np.testing.assert_allclose(ours.run(given, noise(), None)[0], wanted, atol=3e-6)
    first = ours.run(inputs(shape), noise(), None)[0]  # nothing of the others is left
    np.testing.assert_array_equal(first, backend(model).run(inputs(shape), noise(), None)[0])


def test_a_clean_prefix_is_the_model_s():
    shape = config()
    model = drawn(shape)
    target = np.random.default_rng(6).standard_normal((HORIZON, ACTIONS)).astype(np.float32)
    wanted = expected(model, inputs(shape), clean=torch.from_numpy(target)[None], clean_count=2)
    guidance = Guidance(target, np.zeros(HORIZON, np.float32), 2)
    got = backend(model, "prefix").run(inputs(shape), noise(), guidance)[0]
    np.testing.assert_allclose(got, wanted, atol=3e-6)
    np.testing.assert_array_equal(got[:2], target[:2])


_MIXED = {
    "q_proj": "fp8_w8a8",
    "v_proj": "nvfp4_w4a4",
    "gate_proj": "fp8_w8a8",
    "up_proj": "nvfp4_w4a4",
    "fc2": "fp8_w8a8",
}
_RECIPES = {
    "w8a8": lambda site: "fp8_w8a8",
    "w4a4": lambda site: "nvfp4_w4a4",
    "w4a16": lambda site: "nvfp4_w4a16",
    "mixed": lambda site: _MIXED.get(site.rpartition(".")[2], "bf16"),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", _RECIPES)
def test_sites_round_as_in_the_model(name, static):
    shape = config(head_dim=16)
    model = drawn(shape)
    sites = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith((PREFIX, EXPERT, VISION)) and not n.endswith("dense")
    ]
    precisions = {site: _RECIPES[name](site) for site in sites}
    scales = {site: torch.tensor(0.01 + 0.001 * i) for i, site in enumerate(sites)} if static else {}
    packed = list(pack_sites(lambda site: model.get_parameter(site + ".weight").detach(), precisions))
    swap_sites(model, packed, precisions, scales)
    wanted = expected(model, inputs(shape))
    got = backend(model).run(inputs(shape), noise(), None)[0]
    # a sum in another order may round an activation to the neighbouring code: rare, and small beside the format
    assert np.abs(got - wanted).mean() < 2e-3
    assert np.median(np.abs(got - wanted)) < 1e-3


def test_the_model_s_weights_are_taken_over():
    model = drawn(config())
    count = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n)
    ours = ReferenceBackend(model, RealTimeChunking("off"), "test")
    held = sum(p.numel() for p in model.parameters())
    assert held < 0.2 * count
    assert ours.memory_bytes() > 4 * 0.9 * (count - sum(p.numel() for p in model.parameters()))


def test_numpy_s_products_are_taken_with_one_thread_alone(monkeypatch):
    set_to = []
    monkeypatch.setattr(host_blas, "_openblas", lambda: (set_to.append,))
    monkeypatch.setattr(host_blas, "_better_by_numpy", lambda: True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert "PyTorch's BLAS" in backend(drawn(config())).description
        torch.set_num_threads(1)
        assert "numpy's OpenBLAS" in backend(drawn(config())).description
        assert set(set_to) == {1}
    finally:
        torch.set_num_threads(before)
