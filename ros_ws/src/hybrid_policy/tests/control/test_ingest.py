"""Messages to numpy: what is right comes through unchanged, what is wrong is one InputError."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hybrid_policy.control import ingest
from hybrid_policy.control.robot_file import Camera
from hybrid_policy.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st

from .synthetic import header, image, joint_state  # isort: skip

RAW = Camera("cam", "cam/image_raw")
JPEG = Camera("cam", "cam/compressed", type="compressed")


def compressed(pixels: Any, suffix: str = ".jpg") -> Any:
    _, data = cv2.imencode(suffix, pixels[:, :, ::-1])
    return SimpleNamespace(header=header(10**9), format="jpeg", data=data.tobytes())


def test_each_encoding() -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    message = image(10**9, height=4, width=5)
    message.data = pixels.tobytes()
    np.testing.assert_array_equal(ingest.decode_image(message, RAW), pixels)
    message.encoding = "bgr8"
    np.testing.assert_array_equal(ingest.decode_image(message, RAW), pixels[:, :, ::-1])
    message.encoding, message.step, message.data = "mono8", 5, pixels[:, :, 0].tobytes()
    np.testing.assert_array_equal(ingest.decode_image(message, RAW), np.repeat(pixels[:, :, :1], 3, axis=2))
    opaque = np.dstack((pixels, np.full((4, 5), 255, np.uint8)))
    message.encoding, message.step, message.data = "rgba8", 20, opaque.tobytes()
    np.testing.assert_array_equal(ingest.decode_image(message, RAW), pixels)
    message.encoding = "bgra8"
    np.testing.assert_array_equal(ingest.decode_image(message, RAW), pixels[:, :, ::-1])


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda b: np.frombuffer(b, np.uint8), memoryview])
def test_each_kind_of_data_and_padded_rows(kind: Any) -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 15)
    padded = np.zeros((4, 20), np.uint8)
    padded[:, :15] = pixels
    message = image(10**9, height=4, width=5)
    message.step, message.data = 20, kind(padded.tobytes())
    np.testing.assert_array_equal(ingest.decode_image(message, RAW), pixels.reshape(4, 5, 3))


def test_jpeg_and_png() -> None:
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:, :, 0] = 200
    np.testing.assert_array_equal(ingest.decode_image(compressed(pixels, ".png"), JPEG), pixels)
    assert np.abs(ingest.decode_image(compressed(pixels), JPEG).astype(int) - pixels).max() < 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoding": "16UC1"}, "encoding: '16UC1' given, expected rgb8 or bgr8 or mono8"),
        ({"encoding": None}, "encoding: None given"),
        ({"height": 0}, "height x width: 0 x 8"),
        ({"height": 2**31, "width": 2**31}, "expected 1 to"),
        ({"step": 3}, "step: 3 given, expected at least 24"),
        ({"data": b"123"}, "data: 3 bytes given, expected 144"),
        ({"data": "text"}, "data: str given, expected bytes"),
        ({"data": np.zeros(144, np.float32)}, "data: float32"),
        ({"height": "six"}, "not numbers"),
    ],
)
def test_wrong_images(change: dict[str, Any], said: str) -> None:
    message = image(10**9)
    for key, value in change.items():
        setattr(message, key, value)
    with pytest.raises(InputError, match=said):
        ingest.check_image(message, RAW)


def test_wrong_compressed_images() -> None:
    whole = compressed(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for data, said in [
        (b"", "expected the start of a JPEG or PNG"),
        (b"GIF89a", "expected the start"),
        (b"\xff\xd8\xff\xe0", "0 x 0 pixels"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 8 + b"\0\1\0\0" * 2, "65536 x 65536 pixels"),
    ]:
        whole.data = data
        with pytest.raises(InputError, match=said):
            ingest.check_image(whole, JPEG)


@pytest.mark.parametrize("kind", ["16UC1; png compressed ", "32FC1; png compressed", "mono16; png compressed mono16"])
def test_a_depth_image_is_no_picture_because_it_is_compressed(kind: str) -> None:
    message = compressed(np.zeros((8, 8, 3), np.uint8))
    message.format = kind
    with pytest.raises(InputError, match="8 bits a channel"):
        ingest.check_image(message, JPEG)
    message.format = "rgb8; jpeg compressed bgr8"
    ingest.check_image(message, JPEG)


def test_joints_by_name_in_any_order() -> None:
    message = joint_state(10**9, ["c", "b", "a"], [3.0, 2.0, 1.0])
    assert ingest.joint_positions(message, ["a", "b"]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("names", "positions", "said"),
    [
        (["a"], [1.0], "expected b too"),
        (["a", "b"], [1.0], "position: 1 values given, expected 2"),
        (["a", "b"], [1.0, float("nan")], "b: nan given"),
        (["a", "b"], [1.0, float("inf")], "b: inf given"),
        (["a", "b", "b"], [1.0, 2.0, 3.0], "b given twice"),
        (["a", "b"], ["x", "y"], "not lists"),
        ([], [], "expected a, b too"),
    ],
)
def test_wrong_joint_states(names: Any, positions: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ingest.joint_positions(joint_state(10**9, names, positions), ["a", "b"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("x" * 100_000, "100000 bytes given, expected at most 4096"),
        ("caf\ufffd", "valid UTF-8"),
        ("a\x00b", "NUL"),
        (None, "expected text"),
    ],
)
def test_wrong_prompts(text: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ingest.prompt_text(SimpleNamespace(data=text))


def test_stamps() -> None:
    assert ingest.stamp_ns(image(1_234_567_890_123)) == 1_234_567_890_123
    wrong = [(0, 0), (-1, 0), (1, 10**9), (1, -1), ("x", 0), (float("inf"), 0), (2**31, 0), (1.9e298, 0), (0, -1e223)]
    for seconds, nanoseconds in wrong:
        message = image(10**9)
        message.header.stamp = SimpleNamespace(sec=seconds, nanosec=nanoseconds)
        with pytest.raises(InputError, match=r"header\.stamp") as caught:
            ingest.stamp_ns(message)
        assert len(str(caught.value)) < 250  # also where the number itself has 300 digits
    with pytest.raises(InputError, match=r"header\.stamp"):
        ingest.stamp_ns(SimpleNamespace())


# Whatever arrives, nothing but InputError leaves.

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=40),
    st.lists(st.one_of(st.floats(), st.text(max_size=5), st.integers(-(2**65), 2**65)), max_size=6),
)
numbers = st.one_of(st.integers(-5, 40), st.integers(-(2**65), 2**65), anything)
stamps = st.builds(lambda s, n: SimpleNamespace(sec=s, nanosec=n), numbers, numbers)
headers = st.one_of(st.builds(lambda s: SimpleNamespace(stamp=s), st.one_of(stamps, anything)), anything)
JPEG_BYTES = compressed(np.zeros((8, 8, 3), np.uint8)).data
PNG_BYTES = compressed(np.zeros((8, 8, 3), np.uint8), ".png").data


@st.composite
def damaged(draw: Any) -> bytes:
    """A real file with a few bytes changed or cut off."""
    data = bytearray(draw(st.sampled_from([JPEG_BYTES, PNG_BYTES])))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


@st.composite
def raw_images(draw: Any) -> Any:
    """Near misses: mostly consistent, one or two fields off."""
    message = image(draw(st.integers(0, 2**62)), 1, draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    for key in draw(st.lists(st.sampled_from(["height", "width", "step", "encoding", "data"]), max_size=2)):
        setattr(message, key, draw(st.one_of(numbers, st.sampled_from(["rgb8", "mono8", "bgr8"]), anything)))
    return message


def survives(call: Any) -> None:
    said = "ok"
    try:
        call()
    except InputError as error:
        said = str(error)
    assert 0 < len(said) < 500


@settings(max_examples=4000, deadline=None)
@given(message=raw_images(), head=headers)
def test_fuzzed_images(message: Any, head: Any) -> None:
    survives(lambda: ingest.decode_image(message, RAW))
    message.header = head
    survives(lambda: ingest.stamp_ns(message))


@settings(max_examples=2500, deadline=None)
@given(data=st.one_of(damaged(), anything), kind=st.one_of(st.sampled_from(["jpeg", "png", ""]), anything))
def test_fuzzed_compressed_images(data: Any, kind: Any) -> None:
    survives(lambda: ingest.decode_image(SimpleNamespace(format=kind, data=data), JPEG))


@settings(max_examples=3000, deadline=None)
@given(
    names=st.one_of(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=4), anything),
    positions=st.one_of(st.lists(st.floats(), max_size=4), anything),
)
def test_fuzzed_joint_states(names: Any, positions: Any) -> None:
    message = SimpleNamespace(name=names, position=positions)

    def call() -> None:
        values = ingest.joint_positions(message, ["a", "b"])
        assert values.shape == (2,)
        assert np.isfinite(values).all()

    survives(call)


@settings(max_examples=1500, deadline=None)
@given(data=st.one_of(st.text(), anything))
def test_fuzzed_prompts(data: Any) -> None:
    survives(lambda: ingest.prompt_text(SimpleNamespace(data=data)))
