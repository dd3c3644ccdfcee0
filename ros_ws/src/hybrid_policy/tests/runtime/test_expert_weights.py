"""What the loop kernel is packed with: on any machine, for the launch itself stands an empty one."""

import dataclasses
import zlib

import pytest
import torch
from hybrid_policy.kernels import expert, expert_loop, fp8
from hybrid_policy.models.config import PI05_FULL
from hybrid_policy.models.pi05 import EXPERT, PREFIX, Pi05
from hybrid_policy.runtime import expert_weights
from hybrid_policy.runtime.modulations import modulations_of
from hybrid_policy.runtime.packer import Packer
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.sites import model_sites

#: pi0.5's own dimensions, which the kernel is written for, with one layer
CONFIG = PI05_FULL.replace(
    prefix=dataclasses.replace(PI05_FULL.prefix, depth=1), expert=dataclasses.replace(PI05_FULL.expert, depth=1)
)
VALUES = f"{PREFIX}layers.0.self_attn.v_proj"
with torch.device("meta"):
    SHAPES = {name: tuple(p.shape) for name, p in Pi05(CONFIG).named_parameters()}


class NoLaunch:
    """For nvrtc.Kernel, which needs a GPU."""

    def __init__(self, *args, **options):
        pass

    def active_clusters(self, grid, cluster):
        return 64


def weight(name):
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 10)


@pytest.fixture
def packed_loop(monkeypatch):
    """recipe, weights, held sites -> the loop, and the packer."""
    monkeypatch.setattr(expert_loop, "Kernel", NoLaunch)
    monkeypatch.setattr(expert, "shared_limit", lambda device: 232448)

    def pack(recipe, source=weight, held=None):
        precisions = load_recipe(recipe).assign(model_sites(CONFIG))
        packer = Packer(source, precisions, held or {}, torch.bfloat16, lambda step: None)
        return expert_weights.expert_loop(packer, source, CONFIG, modulations_of(CONFIG, source), True), packer

    return pack


@pytest.mark.parametrize(("recipe", "formats"), [("h100", "w8a8 w8a8 w8a8 w8a8"), ("hybrid", "e4m3 e4m3 nvfp4 e4m3")])
def test_activations_are_fp8_where_all_sites_are(packed_loop, recipe, formats):
    loop, packer = packed_loop(recipe)
    names = [f"{stage} {fmt}" for stage, fmt in zip(("qkv", "o", "gate_up", "down"), formats.split(), strict=True)]
    assert packer.routes["expert"].endswith(", ".join(names))
    assert (loop.seen_scale != 1).all() == (recipe == "h100")


def test_uneven_rows_keep_bf16_activations_and_say_so(packed_loop):
    def uneven(name):
        value = weight(name)
        if name in (f"{EXPERT}layers.0.mlp.gate_proj.weight", f"{EXPERT}layers.0.mlp.up_proj.weight"):
            value[0] *= 3000
        if name == f"{EXPERT}layers.0.mlp.down_proj.weight":
            value[:, 0] = 0  # nothing of the long rows is left: all that counts is far below their scale
        return value

    _, packer = packed_loop("h100", uneven)
    assert "w8a8" not in packer.routes["expert"]
    assert "layer 0 would lose" in packer.routes["expert.down"]


def test_values_that_the_checkpoint_brings_quantised_are_bounded_as_they_are(packed_loop):
    """Not by the stored bytes: as numbers they are some thousand times larger."""
    expected, _ = packed_loop("h100")
    held = {VALUES: fp8.quantize(weight(VALUES + ".weight"), per_row=False)}

    def source(name):
        assert name != VALUES + ".weight"
        return weight(name)

    loop, _ = packed_loop("h100", source, held)
    assert torch.allclose(loop.seen_scale, expected.seen_scale, rtol=0.05)
