"""Messages of sensors, taken by a thread of their own."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable

import pytest

if importlib.util.find_spec("rclpy") is None:
    pytest.skip("rclpy is not installed", allow_module_level=True)

import rclpy
from hybrid_policy.ros.receiver import Receiver, ReceiverGroup
from rclpy.executors import SingleThreadedExecutor
from std_msgs.msg import Int32, String

from .rig import claim_domain  # isort: skip

pytestmark = pytest.mark.ros


def until(ready: Callable[[], bool], act: Callable[[], None], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "nothing came in time"
        act()
        time.sleep(0.02)


def test_every_message_reaches_its_callback_without_an_executor() -> None:
    domain, _claim = claim_domain()
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain)
    node = rclpy.create_node("receiving", context=context)
    group = ReceiverGroup()
    numbers: list[int] = []
    texts: list[str] = []
    errors: list[Exception] = []

    def on_text(message: String) -> None:
        if message.data == "bad":
            raise ValueError("a callback that raises")
        texts.append(message.data)

    subscriptions = [
        node.create_subscription(Int32, "numbers", lambda m: numbers.append(m.data), 100, callback_group=group),
        node.create_subscription(String, "texts", on_text, 100, callback_group=group),
    ]
    number, text = node.create_publisher(Int32, "numbers", 100), node.create_publisher(String, "texts", 100)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        until(lambda: number.get_subscription_count() > 0 and text.get_subscription_count() > 0, lambda: None)
        number.publish(Int32(data=-1))
        for _ in range(5):
            executor.spin_once(timeout_sec=0.05)
        assert numbers == []  # the executor leaves them to the receiver
        receiver = Receiver(node, subscriptions, errors.append)
        until(lambda: -1 in numbers, lambda: None)
        text.publish(String(data="bad"))
        for k in range(50):
            number.publish(Int32(data=k))
        text.publish(String(data="good"))
        until(lambda: len(numbers) == 51 and texts == ["good"], lambda: None)
        assert numbers == [-1, *range(50)]
        assert [str(error) for error in errors] == ["a callback that raises"]
        receiver.close()
        number.publish(Int32(data=99))
        time.sleep(0.2)
        assert 99 not in numbers
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
