"""Write a bag without ROS: mcap or sqlite3, with definitions, that rosbag2 and Foxglove open."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError

STORAGE = ("mcap", "sqlite3")
COMPRESSION = ("none", "chunk", "message", "file")


class BagWriter:
    """A new bag at ``path`` (a folder, made here). Use as a context; it is whole only after exit.

    storage: ``mcap`` or ``sqlite3``.
    compression: ``none``; ``chunk`` (mcap's own, zstd); ``message`` or ``file`` (rosbag2's, zstd).
    """

    def __init__(self, path: Path, storage: str = "mcap", compression: str = "none") -> None:
        """Open the bag.

        Raises:
            InputError: something is at ``path`` already, or it cannot be written.
        """
        from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore

        if storage not in STORAGE:
            raise InputError(f"storage: {storage!r} given, expected {' or '.join(STORAGE)}")
        if compression not in COMPRESSION or (storage == "sqlite3" and compression == "chunk"):
            raise InputError(f"compression: {compression!r} given with {storage}, expected none, message or file")
        if path.exists():
            raise InputError(f"{path}: exists already, expected a new folder for the bag")
        self.path = path
        self.types = get_typestore(Stores.ROS2_JAZZY)
        plugin = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}[storage]
        self._writer = Writer(path, version=8, storage_plugin=plugin)
        if compression != "none":
            mode = CompressionMode.STORAGE if compression == "chunk" else CompressionMode[compression.upper()]
            self._writer.set_compression(mode, CompressionFormat.ZSTD)
        try:
            self._writer.open()
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        self._connections: dict[str, Any] = {}

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, topic: str, kind: str, message: Any, t_ns: int) -> None:
        """Append a message object (a rosbags dataclass, or any object with its fields)."""
        self.write_raw(topic, kind, self.types.serialize_cdr(message, kind), t_ns)

    def write_raw(self, topic: str, kind: str, data: bytes | memoryview, t_ns: int) -> None:
        """Append a message's CDR bytes."""
        connection = self._connections.get(topic)
        if connection is None:
            connection = self._writer.add_connection(topic, kind, typestore=self.types)
            self._connections[topic] = connection
        self._writer.write(connection, t_ns, data)

    # Messages, built for this bag's types.

    def stamp(self, t_ns: int) -> Any:
        """builtin_interfaces/Time of nanoseconds."""
        return self.types.types["builtin_interfaces/msg/Time"](sec=t_ns // 1_000_000_000, nanosec=t_ns % 1_000_000_000)

    def header(self, t_ns: int, frame: str = "") -> Any:
        """std_msgs/Header."""
        return self.types.types["std_msgs/msg/Header"](stamp=self.stamp(t_ns), frame_id=frame)

    def joint_state(self, t_ns: int, names: list[str], positions: NDArray[np.float64]) -> Any:
        """sensor_msgs/JointState of positions (rad or m)."""
        empty = np.empty(0)
        return self.types.types["sensor_msgs/msg/JointState"](
            header=self.header(t_ns),
            name=names,
            position=np.ascontiguousarray(positions, dtype=np.float64),
            velocity=empty,
            effort=empty,
        )

    def jpeg(self, t_ns: int, data: bytes, frame: str = "") -> Any:
        """sensor_msgs/CompressedImage of a JPEG file's bytes."""
        return self.types.types["sensor_msgs/msg/CompressedImage"](
            header=self.header(t_ns, frame), format="jpeg", data=np.frombuffer(data, np.uint8)
        )

    def image(self, t_ns: int, pixels: NDArray[np.uint8], frame: str = "") -> Any:
        """sensor_msgs/Image of uint8 [height, width, 3] RGB."""
        height, width, channels = pixels.shape
        return self.types.types["sensor_msgs/msg/Image"](
            header=self.header(t_ns, frame),
            height=height,
            width=width,
            encoding="rgb8",
            is_bigendian=0,
            step=width * channels,
            data=np.ascontiguousarray(pixels).reshape(-1),
        )

    def text(self, value: str) -> Any:
        """std_msgs/String."""
        return self.types.types["std_msgs/msg/String"](data=value)

    def trajectory(self, t_ns: int, names: list[str], positions: NDArray[np.float64], times: NDArray[np.int64]) -> Any:
        """trajectory_msgs/JointTrajectory: positions [points, joints], due ``times`` [points] ns after it."""
        point = self.types.types["trajectory_msgs/msg/JointTrajectoryPoint"]
        duration = self.types.types["builtin_interfaces/msg/Duration"]
        empty = np.empty(0)
        points = [
            point(
                positions=np.ascontiguousarray(row, dtype=np.float64),
                velocities=empty,
                accelerations=empty,
                effort=empty,
                time_from_start=duration(sec=int(t) // 1_000_000_000, nanosec=int(t) % 1_000_000_000),
            )
            for row, t in zip(positions, times)
        ]
        return self.types.types["trajectory_msgs/msg/JointTrajectory"](
            header=self.header(t_ns), joint_names=names, points=points
        )

    def floats(self, values: NDArray[np.float64]) -> Any:
        """std_msgs/Float64MultiArray of a vector."""
        layout = self.types.types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
        return self.types.types["std_msgs/msg/Float64MultiArray"](
            layout=layout, data=np.ascontiguousarray(values, dtype=np.float64)
        )

    def twist(self, t_ns: int, values: NDArray[np.float64], frame: str = "base_link") -> Any:
        """geometry_msgs/TwistStamped of (x, y, z, roll, pitch, yaw) in m/s and rad/s."""
        vector = self.types.types["geometry_msgs/msg/Vector3"]
        linear, angular = (vector(x=float(v[0]), y=float(v[1]), z=float(v[2])) for v in (values[:3], values[3:6]))
        return self.types.types["geometry_msgs/msg/TwistStamped"](
            header=self.header(t_ns, frame),
            twist=self.types.types["geometry_msgs/msg/Twist"](linear=linear, angular=angular),
        )
