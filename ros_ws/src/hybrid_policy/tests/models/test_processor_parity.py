"""What openpi's and LeRobot's own functions gave, recorded; ours must give the same.

``processor_recordings.json`` holds outputs of ``openpi_client.image_tools.resize_with_pad`` (openpi
15a9616 with Pillow 13.0.0), of openpi's ``Normalize``/``Unnormalize`` and of LeRobot 0.6.1's
``_NormalizationMixin._apply_transform``, on seeded inputs. Dimension 2 of the statistics is constant.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.models.images import resize_with_pad
from hybrid_policy.models.normalization import Normalization, discretize

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "processor_recordings.json").read_text())


@pytest.mark.parametrize("case", RECORDED["images"], ids=lambda c: f"{c['height']}x{c['width']}-{c['size']}")
def test_resize_with_pad_is_openpis_bit_for_bit(case) -> None:
    shape = (case["height"], case["width"], 3)
    image = np.random.default_rng(case["seed"]).integers(0, 256, shape, dtype=np.uint8)
    size = case["size"]
    ours = resize_with_pad(image, size, size)
    assert ours[size // 2, :6].tolist() == case["row"]
    assert int(ours.sum(dtype=np.int64)) == case["sum"]
    assert hashlib.sha256(ours.tobytes()).hexdigest() == case["sha256"]


def test_resize_pads_the_right_sides() -> None:
    white = np.full((100, 50, 3), 255, dtype=np.uint8)
    portrait = resize_with_pad(white, 56, 56)
    assert portrait[:, 14:42].min() == 255
    assert portrait[:, :14].max() == portrait[:, 42:].max() == 0
    landscape = resize_with_pad(white.transpose(1, 0, 2), 56, 56)
    assert (landscape == portrait.transpose(1, 0, 2)).all()
    assert resize_with_pad(white[:56], 56, 50) is not None
    same = np.zeros((56, 56, 3), dtype=np.uint8)
    assert resize_with_pad(same, 56, 56) is same


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        np.zeros((1, 400, 3), dtype=np.uint8),
    ],
)
def test_images_that_cannot_be_are_refused(image) -> None:
    with pytest.raises(InputError):
        resize_with_pad(image, 56, 56)


@pytest.mark.parametrize(("style", "mode"), [(s, m) for s in ("openpi", "lerobot") for m in RECORDED[s]])
def test_formulas_are_theirs(style, mode) -> None:
    statistics = {k: np.array(v) for k, v in RECORDED["statistics"].items()}
    x = np.array(RECORDED["x"], dtype=np.float32)
    ours = Normalization.of(mode, style, statistics, x.shape[1], "test")
    forward, backward = RECORDED[style][mode]
    np.testing.assert_allclose(ours.normalize(x), forward, rtol=1e-6 if style == "lerobot" else 1e-12)
    np.testing.assert_allclose(ours.unnormalize(x), backward, rtol=1e-6 if style == "lerobot" else 1e-12)


@pytest.mark.parametrize("style", ["openpi", "lerobot"])
@pytest.mark.parametrize("mode", ["quantiles", "mean_std"])
def test_there_and_back(style, mode) -> None:
    statistics = {k: np.array(v) for k, v in RECORDED["statistics"].items()}
    x = np.array(RECORDED["x"], dtype=np.float32)[:3]
    ours = Normalization.of(mode, style, statistics, x.shape[1], "test")
    back = ours.unnormalize(ours.normalize(x))
    keep = [0, 1, 3, 4, 5]  # in the constant dimension LeRobot's float32 loses what is off the constant
    np.testing.assert_allclose(back[:, keep], x[:, keep], atol=1e-5)


def test_identity_and_longer_statistics() -> None:
    x = np.ones(3, dtype=np.float32)
    assert Normalization("identity", "lerobot").normalize(x) is x
    padded = Normalization.of("mean_std", "openpi", {"mean": np.arange(32.0), "std": np.ones(32)}, 3, "t")
    assert padded.a.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        ({"q01": [0.0]}, "missing: q99"),
        ({"q01": [0.0], "q99": []}, "q99: 0 values given, expected 1"),
        ({"q01": [0.0], "q99": [float("nan")]}, "NaN"),
        ({"q01": [2.0], "q99": [1.0]}, "q99 is below q01 in dimension 0"),
    ],
)
def test_statistics_that_cannot_be_are_refused(statistics, words) -> None:
    with pytest.raises(InputError, match=words):
        Normalization.of("quantiles", "openpi", statistics, 1, "t")


def test_discretisation_at_the_edges() -> None:
    recorded = RECORDED["discretize"]
    assert discretize(np.array(recorded["x"])).tolist() == recorded["bins"]
    assert discretize(np.array([-1.5, -1.0, 0.0, 1.0, 9.0])).tolist() == [-1, 0, 128, 255, 255]
