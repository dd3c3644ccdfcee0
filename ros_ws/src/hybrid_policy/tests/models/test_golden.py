"""The actions that LeRobot 0.6.1 itself gave, from its own checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hybrid_policy.cli import main
from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import load_checkpoint
from hybrid_policy.models.flow import accumulated_times, step_times
from hybrid_policy.models.golden import read_golden
from safetensors.torch import load_file, save_file

CASES = 3


@pytest.fixture(scope="module")
def policy() -> object:
    return load_checkpoint(Path(__file__).parent / "fixtures" / "lerobot_pi05_tiny")


def sample(policy: object, case: object, **changes: object) -> torch.Tensor:
    arguments = {"num_steps": case.steps, **changes}  # type: ignore[attr-defined]
    model, config = policy.model, policy.config  # type: ignore[attr-defined]
    actions = model.sample_actions(case.images, case.image_mask, case.tokens, case.token_mask, case.noise, **arguments)
    return actions[..., : config.action_dim]


@pytest.mark.parametrize("index", range(CASES))
def test_float32_is_within_1e_4_of_lerobot(policy, tiny, index: int) -> None:
    case = read_golden(tiny / "golden.safetensors", policy.config)[index]
    assert (sample(policy, case) - case.actions).abs().max() <= 1e-5  # asked: 1e-4; measured: 1e-6
    other = sample(policy, case, times=accumulated_times(case.steps))
    assert 1e-5 < (other - case.actions).abs().max() < 1e-4  # openpi's own way differs by 4e-5


@pytest.mark.parametrize("index", range(CASES))
def test_bf16_is_within_2_percent(tiny, index: int) -> None:
    policy = load_checkpoint(tiny, torch.bfloat16)
    case = read_golden(tiny / "golden.safetensors", policy.config)[index]
    assert ((sample(policy, case) - case.actions).norm() / case.actions.norm()) <= 1e-2


@pytest.mark.parametrize("name", ["lerobot_pi05_grouped", "lerobot_pi0_tiny"])
def test_other_dimensions_and_pi0(fixtures, name, capsys) -> None:
    """Two key/value heads, three cameras of which one is absent, images of another size; and pi0."""
    assert main(["verify", str(fixtures / name), "--tolerance", "1e-5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["cases"]) >= 4


def test_padding_and_its_two_descriptions_change_nothing(policy, tiny) -> None:
    case = read_golden(tiny / "golden.safetensors", policy.config)[2]
    assert int(case.token_mask.sum()) == 4  # 20 of 24 are padding
    other = case.tokens.masked_fill(~case.token_mask, 7)
    a = policy.model.sample_actions(case.images, None, other, case.token_mask.sum(1), case.noise)
    assert torch.equal(a[..., :7], sample(policy, case))


def test_time_steps() -> None:
    assert step_times(4) == [1.0, 0.75, 0.5, 0.25]
    assert accumulated_times(2) == [1.0, 0.5]
    assert step_times(10) != accumulated_times(10)
    assert len(accumulated_times(10)) == 10


def test_verify_passes_and_prints_each_case(tiny, capsys) -> None:
    assert main(["verify", str(tiny), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["precision"] for row in report["cases"]] == ["float32"] * CASES + ["bf16"] * CASES
    assert all(row["max_abs_openpi_time"] > row["max_abs"] for row in report["cases"][:CASES])
    assert main(["verify", str(tiny)]) == 0
    assert capsys.readouterr().out.count(" ok ") == 2 * CASES


def test_verify_fails_above_the_tolerance(tiny, capsys) -> None:
    assert main(["verify", str(tiny), "--tolerance", "1e-9", "--precision", "float32"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_finds_one_changed_weight(tiny_copy, capsys) -> None:
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.time_mlp_out.weight"] = tensors["model.time_mlp_out.weight"] * 1.001
    save_file(tensors, path)
    assert main(["verify", str(tiny_copy), "--precision", "float32"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.pop("1.actions"), "1.actions: missing"),
        (lambda g: g.update({"0.noise": g["0.noise"][:, :5].clone()}), "0.noise"),
        (lambda g: [g.pop(k) for k in list(g) if k.startswith("2.") and "images" in k], "none of cam0, cam1"),
        (
            lambda g: g.update({"0.observation.language.tokens": torch.full((1, 24), 5000)}),
            "ids from 0 to 1023",
        ),
        (lambda g: [g.pop(k) for k in list(g) if k.endswith("noise")], "holds no case"),
    ],
)
def test_a_golden_file_that_does_not_fit_is_refused(tiny_copy, capsys, change, words) -> None:
    golden = load_file(tiny_copy / "golden.safetensors")
    change(golden)
    save_file(golden, tiny_copy / "golden.safetensors")
    assert main(["verify", str(tiny_copy)]) == 2
    assert words in capsys.readouterr().err


def test_golden_forms_that_other_writers_use(policy, tiny, tmp_path) -> None:
    golden = load_file(tiny / "golden.safetensors")
    one = {k.removeprefix("0."): v for k, v in golden.items() if k.startswith("0.")}
    one["observation.images.cam0"] = one["observation.images.cam0"].permute(0, 2, 3, 1).contiguous()
    one["steps"] = torch.tensor(10)
    save_file(one, tmp_path / "golden.safetensors")
    (case,) = read_golden(tmp_path / "golden.safetensors", policy.config)
    assert (sample(policy, case) - case.actions).abs().max() <= 1e-5
    short = {k.removeprefix("observation.").removeprefix("language."): v for k, v in one.items()}
    short["mask"] = short.pop("attention_mask")
    save_file(short, tmp_path / "short.safetensors")
    (again,) = read_golden(tmp_path / "short.safetensors", policy.config)
    assert torch.equal(again.images, case.images)
    assert torch.equal(again.token_mask, case.token_mask)
    del one["observation.images.cam1"]
    save_file(one, tmp_path / "golden.safetensors")
    (case,) = read_golden(tmp_path / "golden.safetensors", policy.config)
    assert case.image_mask.tolist() == [[True, False]]


def test_verify_without_golden_says_so(tiny_copy, capsys) -> None:
    (tiny_copy / "golden.safetensors").unlink()
    assert main(["verify", str(tiny_copy)]) == 2
    assert "golden.safetensors is expected beside" in capsys.readouterr().err


def test_verify_refuses_a_device_that_is_not_there(tiny, capsys) -> None:
    assert main(["verify", str(tiny), "--device", "nonsense"]) == 2
    with pytest.raises(InputError):
        read_golden(tiny / "nothing.safetensors", load_checkpoint(tiny).config)
