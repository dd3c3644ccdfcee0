from pathlib import Path

import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.models.config import PI05_FULL
from hybrid_policy.runtime.recipe import load_recipe, write_recipe
from hybrid_policy.runtime.sites import model_sites

LAYER = "paligemma_with_expert.gemma_expert.model.layers.0."


@pytest.fixture(scope="module")
def sites():
    return model_sites(PI05_FULL)


def recipe(tmp_path: Path, text: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_sites_of_the_full_model(sites):
    # 27 x 6 + projector + 2 x 18 x 7; adaptive norms and the float32 projections are no sites
    assert len(sites) == 27 * 6 + 1 + 2 * 18 * 7
    assert sites[LAYER + "mlp.down_proj"] == (1024, 4096)


@pytest.mark.parametrize("name", ["float32", "bf16", "seed", "fp8", "w4a4", "h100", "hybrid"])
def test_shipped_recipes_fit_the_full_model(sites, name):
    assert set(load_recipe(name).assign(sites)) == set(sites)


def test_seed_is_the_hybrid(sites):
    precisions = load_recipe("seed").assign(sites)
    assert precisions[LAYER + "mlp.gate_proj"] == precisions[LAYER + "mlp.up_proj"] == "nvfp4_w4a16"
    assert precisions[LAYER + "mlp.down_proj"] == "fp8_w8a8"
    assert precisions[LAYER + "self_attn.q_proj"] == "bf16"


def test_last_match_counts(tmp_path, sites):
    text = 'sites: {"*": bf16, "*.mlp.down_proj": fp8_w8a8, "*gemma_expert*layers.3.mlp.down_proj": bf16}'
    precisions = recipe(tmp_path, text).assign(sites)
    assert precisions[LAYER + "mlp.down_proj"] == "fp8_w8a8"
    assert precisions[LAYER.replace(".0.", ".3.") + "mlp.down_proj"] == "bf16"


def test_include_beside_the_file_and_override(tmp_path, sites):
    (tmp_path / "base.yaml").write_text('sites: {"*": bf16, "*.down_proj": fp8_w8a8}\nprefix_cache: fp8')
    mine = recipe(tmp_path, 'include: base\nsites: {"*.down_proj": bf16}')
    assert mine.prefix_cache == "fp8"
    assert set(mine.assign(sites).values()) == {"bf16"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('sites: {"*": bf16, "*.gate": fp8_w8a8}', "'*.gate' matches no site"),
        ('sites: {"*": int4}', "'int4' given, expected one of"),
        ('sites: {"*": bf16}\nsite: {}', "site: {} given, expected one of the keys"),
        ('sites: {"*": bf16, "*": fp8_w8a8}', "given twice"),
        ('sites: {"*.down_proj": fp8_w8a8, "*": bf16}', "two meanings"),
        ('sites: {"*.down_proj": fp8_w8a8}', "no pattern matches"),
        ('sites: {"*": bf16, "*.gate_proj": fp8_w8a8}', "one kernel serves both"),
        ("sites: [1, 2]", "a mapping from site pattern to precision"),
        ('sites: {"*": bf16}\nprefix_cache: int8', "prefix_cache"),
        ("include: nowhere", "no such file"),
        ("include: mine", "includes itself"),
        ("description: empty", "at least one site pattern"),
        ("- a list", "a mapping with the key sites"),
        ("sites: {", "cannot be read as YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, sites, text, expected):
    with pytest.raises(InputError) as error:
        recipe(tmp_path, text).assign(sites)
    assert expected in str(error.value)


def test_inner_dimension_that_nvfp4_cannot_serve(tmp_path):
    mine = recipe(tmp_path, 'sites: {"*": nvfp4_w4a16}')
    with pytest.raises(InputError, match=r"cannot serve a\.b \[8, 40\], expected an inner dimension"):
        mine.assign({"a.b": (8, 40)})


def test_written_recipe_reads_back(tmp_path, sites):
    seed = load_recipe("seed")
    write_recipe(tmp_path / "again.yaml", seed)
    again = load_recipe(tmp_path / "again.yaml")
    assert again.assign(sites) == seed.assign(sites)
    assert (again.name, again.prefix_cache) == (seed.name, seed.prefix_cache)
