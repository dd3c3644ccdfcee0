"""The training scripts at the top of the repository: tokenizer, frames, network, data set."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.models.processors import build_prompt

TRAINING = Path(__file__).resolve().parents[5] / "training"

pytestmark = [
    pytest.mark.skipif(not (TRAINING / "train.py").exists(), reason="the repository's training/ is not here"),
    pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="the simulator is not installed"),
]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch):
    """Import a module of training/ by name, as its scripts import each other."""
    monkeypatch.syspath_prepend(str(TRAINING))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(TRAINING) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_the_tokenizer_keeps_joints_apart_and_the_table_agrees_with_it(training) -> None:
    vocabulary = training("vocabulary")
    tokenizer = vocabulary.build(14)
    table = vocabulary.PromptIds(tokenizer, 14, 32)
    random = np.random.default_rng(0)
    for prompt in ("pick up the red cube", "Lift the blue block!", "pick the_red one up"):
        state = random.uniform(-1.1, 1.1, 14)  # below -1 gives the bin -1
        text = build_prompt("state", prompt, state)
        encoded = tokenizer.encode(text)
        assert "<unk>" not in encoded.tokens
        bins = np.array([[int(n) for n in text.split("State: ")[1].split(";")[0].split()]])
        ids, counts = table([prompt.replace("_", " ")], bins)
        assert ids[0, : counts[0]].tolist() == encoded.ids
    same = tokenizer.encode(build_prompt("state", "lift the red cube", np.zeros(14))).ids
    assert len(set(same[-15:-1])) == 14  # one number, fourteen tokens
    assert "<unk>" in tokenizer.encode("Task: juggle").tokens


def test_other_phrases_that_name_a_colour_become_a_known_one(training) -> None:
    tokenizer = training("vocabulary").build(14)

    def tokens(prompt: str) -> list[str]:
        return tokenizer.encode(build_prompt("state", prompt, np.zeros(14))).tokens

    plain = tokens("pick up the red cube")
    for prompt in ("Please, get me the RED one!", "red", "pick up the red cube.", "fetch the red box, quickly"):
        assert tokens(prompt) == plain
    assert tokens("lift the red block") != plain  # one that was trained with
    assert tokens("pick the red one up") != plain
    assert tokens("bring blue") == tokens("pick up the blue cube") != plain
    assert "red" not in tokens("do something")


def test_near_numbers_start_near_each_other(training) -> None:
    vocabulary = training("vocabulary")
    tokenizer = vocabulary.build(2)
    rows = vocabulary.smooth_rows(tokenizer, 2, 64, seed=0)
    ids = tokenizer.get_vocab()

    def row(joint: int, number: int) -> np.ndarray:
        return rows[ids[f"{vocabulary.mark(joint)}{number}"]]

    near = np.linalg.norm(row(0, 100) - row(0, 102))
    assert near < 0.3 * np.linalg.norm(row(0, 100) - row(0, 200))
    assert near < 0.3 * np.linalg.norm(row(0, 100) - row(1, 100))


def test_frames_show_the_cube_where_the_label_says(training) -> None:
    collect, network = training("collect"), training("network")
    frames = collect.collect(seed=3, frames=24, size=112, horizon=8, rest_share=2.0)
    assert len(frames) >= 20
    side = 8
    hits = []
    for image, cubes in zip(frames.images[:, 0].astype(int), frames.cubes):
        for channel, cube in zip((0, 2), cubes):
            others = [c for c in range(3) if c != channel]
            mask = image[..., channel] > image[..., others].max(-1) + 60
            if mask.sum() < 40:  # hidden by the arm
                continue
            down, across = np.argwhere(mask).mean(0) / 112 * side
            label = int(network.patch_of(cube, side))
            hits.append(np.hypot(label // side + 0.5 - down, label % side + 0.5 - across))
    assert len(hits) > 20
    assert np.median(hits) < 0.6  # patches; the label is the middle of its patch


def test_frames_on_the_way_repeat_by_seed_and_answer_both_prompts(training) -> None:
    collect = training("collect")
    a, b = (collect.collect(seed=4, frames=16, size=28, horizon=32, rest_share=0.5) for _ in range(2))
    np.testing.assert_array_equal(a.actions, b.actions)
    np.testing.assert_array_equal(a.images, b.images)
    assert np.abs(a.actions[:, 0, -1] - a.actions[:, 1, -1]).max(-1).min() > 0.01  # red is not blue
    assert np.abs(a.actions[:, :, 1:, 6] - 3 / 36).max() < 1e-3  # the left gripper goes home at once


def test_the_network_learns_a_few_frames_by_heart(training) -> None:
    torch = pytest.importorskip("torch")
    collect, network, vocabulary = training("collect"), training("network"), training("vocabulary")
    frames = collect.collect(seed=5, frames=4, size=112, horizon=32, rest_share=1.0)
    tokenizer = vocabulary.build(14)
    config = network.small_policy(tokenizer.get_vocab_size(), tiny=True)
    model = network.fresh_model(config, tokenizer, seed=0)
    stats = network.statistics(frames)
    assert ((stats["action"]["q99"] - stats["action"]["q01"]) >= network.LEAST_SPREAD - 1e-6).all()
    policy = network.TrainingPolicy(model, stats, tokenizer, torch.device("cpu"))
    prompts = [["lift the red cube"], ["lift the blue cube"]]
    data = network.DeviceFrames.of(frames, policy, prompts, np.random.default_rng(0))
    head = network.Grounding(config)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=2e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        words, counts = data.words[:, 0].long(), data.counts[:, 0].long()
        cache = model.encode(data.images, None, words, counts)
        noise, t = torch.randn(len(frames), 32, 14), torch.rand(len(frames)) * 0.9 + 0.05
        flow = model.training_loss(cache, data.actions[:, 0], noise, t).mean()
        ground = head.loss(cache, counts, data.cubes[:, 0], data.patches[:, 0].long())
        (flow + ground).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([flow.item(), ground.item()])
    first, last = np.mean(losses[:5], 0), np.mean(losses[-5:], 0)
    assert (last < 0.6 * first).all()


@pytest.mark.slow
def test_demonstrations_are_a_lerobot_data_set(training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    from hybrid_policy.evaluation.lerobot_episode import open_episode

    monkeypatch.setenv("PYTHONPATH", str(TRAINING))
    demonstrations = training("demonstrations")
    assert demonstrations.write(tmp_path / "set", episodes=2, seed=0, workers=1, motor_noise=0.02) == 0
    for index in (0, 1):
        episode = open_episode(tmp_path / "set", index)
        assert episode.fps == 20
        assert episode.task
        state, action = episode.vectors("observation.state"), episode.vectors("action")
        assert state is not None
        assert action is not None
        assert state.shape == action.shape == (episode.length, 14)
        # a set-point is where the arm is a little later, not where it was a little before
        after, before = state[2:, 8] - action[:-2, 8], state[:-2, 8] - action[2:, 8]
        assert np.abs(after).mean() < 0.5 * np.abs(before).mean()
        for camera in episode.cameras:
            pictures = list(episode.frames(camera))
            assert len(pictures) == episode.length
            assert pictures[0].shape == (224, 224, 3)
    with pytest.raises(InputError, match="empty"):
        demonstrations.write(tmp_path / "set", episodes=1, seed=0, workers=1, motor_noise=0.0)
