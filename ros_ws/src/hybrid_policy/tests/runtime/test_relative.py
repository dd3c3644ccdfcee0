"""Checkpoints that predict actions relative to the state: a continuation is seen from the new state."""

import numpy as np
import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint_writer import save_checkpoint
from hybrid_policy.models.config import small_config
from hybrid_policy.models.observation import Continuation, Observation
from hybrid_policy.models.pi05 import Pi05
from hybrid_policy.runtime.engine import Engine
from hybrid_policy.runtime.random_policy import random_checkpoint, randomise
from hybrid_policy.runtime.rtc import RealTimeChunking

CONFIG = small_config(
    cameras=("a",), state_dim=3, action_dim=3, vocab_size=512, image_size=28, horizon=8, max_token_len=96,
    width=64, depth=3, num_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relative")
    plain = random_checkpoint(
        folder / "tokenizer", cameras=("a",), state_range=[(-1, 1)] * 3, action_range=[(-1, 1)] * 3, config=CONFIG
    )
    torch.manual_seed(0)
    model = Pi05(CONFIG)
    randomise(model, 0)
    limits = {"q01": [-2.0, -2.0, -2.0], "q99": [2.0, 2.0, 2.0]}
    statistics = {"state": limits, "action": limits}
    save_checkpoint(
        folder / "policy", model, CONFIG, statistics, plain / "tokenizer.json",
        action_names=["shoulder", "elbow", "gripper"], relative_exclude=["gripper"],
    )  # fmt: skip
    # a clean prefix is copied into the new chunk as it is: what was re-anchored can be read off it
    return Engine.from_checkpoint(folder / "policy", "float32", "cpu", rtc=RealTimeChunking("prefix"))


def seen(state):
    return Observation({"a": np.zeros((28, 28, 3), np.uint8)}, np.array(state, np.float32), "go")


def test_the_same_absolute_actions_from_another_state(engine):
    first = engine.infer(seen([0.1, -0.2, 0.3]))
    second = engine.infer(seen([0.5, 0.4, -0.3]), None, Continuation(first.normalised, 3, 2))
    np.testing.assert_allclose(second.actions[:2], first.actions[3:5], atol=1e-5)
    # in the model's space the relative ones moved, the gripper did not
    moved = second.normalised[:2] - first.normalised[3:5]
    np.testing.assert_allclose(moved[:, :3], [[-0.2, -0.3, 0.0]] * 2, atol=1e-5)


def test_a_chunk_of_unknown_origin_is_refused(engine):
    with pytest.raises(InputError, match="did not give lately"):
        engine.infer(seen([0, 0, 0]), None, Continuation(np.ones((8, 3), np.float32), 3, 2))
