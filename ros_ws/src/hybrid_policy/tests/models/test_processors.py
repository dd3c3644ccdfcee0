"""Observations in, actions out: prompts, tokenizers, relative actions, and what is refused."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import load_checkpoint, open_checkpoint
from hybrid_policy.models.checkpoint_writer import save_checkpoint
from hybrid_policy.models.observation import Observation
from hybrid_policy.models.pi05 import Pi05
from hybrid_policy.models.processors import build_prompt
from hybrid_policy.models.tokenizer import load_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from .conftest import make_config, randomize


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    """A character tokenizer that puts <bos> first."""
    letters = "abcdefghijklmnopqrstuvwxyzATS0123456789-,:; \n_"
    vocabulary = {"<pad>": 0, "<bos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def sentencepiece_model(tmp_path: Path) -> Path:
    text = io.BytesIO()
    lines = ["task: pick up the red cube, state: 12 255 0;", "action:"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=text,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["\n"],  # as PaliGemma's has it
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path = tmp_path / "paligemma_tokenizer.model"
    path.write_bytes(text.getvalue())
    return path


@pytest.fixture
def directory(tmp_path: Path, statistics, tokenizer_json) -> Path:
    folder = tmp_path / "policy"
    config = make_config(max_token_len=64)
    save_checkpoint(folder, randomize(Pi05(config)), config, statistics, tokenizer_json)
    return folder


def observation(prompt: str = "pick up", **changes: object) -> Observation:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for name in ("front", "wrist", "side")}
    state = np.array([0.0, 0.5, -1.0, 100.0, -100.0], dtype=np.float32)
    return Observation(**{"images": images, "state": state, "prompt": prompt, **changes})  # type: ignore[arg-type]


def test_prompts_as_they_are_written() -> None:
    state = np.array([-1.0, 0.0, 1.0, -1.5])
    text = " pick_up\nthe cube "
    assert build_prompt("state", text, state) == "Task: pick up the cube, State: 0 128 255 -1;\nAction: "
    assert build_prompt("task", text, state) == "Task: pick up the cube;\nAction: "
    assert build_prompt("openpi_plain", text, state) == "pick up the cube"
    assert build_prompt("lerobot_plain", text, state) == " pick_up\nthe cube \n"
    assert build_prompt("lerobot_plain", "go\n", state) == "go\n"


def test_prepare_and_finish(directory) -> None:
    policy = load_checkpoint(directory)
    inputs = policy.processors.prepare(observation())
    assert inputs.images.shape == (3, 30, 30, 3)
    assert inputs.images.dtype == np.uint8
    assert inputs.images[0, 0].max() == 0  # 40 x 60 lies across: black above and below
    assert inputs.image_mask.all()
    assert inputs.tokens[0] == 1
    assert inputs.token_count == len(inputs.prompt) + 1
    assert (inputs.tokens[inputs.token_count :] == 0).all()
    assert inputs.prompt.startswith("Task: pick up, State: ")
    assert inputs.prompt.split("State: ")[1].split(";")[0].split()[3:] == ["255", "-1"]
    actions = policy.model.sample_actions(
        torch.from_numpy(inputs.images)[None],
        torch.from_numpy(inputs.image_mask)[None],
        torch.from_numpy(inputs.tokens)[None],
        torch.tensor([inputs.token_count]),
        torch.randn(1, 6, 9),
    )[0].numpy()
    finished = policy.processors.finish(actions, observation())
    assert finished.shape == (6, 5)
    assert finished.dtype == np.float32
    again = policy.processors.normalized_actions(finished, observation().state)
    np.testing.assert_allclose(again[:, :5], actions[:, :5], atol=1e-5)
    assert (again[:, 5:] == 0).all()


def test_the_token_cache_knows_prompt_and_state(directory) -> None:
    built = open_checkpoint(directory).processors
    calls: list[str] = []
    encode = built.tokenizer.encode  # type: ignore[union-attr]
    built.tokenizer.encode = lambda text, **k: calls.append(text) or encode(text, **k)  # type: ignore
    first = built.prepare(observation())
    assert (built.prepare(observation()).tokens == first.tokens).all()
    assert len(calls) == 1
    built.prepare(observation("go"))
    built.prepare(observation("go", state=np.full(5, 0.3, dtype=np.float32)))
    assert len(calls) == 3


def test_an_absent_camera_is_masked_and_an_unknown_one_refused(directory) -> None:
    built = open_checkpoint(directory).processors
    images = dict(observation().images)
    del images["wrist"]
    assert built.prepare(observation(images=images)).image_mask.tolist() == [True, False, True]
    with pytest.raises(InputError, match="expected front, wrist, side"):
        built.prepare(observation(images={**images, "top": images["front"]}))
    with pytest.raises(InputError, match="none given"):
        built.prepare(observation(images={}))
    with pytest.raises(InputError, match="camera front: image: float64"):
        built.prepare(observation(images={"front": np.zeros((3, 3, 3))}))


@pytest.mark.parametrize("state", [np.zeros(4, np.float32), np.array([0, 0, np.nan, 0, 0], np.float32)])
def test_a_state_that_does_not_fit_is_refused(directory, state) -> None:
    with pytest.raises(InputError, match=r"^state"):
        open_checkpoint(directory).processors.prepare(observation(state=state))


def test_a_long_prompt_is_cut_with_one_warning(directory, caplog) -> None:
    built = open_checkpoint(directory).processors
    with caplog.at_level(logging.WARNING):
        inputs = built.prepare(observation("a" * 100))
        built.prepare(observation("b" * 100))
    assert inputs.token_count == 64
    assert len(caplog.records) == 1


def test_relative_actions_count_from_the_state(tmp_path, statistics) -> None:
    config = make_config()
    save_checkpoint(
        tmp_path, Pi05(config), config, statistics, normalization="mean_std",
        action_names=["j1", "left_gripper", "j3", "j4", "Gripper"], relative_exclude=["gripper"],
    )  # fmt: skip
    built = open_checkpoint(tmp_path).processors
    assert built.relative == (True, False, True, True, False)
    mean = statistics["action"]["mean"].astype(np.float32)
    actions = built.finish(np.zeros((6, 9), np.float32), observation())
    expected = mean + np.array([0.0, 0.0, -1.0, 100.0, 0.0])
    np.testing.assert_allclose(actions[2], expected, rtol=1e-6)
    np.testing.assert_allclose(built.normalized_actions(actions, observation().state), 0.0, atol=1e-5)


def test_no_tokenizer_says_where_to_get_one(tmp_path, statistics) -> None:
    config = make_config()
    save_checkpoint(tmp_path, Pi05(config), config, statistics)
    built = open_checkpoint(tmp_path).processors
    with pytest.raises(InputError, match=r"paligemma_tokenizer.model from https://.*put the file into"):
        built.prepare(observation())
    with pytest.raises(InputError, match="no such tokenizer file"):
        open_checkpoint(tmp_path, tokenizer=tmp_path / "nothing.model")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, statistics, tokenizer_json) -> None:
    config = make_config(vocab_size=20, max_token_len=64)
    save_checkpoint(tmp_path / "p", Pi05(config), config, statistics, tokenizer_json)
    with pytest.raises(InputError, match=r"gives token \d+, the checkpoint knows 20"):
        open_checkpoint(tmp_path / "p").processors.prepare(observation())


def test_sentencepiece(sentencepiece_model, tmp_path, statistics) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    plain = tokenizer.encode("pick up")
    assert plain[0] == 1
    apart = tokenizer.encode("pick up", newline_apart=True)
    assert apart[: len(plain)] == plain
    assert len(apart) > len(plain)
    config = make_config(max_token_len=200, vocab_size=400)
    save_checkpoint(tmp_path / "p", Pi05(config), config, statistics, sentencepiece_model)
    assert open_checkpoint(tmp_path / "p").processors.prepare(observation()).tokens[0] == 1


@pytest.mark.parametrize("name", ["a.model", "a.json", "a.txt"])
def test_broken_tokenizers_are_refused(tmp_path, name) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x00nonsense")
    with pytest.raises(InputError, match=name):
        load_tokenizer(path)


def change(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def steps(index: int, **values: object):
    return lambda pipeline: pipeline["steps"][index]["config"].update(values)


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        (
            "policy_preprocessor.json",
            lambda p: p["steps"][3].update(state_file="../x"),
            "file in this directory",
        ),
        ("policy_preprocessor.json", lambda p: p["steps"][0].update(registry_name="magic"), "'magic' given"),
        ("policy_preprocessor.json", steps(3, norm_map={"STATE": "LOG"}), "'LOG' given"),
        ("policy_preprocessor.json", steps(3, norm_map={"VISUAL": "MEAN_STD"}), "norm_map.VISUAL"),
        ("policy_preprocessor.json", steps(3, eps="small"), "eps"),
        ("policy_preprocessor.json", steps(2, enabled=True), "False, as config.json says"),
        ("policy_preprocessor.json", lambda p: p.update(steps=5), "expected a list of steps"),
        ("config.json", lambda c: c.update(type="act"), "expected pi05 or pi0"),
        ("config.json", lambda c: c.update(chunk_size="many"), "chunk_size"),
        ("config.json", lambda c: c.update(image_resolution=[224, 112]), "two equal numbers"),
        ("config.json", lambda c: c.update(paligemma_variant="gemma_9b"), "'gemma_9b' given"),
        ("config.json", lambda c: c["output_features"]["action"].update(shape=[2, 3]), "one-dimensional"),
        ("config.json", lambda c: c.update(use_visual_memory=True), "not supported"),
        ("dims.json", lambda d: d.update(vlm=[1]), "expected an object"),
        ("dims.json", lambda d: d["vision"].update(num_attention_heads=0), "0 given, expected"),
        ("dims.json", lambda d: d.update(cameras="two"), "list of names"),
    ],
)
def test_files_that_cannot_be_understood_are_refused(directory, file, edit, words) -> None:
    change(directory / file, edit)
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(directory)
    assert file in str(caught.value)


def test_what_is_missing_is_listed_at_once(directory) -> None:
    (directory / "policy_postprocessor.json").unlink()
    (directory / "tokenizer.json").unlink()
    state = directory / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    save_file({k: v for k, v in load_file(state).items() if k.startswith("action")}, state)
    built = open_checkpoint(directory).processors
    assert len(built.missing) == 3
    with pytest.raises(InputError) as caught:
        built.check_ready()
    assert str(caught.value).count("\n") == 2


def test_lerobots_prompt_without_state(directory) -> None:
    change(directory / "policy_preprocessor.json", steps(4, include_state_in_prompt=False))
    checkpoint = open_checkpoint(directory)
    assert not checkpoint.config.state_in_prompt
    assert checkpoint.processors.prepare(observation()).prompt == "Task: pick up;\nAction: "
