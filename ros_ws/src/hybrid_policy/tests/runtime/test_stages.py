import dataclasses

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.models.config import PI05_FULL
from hybrid_policy.runtime.loading import choose_table, device_precisions
from hybrid_policy.runtime.recipe import Recipe, Rule, load_recipe
from hybrid_policy.runtime.rtc import RealTimeChunking
from hybrid_policy.runtime.sites import model_sites
from hybrid_policy.runtime.stages import GLUE, parse_table, plain_table

CPU = torch.device("cpu")


def test_tables_by_text():
    assert parse_table("").expert == "loop"
    assert parse_table("plain") == plain_table()
    table = parse_table("expert=fused,add_norm=reference,pdl=off")
    assert (table.expert, table.add_norm, table.pdl) == ("fused", "reference", False)
    assert "expert fused" in table.describe()
    assert (table.vision_norm, parse_table("vision_norm=apart").vision_norm) == ("out", "apart")
    assert "no pdl" in table.describe()


@pytest.mark.parametrize("text", ["expert=quick", "nothing=kernel", "pdl=kernel", "expert", "vision_norm=product"])
def test_unknown_stages_are_named(text):
    with pytest.raises(InputError, match="stages"):
        parse_table(text)


@pytest.mark.parametrize("stage", GLUE)
def test_reference_and_kernel_are_two_things(stage):
    reference, kernel = GLUE[stage]
    assert plain_table().glue(stage) is reference
    assert dataclasses.replace(parse_table(""), pdl=False).glue(stage) is kernel


def choose(recipe, rtc):
    precisions = recipe.assign(model_sites(PI05_FULL))
    return choose_table(rtc, recipe, PI05_FULL, precisions, CPU)


def test_the_table_follows_from_recipe_and_mode():
    bf16 = load_recipe("bf16")
    assert choose(bf16, RealTimeChunking("prefix")).expert == "split"  # a modulation a row
    off = RealTimeChunking("off")
    assert choose(dataclasses.replace(bf16, prefix_cache="fp8"), off).expert == "fused"
    assert choose(load_recipe("w4a4"), off).expert == "fused"


def table_on_hopper(monkeypatch, recipe="h100", stages=""):
    monkeypatch.setenv("HYBRID_POLICY_STAGES", stages)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    precisions = load_recipe(recipe).assign(model_sites(PI05_FULL))
    return choose_table(RealTimeChunking("prefix"), load_recipe(recipe), PI05_FULL, precisions, torch.device("cuda"))


def test_hopper_takes_its_own_kernels(monkeypatch):
    table = table_on_hopper(monkeypatch)
    assert (table.vision_product, table.vision_norm, table.gate_up, table.qkv) == ("hopper", "out", "hopper", "hopper")
    assert table.down == "hopper"
    assert table_on_hopper(monkeypatch, stages="qkv=library").qkv == "library"
    assert table_on_hopper(monkeypatch, stages="vision_product=library").vision_norm == "apart"


def test_a_device_that_does_not_fit_takes_the_library():
    table = choose(load_recipe("bf16"), RealTimeChunking("prefix"))
    assert (table.vision_product, table.vision_norm) == ("library", "apart")
    assert (table.gate_up, table.qkv, table.down) == ("library", "library", "library")


def test_outer_dimensions_that_fp8_does_not_take():
    sites = {"a.language_model.b": (40, 64), "a.language_model.c": (48, 64)}
    recipe = Recipe("mine", (Rule("*", "fp8_w8a8", "mine.yaml"),), source="mine.yaml")
    with pytest.raises(InputError, match=r"language_model\.b: fp8_w8a8 given.*not 40") as error:
        device_precisions(recipe, sites, CPU)
    assert "language_model.c" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "precision", "expected"),
    [
        ("*", "float32", "float32 is the CPU's reference"),
        ("*projector*", "fp8_w8a8", "no kernel serves vision"),
        ("*vision_tower*fc1", "fp8_w8a8", "the precision of .*fc2, bf16"),
        ("*gemma_expert*self_attn*", "nvfp4_w4a16", "bf16 or fp8_w8a8 for attention"),
        ("*gemma_expert*mlp*", "nvfp4_w4a4", "needs Blackwell"),
    ],
)
def test_what_a_device_cannot_serve_is_refused_by_name(pattern, precision, expected):
    rules = (Rule("*", "bf16", "base"), Rule(pattern, precision, "mine.yaml"))
    with pytest.raises(InputError, match=expected) as error:
        device_precisions(Recipe("mine", rules, source="mine.yaml"), model_sites(PI05_FULL), CPU)
    assert "mine.yaml" in str(error.value)
