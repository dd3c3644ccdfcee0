"""Takes the messages of sensor subscriptions in a thread of its own.

An executor of rclpy gathers every entity of its nodes anew for each message (this node has some twenty:
services, timers, guards), which costs about a millisecond of Python, and as long the inference thread
waits for the interpreter. Here a wait set of the subscriptions alone is waited on, as
``rclpy.wait_for_message`` does, and the node's executor leaves them out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.subscription import Subscription

#: Nanoseconds after which a wait without messages looks whether it is to end.
_LOOK = 100_000_000


class ReceiverGroup(MutuallyExclusiveCallbackGroup):
    """A callback group that no executor runs.

    Nor the events of its subscriptions: an executor that waits for those wakes up with every message
    (in Fast DDS both are one condition). The only one that rclpy listens to by itself, an incompatible
    QoS, cannot come where best effort and volatile are asked for.
    """

    def can_execute(self, entity: Any) -> bool:
        """Never."""
        return False


class Receiver:
    """Waits for the messages of subscriptions of one node and hands each to its callback.

    subscriptions: created in a :class:`ReceiverGroup`. on_error: told of what taking a message or a
    callback raises; the thread goes on.
    """

    def __init__(
        self, node: Node, subscriptions: Sequence[Subscription[Any]], on_error: Callable[[Exception], None]
    ) -> None:
        self._context, self._subscriptions, self._on_error = node.context, list(subscriptions), on_error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="receiver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the subscriptions may be destroyed then."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        wait_set = rclpy_implementation.WaitSet(len(self._subscriptions), 0, 0, 0, 0, 0, self._context.handle)
        while not self._stop.is_set() and self._context.ok():
            wait_set.clear_entities()
            for subscription in self._subscriptions:
                wait_set.add_subscription(subscription.handle)
            wait_set.wait(_LOOK)
            ready = wait_set.get_ready_entities("subscription")
            for subscription in self._subscriptions:
                if subscription.handle.pointer in ready and not self._stop.is_set():
                    self._take(subscription)

    def _take(self, subscription: Subscription[Any]) -> None:
        try:
            taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
            if taken is not None:
                subscription.callback(taken[0])
        except Exception as error:  # a message that cannot even be unpacked must not end the thread
            self._on_error(error)
