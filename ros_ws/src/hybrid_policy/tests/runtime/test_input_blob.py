import numpy as np
import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.models.config import small_config
from hybrid_policy.models.processors import ModelInputs
from hybrid_policy.runtime.backend import Guidance
from hybrid_policy.runtime.cuda_backend import bucket_of, row_buckets
from hybrid_policy.runtime.input_blob import InputBlob

CONFIG = small_config(
    cameras=("a", "b", "c"), state_dim=2, action_dim=3, vocab_size=64, image_size=28, horizon=8, max_token_len=10
)
PATCHES = CONFIG.image_tokens  # 4


def inputs(mask=(True, True, True), count=7, **changes):
    random = np.random.default_rng(0)
    held = {
        "images": random.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8),
        "image_mask": np.array(mask),
        "tokens": random.integers(0, 64, 10),
        "token_count": count,
        "state": np.zeros(2, np.float32),
        "prompt": "",
    }
    return ModelInputs(**(held | changes))


def blob():
    return InputBlob(CONFIG, 3, torch.device("cpu"))


def test_everything_arrives_by_one_copy():
    made = blob()
    given = inputs()
    noise = np.random.default_rng(1).standard_normal((8, 3), dtype=np.float32)
    guidance = Guidance(noise * 2, np.linspace(1, 0, 8, dtype=np.float32), 5)
    assert made.fill(given, noise, guidance) == 3 * PATCHES + 7
    assert not made.inputs.noise.any()  # not sent yet
    made.send()
    sent = made.inputs
    np.testing.assert_array_equal(sent.images.numpy(), given.images)
    np.testing.assert_array_equal(sent.tokens.numpy(), given.tokens)
    np.testing.assert_array_equal(sent.noise.numpy(), noise)
    np.testing.assert_array_equal(sent.guide.target.numpy(), guidance.target)
    np.testing.assert_array_equal(sent.guide.weights.numpy(), guidance.weights)
    assert sent.guide.clean.item() == 5
    assert sent.valid.item() == 3 * PATCHES + 7
    assert sent.rows[: 3 * PATCHES + 7].tolist() == list(range(3 * PATCHES + 7))


def test_absent_views_move_the_rest_up():
    made = blob()
    assert made.fill(inputs(mask=(True, False, True), count=2), np.zeros((8, 3), np.float32), None) == 2 * PATCHES + 2
    made.send()
    view = list(range(PATCHES))
    words = [3 * PATCHES, 3 * PATCHES + 1]
    expected = view + [2 * PATCHES + i for i in view] + words
    assert made.inputs.rows[: len(expected)].tolist() == expected
    assert not made.inputs.rows[len(expected) :].any()


def test_what_changed_between_inferences_arrives():
    made, noise = blob(), np.zeros((8, 3), np.float32)
    every, two = (True, True, True), (False, True, True)
    for mask, count in ((every, 7), (every, 7), (every, 4), (two, 4), (every, 7)):
        fresh, wanted = blob(), inputs(mask=mask, count=count)
        assert made.fill(wanted, noise, None) == fresh.fill(wanted, noise, None) == sum(mask) * PATCHES + count
        made.send()
        fresh.send()
        assert torch.equal(made.inputs.rows, fresh.inputs.rows)
        assert torch.equal(made.inputs.valid, fresh.inputs.valid)


def test_guidance_does_not_linger():
    made = blob()
    noise = np.ones((8, 3), np.float32)
    made.fill(inputs(), noise, Guidance(noise, np.ones(8, np.float32), 3))
    made.fill(inputs(), noise, None)
    made.send()
    assert not made.inputs.guide.weights.any()
    assert made.inputs.guide.clean.item() == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": np.zeros((2, 28, 28, 3), np.uint8)}, "images"),
        ({"images": np.zeros((3, 28, 28, 3), np.float32)}, "images"),
        ({"count": 11}, "token_count"),
    ],
)
def test_mistakes_are_named(change, expected):
    with pytest.raises(InputError, match=expected):
        blob().fill(inputs(**change), np.zeros((8, 3), np.float32), None)


def test_buckets_hold_every_prompt():
    assert row_buckets(2, 256, 200) == (560, 608, 656, 704, 712)
    assert row_buckets(1, 16, 24) == (40,)
    assert row_buckets(2, 256, 48) == (560,)
    assert [bucket_of((560, 608, 712), rows) for rows in (1, 560, 561, 712)] == [560, 560, 608, 712]
