import json

import numpy as np
import pytest
from hybrid_policy.cli import main
from hybrid_policy.errors import InputError
from hybrid_policy.models.config import PI05_FULL
from hybrid_policy.runtime.random_policy import random_checkpoint
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.sites import model_sites
from hybrid_policy.runtime.tuning import Measured, choose, groups_of


def test_groups_of_the_full_model():
    groups = {g.name: g for g in groups_of(PI05_FULL.replace(cameras=("a", "b")), 48)}
    assert len(groups) == 11
    assert groups["vision.mlp.fc"].candidates((9, 0)) == ["bf16", "fp8_w8a8"]
    assert groups["prefix.mlp.gate_up"].rows == 560
    assert groups["prefix.mlp.gate_up"].shape == (32768, 2048)
    assert groups["expert.self_attn.qkv"].shape == (2560, 1024)
    assert groups["expert.mlp.down"].calls == 180
    assert "nvfp4_w4a4" not in groups["prefix.mlp.down"].candidates((9, 0))
    assert "nvfp4_w4a4" in groups["prefix.mlp.down"].candidates((11, 0))
    sites = model_sites(PI05_FULL)
    assert all(site in sites for g in groups.values() for site in g.all_sites())


def entries(*rows):
    groups = {g.name: g for g in groups_of(PI05_FULL, 48)}
    return [Measured(groups[name], precision, seconds, error) for name, precision, seconds, error in rows]


TABLE = entries(
    ("prefix.mlp.down", "bf16", 3.0, 0.001),
    ("prefix.mlp.down", "fp8_w8a8", 2.0, 0.03),
    ("expert.mlp.down", "bf16", 2.0, 0.001),
    ("expert.mlp.down", "fp8_w8a8", 1.5, 0.04),
    ("expert.mlp.down", "nvfp4_w4a16", 1.0, 0.2),
)


def predicted(precisions):
    chosen = [m.error for m in TABLE if precisions[m.group.name] == m.precision]
    return float(np.sqrt(np.sum(np.square(chosen))))


def test_fastest_within_the_bound():
    choice = choose(TABLE, 0.06, predicted)
    assert choice.precisions == {"prefix.mlp.down": "fp8_w8a8", "expert.mlp.down": "fp8_w8a8"}
    assert choice.seconds == 3.5
    assert choose(TABLE, 0.3, predicted).precisions["expert.mlp.down"] == "nvfp4_w4a16"


def test_what_the_measurement_refuses_is_not_taken():
    choice = choose(TABLE, 0.06, lambda p: 0.5 if p["prefix.mlp.down"] == "fp8_w8a8" else predicted(p))
    assert choice.precisions["prefix.mlp.down"] == "bf16"
    assert choice.rejected > 0


def test_a_bound_that_nothing_holds():
    with pytest.raises(InputError, match="bf16 alone"):
        choose(TABLE, 0.06, lambda _: 0.5)


def test_command_writes_a_recipe_that_fits(tmp_path, capsys):
    from hybrid_policy.models.config import small_config

    config = small_config(
        cameras=("a",), state_dim=2, action_dim=2, vocab_size=512, image_size=28, horizon=8, max_token_len=64,
        width=64, depth=3, num_steps=2,
    )  # fmt: skip
    checkpoint = random_checkpoint(
        tmp_path / "policy",
        cameras=("a",),
        state_range=[(-1, 1)] * 2,
        action_range=[(-1, 1)] * 2,
        config=config,
    )
    out = tmp_path / "tuned.yaml"
    arguments = [
        "tune",
        str(checkpoint),
        str(out),
        "--device",
        "cpu",
        "--observations",
        "1",
        "--bound",
        "0.2",
        "--json",
    ]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["action_error"] <= 0.2
    assert len(told["table"]) == 3 * 2 + 2 * (2 * 2 + 2 * 4)
    recipe = load_recipe(out)
    assert set(recipe.assign(model_sites(config)).values()) <= {
        "bf16",
        "fp8_w8a8",
        "nvfp4_w4a16",
        "nvfp4_w4a4",
    }
    assert main(["tune", str(checkpoint), str(out), "--bound", "2", "--device", "cpu"]) == 2
