import json

import numpy as np
import pytest
import torch
from hybrid_policy.cli import main
from hybrid_policy.errors import InputError
from hybrid_policy.models.config import PI05_FULL, small_config
from hybrid_policy.runtime.random_policy import random_checkpoint
from hybrid_policy.runtime.recipe import load_recipe
from hybrid_policy.runtime.sites import model_sites
from hybrid_policy.runtime.tuning import PartTime, choose, combinations, groups_of, table_of
from hybrid_policy.runtime.tuning_times import builds_on_gpu


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


ERRORS = {
    ("prefix.mlp.down", "bf16"): 0.001,
    ("prefix.mlp.down", "fp8_w8a8"): 0.03,
    ("expert.mlp.gate_up", "bf16"): 0.001,
    ("expert.mlp.gate_up", "fp8_w8a8"): 0.01,
    ("expert.mlp.down", "bf16"): 0.001,
    ("expert.mlp.down", "fp8_w8a8"): 0.04,
    ("expert.mlp.down", "nvfp4_w4a16"): 0.2,
}


def times(part, seconds, **kinds):
    return PartTime(part, {f"{part}.mlp.{kind}": precision for kind, precision in kinds.items()}, seconds)


# the expert's kernel for FP8 alone: either site by itself is slower than bf16
TIMES = [
    times("prefix", 3.0, down="bf16"),
    times("prefix", 2.0, down="fp8_w8a8"),
    times("expert", 2.0, gate_up="bf16", down="bf16"),
    times("expert", 2.1, gate_up="fp8_w8a8", down="bf16"),
    times("expert", 2.2, gate_up="bf16", down="fp8_w8a8"),
    times("expert", 1.5, gate_up="fp8_w8a8", down="fp8_w8a8"),
    times("expert", 1.0, gate_up="bf16", down="nvfp4_w4a16"),
    times("expert", 1.9, gate_up="fp8_w8a8", down="nvfp4_w4a16"),
]


def predicted(precisions):
    return float(np.sqrt(sum(ERRORS[item] ** 2 for item in precisions.items())))


def test_fastest_within_the_bound():
    choice = choose(TIMES, ERRORS, 0.06, predicted)
    assert set(choice.precisions.values()) == {"fp8_w8a8"}
    assert choice.seconds == 3.5
    assert choice.parts == (TIMES[1], TIMES[5])
    assert choose(TIMES, ERRORS, 0.3, predicted).precisions["expert.mlp.down"] == "nvfp4_w4a16"


def test_what_the_measurement_refuses_is_not_taken():
    choice = choose(TIMES, ERRORS, 0.06, lambda p: 0.5 if p["prefix.mlp.down"] == "fp8_w8a8" else predicted(p))
    assert choice.precisions["prefix.mlp.down"] == "bf16"
    assert choice.precisions["expert.mlp.down"] == "fp8_w8a8"
    assert choice.rejected > 0


def test_many_refused_leave_bf16():
    bad = choose(TIMES, ERRORS, 0.3, lambda p: 0.01 if set(p.values()) == {"bf16"} else 0.9)
    assert set(bad.precisions.values()) == {"bf16"}
    assert bad.seconds == 5.0


def test_a_bound_that_nothing_holds():
    with pytest.raises(InputError, match="bf16 alone"):
        choose(TIMES, ERRORS, 0.06, lambda _: 0.5)


def test_each_combination_once():
    parts = combinations(groups_of(PI05_FULL, 48), (9, 0))
    assert {part: len(chosen) for part, chosen in parts.items()} == {"vision": 8, "prefix": 36, "expert": 36}
    assert len({tuple(chosen.items()) for chosen in parts["expert"]}) == 36
    assert builds_on_gpu(groups_of(PI05_FULL, 48), (9, 0)) == 36


def test_table_is_of_groups_alone():
    groups = [g for g in groups_of(PI05_FULL, 48) if (g.name, "bf16") in ERRORS]
    table = table_of(groups, TIMES, ERRORS)
    seconds = {(m.group.name, m.precision): m.seconds for m in table}
    assert len(table) == len(ERRORS)
    assert seconds["expert.mlp.gate_up", "fp8_w8a8"] == 2.1
    assert seconds["expert.mlp.down", "nvfp4_w4a16"] == 1.0
    assert seconds["prefix.mlp.down", "bf16"] == 3.0


ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_command_writes_a_recipe_that_fits(device, tmp_path, capsys):
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
        device,
        "--observations",
        "1",
        "--bound",
        "0.2",
        "--json",
    ]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["action_error"] <= 0.2
    mlp = 4 if device == "cpu" or torch.cuda.get_device_capability()[0] >= 10 else 3
    assert len(told["table"]) == 3 * 2 + 2 * (2 * 2 + 2 * mlp)
    assert all(row["part_milliseconds"] > 0 for row in told["table"])
    assert [row["part"] for row in told["fastest"]] == ["vision"] * 3 + ["prefix"] * 3 + ["expert"] * 3
    recipe = load_recipe(out)
    assert set(recipe.assign(model_sites(config)).values()) <= {
        "bf16",
        "fp8_w8a8",
        "nvfp4_w4a16",
        "nvfp4_w4a4",
    }
    for wrong in (["--bound", "2"], ["--tokens", "65"]):
        assert main(["tune", str(checkpoint), str(out), *wrong, "--device", device]) == 2
        assert wrong[0] in capsys.readouterr().err
