"""Messages to numpy, fully checked: the same functions for live topics and for bags.

Messages are duck-typed (``rclpy`` messages and ``rosbags`` dataclasses have the same attributes).
Receiving is apart from decoding: ``check_*`` and ``joint_positions`` are cheap and belong in a
subscription; ``decode_image`` belongs in the inference thread. Whatever a message holds, the only
exception that leaves this module is :class:`InputError`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.robot_file import Camera
from hybrid_policy.errors import InputError

CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1, "rgba8": 4, "bgra8": 4}
#: No robot camera is larger; a message that claims to be is refused before anything is allocated.
MAX_PIXELS = 8192 * 8192
MAX_PROMPT_BYTES = 4096
#: encodings before image_transport's compression that are no pictures: depth, or deeper than a policy was shown
_DEEP = ("16", "32", "64", "mono16")
_MAX_NAMES = 4096
_UINT32 = 2**32 - 1
_INT32 = 2**31 - 1


def stamp_ns(message: Any) -> int:
    """Nanoseconds of ``message.header.stamp``.

    Raises:
        InputError: there is none, its seconds are not an int32 of at least 0 (builtin_interfaces/Time) or
            its nanoseconds not below 1e9; or it is 0 (an unstamped message cannot be synchronised).
    """
    try:
        seconds, nanoseconds = int(message.header.stamp.sec), int(message.header.stamp.nanosec)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise InputError(f"header.stamp: {_show(message)} given, expected seconds and nanoseconds") from None
    if not 0 <= seconds <= _INT32 or not 0 <= nanoseconds < 1_000_000_000:
        raise InputError(
            f"header.stamp: {_show(seconds)} s {_show(nanoseconds)} ns given, "
            f"expected 0 to {_INT32} s and 0 to 999999999 ns"
        )
    if seconds == 0 and nanoseconds == 0:
        raise InputError("header.stamp: 0 given, expected the time at which the data was captured")
    return seconds * 1_000_000_000 + nanoseconds


def check_image(message: Any, camera: Camera) -> None:
    """Whether an Image or CompressedImage can be decoded, without decoding it (microseconds).

    Raises:
        InputError: wrong encoding or format; ``height``, ``width``, ``step`` and ``data`` disagree.
    """
    if camera.type == "compressed":
        _compressed_size(message, camera)
    else:
        _raw_layout(message, camera)


def decode_image(message: Any, camera: Camera) -> NDArray[np.uint8]:
    """uint8 [height, width, 3], RGB, of an Image (`CHANNELS`) or a CompressedImage (JPEG, PNG).

    A view of the message's own memory where the layout allows it: do not write into it.

    Raises:
        InputError: as :func:`check_image`, or the compressed data is damaged.
    """
    if camera.type == "compressed":
        return _decode_compressed(message, camera)
    data, height, width, step, encoding = _raw_layout(message, camera)
    channels = CHANNELS[encoding]
    rows = data.reshape(height, step)[:, : width * channels]
    pixels = rows.reshape(height, width, channels)
    if encoding in ("bgr8", "bgra8"):
        return pixels[:, :, 2::-1]
    if encoding == "rgba8":
        return pixels[:, :, :3]
    if encoding == "mono8":
        return np.broadcast_to(pixels, (height, width, 3))
    return pixels


def joint_positions(message: Any, names: Sequence[str]) -> NDArray[np.float64]:
    """float64 [joints]: the positions of a JointState in the order of ``names``; others are ignored.

    Raises:
        InputError: a joint is missing or named twice, ``name`` and ``position`` differ in length, or
            a position is not finite.
    """
    given = _attribute(message, "name")
    positions = _attribute(message, "position")
    try:
        given = [str(name) for name in given[: _MAX_NAMES + 1]]
        values = np.asarray(positions, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        raise InputError("joint state: name, position: not lists, expected names and numbers") from None
    if len(given) > _MAX_NAMES:
        raise InputError(f"joint state: name: more than {_MAX_NAMES} names given, expected the robot's joints")
    if len(given) != len(values):
        raise InputError(
            f"joint state: position: {len(values)} values given, expected {len(given)} (one for each name)"
        )
    ordered = values[_places(tuple(given), tuple(names))]
    finite = np.isfinite(ordered)
    if not finite.all():
        worst = int(np.argmin(finite))
        raise InputError(f"joint state: {names[worst]}: {ordered[worst]} given, expected a finite position")
    return ordered


@functools.lru_cache(maxsize=16)
def _places(given: tuple[str, ...], names: tuple[str, ...]) -> NDArray[np.intp]:
    """Where each of ``names`` is in ``given``: a driver names its joints in each message, always the same."""
    index = {name: i for i, name in enumerate(given)}
    missing = [name for name in names if name not in index]
    if missing:
        raise InputError(
            f"joint state: name: {len(given)} joints given, expected {', '.join(missing[:4])} too"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        )
    if len(index) != len(given):
        twice = next((name for name in names if given.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"joint state: name: {twice} given twice, expected each joint once")
    return np.array([index[name] for name in names], np.intp)


def prompt_text(message: Any) -> str:
    """The text of a std_msgs/String that is fit to be a prompt.

    Raises:
        InputError: empty, longer than 4096 bytes, or not UTF-8 (rclpy then leaves U+FFFD in it).
    """
    text = _attribute(message, "data")
    if not isinstance(text, str):
        raise InputError(f"prompt: {_show(text)} given, expected text")
    size = len(text.encode("utf-8", errors="replace"))
    if size > MAX_PROMPT_BYTES:
        raise InputError(f"prompt: {size} bytes given, expected at most {MAX_PROMPT_BYTES}")
    if "\ufffd" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(f"prompt: {_show(text)} given, expected valid UTF-8")
    if "\x00" in text:
        raise InputError(f"prompt: {_show(text)} given, expected text without NUL")
    if not text.strip():
        raise InputError("prompt: empty text given, expected a task")
    return text


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _attribute(message: Any, name: str) -> Any:
    try:
        return getattr(message, name)
    except AttributeError:
        raise InputError(f"message: {type(message).__name__} given, expected one with {name}") from None


def _bytes(message: Any, camera: Camera) -> NDArray[np.uint8]:
    data = _attribute(message, "data")
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 1:
            raise InputError(f"{camera.name}: data: {data.dtype} {data.shape} given, expected uint8 [bytes]")
        return np.ascontiguousarray(data)
    try:
        return np.frombuffer(memoryview(data).cast("B"), dtype=np.uint8)
    except (TypeError, ValueError):
        raise InputError(f"{camera.name}: data: {type(data).__name__} given, expected bytes") from None


def _raw_layout(message: Any, camera: Camera) -> tuple[NDArray[np.uint8], int, int, int, str]:
    encoding = _attribute(message, "encoding")
    if not isinstance(encoding, str) or encoding not in camera.encodings or encoding not in CHANNELS:
        raise InputError(f"{camera.name}: encoding: {_show(encoding)} given, expected {' or '.join(camera.encodings)}")
    try:
        height, width, step = (int(_attribute(message, key)) for key in ("height", "width", "step"))
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{camera.name}: height, width, step: not numbers, expected numbers") from None
    if not all(0 <= number <= _UINT32 for number in (height, width, step)):
        raise InputError(f"{camera.name}: height, width, step: beyond 32 bits, expected uint32 numbers")
    if height == 0 or width == 0 or height * width > MAX_PIXELS:
        raise InputError(f"{camera.name}: height x width: {height} x {width} given, expected 1 to {MAX_PIXELS} pixels")
    row = width * CHANNELS[encoding]
    if step < row:
        raise InputError(f"{camera.name}: step: {step} given, expected at least {row} ({width} pixels of {encoding})")
    data = _bytes(message, camera)
    if len(data) != step * height:
        raise InputError(
            f"{camera.name}: data: {len(data)} bytes given, expected {step * height} (step {step} x height {height})"
        )
    return data, height, width, step, encoding


def _compressed_size(message: Any, camera: Camera) -> NDArray[np.uint8]:
    """The data, once its header says a sane size: a few bytes must not allocate gigabytes."""
    kind = _attribute(message, "format")
    if not isinstance(kind, str) or "compressedDepth" in kind:
        raise InputError(f"{camera.name}: format: {_show(kind)} given, expected jpeg or png")
    if kind.startswith(_DEEP):
        raise InputError(f"{camera.name}: format: {_show(kind)} given, expected jpeg or png of 8 bits a channel")
    data = _bytes(message, camera)
    head = data[:24].tobytes()
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) == 24:
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    elif head.startswith(b"\xff\xd8"):
        width, height = _jpeg_size(data)
    else:
        raise InputError(f"{camera.name}: data: {_show(head[:8])} given, expected the start of a JPEG or PNG")
    if width <= 0 or height <= 0 or width * height > MAX_PIXELS:
        raise InputError(f"{camera.name}: data: {height} x {width} pixels given, expected 1 to {MAX_PIXELS} pixels")
    return data


def _jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) of the frame header (ITU T.81, B.2.2); (0, 0) where there is none."""
    at, end = 2, len(data)
    while at + 9 < end and data[at] == 0xFF:
        marker = int(data[at + 1])
        if marker == 0xFF or 0xD0 <= marker <= 0xD9 or marker == 0x01:
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int(data[at + 7]) << 8 | int(data[at + 8]), int(data[at + 5]) << 8 | int(data[at + 6])
        at += 2 + (int(data[at + 2]) << 8 | int(data[at + 3]))
    return 0, 0


def _decode_compressed(message: Any, camera: Camera) -> NDArray[np.uint8]:
    import cv2

    data = _compressed_size(message, camera)
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise InputError(f"{camera.name}: data: {_show(str(error))}, expected a whole JPEG or PNG") from None
    if pixels is None:
        raise InputError(f"{camera.name}: data: {len(data)} damaged bytes given, expected a whole JPEG or PNG")
    return np.asarray(pixels[:, :, ::-1], dtype=np.uint8)
