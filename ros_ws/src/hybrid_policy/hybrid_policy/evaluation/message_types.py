"""CDR bytes to Python objects: by the bag's own definitions, else by the standard ones.

Humble's sqlite3 bags carry no definitions. Standard messages are known to rosbags; the controllers'
state, which recordings of real arms hold, is not, and has had three forms: all are tried.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import BagMessage, BagTopic

CONTROLLER_STATE = "control_msgs/msg/JointTrajectoryControllerState"
_POINT = "trajectory_msgs/JointTrajectoryPoint"
_MULTI = "trajectory_msgs/MultiDOFJointTrajectoryPoint"


def _controller_state(names: str, *, multi_dof: bool) -> str:
    lines = ["std_msgs/Header header", "string[] joint_names"]
    lines += [f"{_POINT} {name}" for name in names.split()]
    if multi_dof:
        lines += ["string[] multi_dof_joint_names"]
        lines += [f"{_MULTI} multi_dof_{name}" for name in names.split()]
    return "\n".join(lines) + "\n"


#: Iron and later; the years of transition; Humble and earlier.
_CONTROLLER_STATES = (
    _controller_state("reference feedback error output", multi_dof=True),
    _controller_state("reference feedback error output desired actual", multi_dof=True),
    _controller_state("desired actual error", multi_dof=False),
)


class Decoder:
    """Deserialises the messages of one bag."""

    def __init__(self, topics: Mapping[str, BagTopic]) -> None:
        self._definitions = {t.type: (t.encoding, t.definition) for t in topics.values() if t.definition}
        self._stores: dict[str, list[Any]] = {}

    def knows(self, kind: str) -> bool:
        """Whether messages of this type can be deserialised."""
        try:
            self._candidates(kind)
        except InputError:
            return False
        return True

    def decode(self, message: BagMessage) -> Any:
        """The message as a dataclass with the fields of its type; arrays are views on its bytes.

        Raises:
            InputError: the type is unknown, or the bytes are not one whole message of it.
        """
        from rosbags.serde import SerdeError

        stores = self._candidates(message.type)
        reason: Exception | None = None
        for store in stores:
            try:
                decoded = store.deserialize_cdr(message.data, message.type)
            except (SerdeError, struct.error, ValueError, IndexError, AssertionError, OverflowError) as error:
                reason = error
                continue
            if len(stores) > 1:
                self._stores[message.type] = [store]
            return decoded
        raise InputError(
            f"{message.topic}: {len(message.data)} bytes at {message.t_ns} ns are no {message.type} ({reason})"
        )

    def _candidates(self, kind: str) -> list[Any]:
        if kind not in self._stores:
            self._stores[kind] = self._build(kind)
        return self._stores[kind]

    def _build(self, kind: str) -> list[Any]:
        from rosbags.typesys import Stores, TypesysError, get_typestore

        if kind in self._definitions:
            try:
                store = get_typestore(Stores.EMPTY)
                store.register(_parse(kind, *self._definitions[kind]))
                store.get_msgdef(kind)
            except (TypesysError, KeyError, ValueError):
                pass  # a definition that rosbags cannot parse: the standard one may still fit
            else:
                return [store]
        standard = get_typestore(Stores.LATEST)
        if kind in standard.fielddefs:
            return [standard]
        if kind == CONTROLLER_STATE:
            return [_with(definition) for definition in _CONTROLLER_STATES]
        raise InputError(f"{kind}: the bag carries no definition of this type, and it is no standard one")


def _parse(kind: str, encoding: str, definition: str) -> Any:
    from rosbags.typesys import get_types_from_idl, get_types_from_msg

    if encoding != "ros2idl":
        return get_types_from_msg(definition, kind)
    types: Any = {}
    for part in definition.split("=" * 80 + "\n"):
        body = part.split("\n", 1)[1] if part.startswith("IDL: ") else part
        if body.strip():
            types.update(get_types_from_idl(body))
    return types


def _with(definition: str) -> Any:
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.LATEST)
    store.register(get_types_from_msg(definition, CONTROLLER_STATE))
    return store
