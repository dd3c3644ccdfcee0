"""What drivers can do wrong, each as a change of right messages, and what has to be said of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .rig import Faults  # isort: skip

SECOND = 1_000_000_000


def shift_stamp(message: Any, nanoseconds: int) -> Any:
    total = message.header.stamp.sec * SECOND + message.header.stamp.nanosec + nanoseconds
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(total, SECOND)
    return message


def on_front(change: Callable[[Any, int], Any]) -> Callable[[str, Any, int], Any]:
    return lambda camera, message, count: change(message, count) if camera == "front" else message


def changed(**fields: Any) -> Callable[[Any, int], Any]:
    def change(message: Any, count: int) -> Any:
        for key, value in fields.items():
            setattr(message, key, value)
        return message

    return change


def every_second(message: Any, count: int) -> Any:
    return message if count % 2 == 0 else None


def swapped(message: Any, count: int) -> Any:
    """Every fourth image is stamped as if it were older than the one before."""
    return shift_stamp(message, -70_000_000) if count % 4 == 0 else message


def twice(message: Any, count: int) -> Any:
    """Every second image repeats the stamp of the one before (its own time, rounded down)."""
    step = 100_000_000
    total = message.header.stamp.sec * SECOND + message.header.stamp.nanosec
    return shift_stamp(message, total // step * step - total)


def without_elbow(message: Any) -> Any:
    message.name, message.position = (
        [message.name[0], message.name[2]],
        [message.position[0], message.position[2]],
    )
    return message


def reordered(message: Any) -> Any:
    message.name, message.position = ["x", *message.name[::-1]], [9.0, *message.position[::-1]]
    return message


def position(index: int, value: float) -> Callable[[Any], Any]:
    def change(message: Any) -> Any:
        positions = list(message.position)
        positions[index] = value
        message.position = positions
        return message

    return change


@dataclass(frozen=True)
class Case:
    """faults: injected; said: in the diagnostics; holds: whether the robot must stand."""

    name: str
    faults: Faults
    said: str
    holds: bool = True


CASES = [
    Case("camera stops", Faults(image=on_front(lambda m, n: None)), r"front: [\d.]+ s old"),
    Case("camera freezes", Faults(frozen="front"), "front: identical frames for"),
    Case("camera halves its rate", Faults(image=on_front(every_second)), "messages/s, expected 20", False),
    Case(
        "camera 5 s back",
        Faults(image=on_front(lambda m, n: shift_stamp(m, -5 * SECOND))),
        r"front: 5[\d.]+ s old",
    ),
    Case("camera 2 s ahead", Faults(image=on_front(lambda m, n: shift_stamp(m, 2 * SECOND))), "in the future"),
    Case(
        "camera 0.3 s late",
        Faults(image=on_front(lambda m, n: shift_stamp(m, -SECOND * 3 // 10))),
        "",
        False,
    ),
    Case("camera repeats stamps", Faults(image=on_front(twice)), "", False),
    Case("camera out of order", Faults(image=on_front(swapped)), "", False),
    Case(
        "camera of another size",
        Faults(image=on_front(changed(width=640, height=480))),
        r"front: [\d.]+ s old",
    ),
    Case(
        "camera of another encoding",
        Faults(image=on_front(changed(encoding="yuv422"))),
        r"front: [\d.]+ s old",
    ),
    Case("camera data truncated", Faults(image=on_front(changed(data=b"\0" * 100))), r"front: [\d.]+ s old"),
    Case(
        "camera unstamped",
        Faults(image=on_front(lambda m, n: shift_stamp(m, -time.time_ns()))),
        r"front: [\d.]+ s old",
    ),
    Case("joints stop", Faults(joints=lambda m: None), r"joints: [\d.]+ s old"),
    Case("joint missing", Faults(joints=without_elbow), r"joints: [\d.]+ s old"),
    Case("joints reordered", Faults(joints=reordered), "", False),
    Case("joint NaN", Faults(joints=position(1, float("nan"))), r"joints: [\d.]+ s old"),
    Case("joint out of limits", Faults(joints=position(0, 40.0)), r"joints: [\d.]+ s old"),
    Case("joints late", Faults(joints=lambda m: shift_stamp(m, -SECOND * 3 // 10)), r"joints: 0.3\d s old"),
]
