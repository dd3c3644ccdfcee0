"""A bag read by ``rosbag2_py``, where a ROS 2 installation brings it: any storage plugin it has."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import BagMessage, BagTopic


class Rosbag2Source:
    """The ``BagSource`` over ``rosbag2_py.SequentialReader``."""

    def __init__(self, path: Path) -> None:
        """Open once to learn the topics.

        Raises:
            InputError: rosbag2_py is not installed, or cannot open the bag.
        """
        try:
            import rosbag2_py
        except ImportError as error:
            raise InputError(
                "--backend rosbag2_py: not importable; source a ROS 2 installation or use --backend rosbags"
            ) from error
        self._rosbag2 = rosbag2_py
        self.path = path
        self.problems: list[str] = []
        reader = self._reader()
        counts = {
            entry.topic_metadata.name: entry.message_count for entry in reader.get_metadata().topics_with_message_count
        }
        self._topics = {
            topic.name: BagTopic(topic.name, topic.type, counts.get(topic.name))
            for topic in reader.get_all_topics_and_types()
        }

    @property
    def topics(self) -> Mapping[str, BagTopic]:
        """Topics by name."""
        return self._topics

    def messages(self, topics: Collection[str] = ()) -> Iterator[BagMessage]:
        """Messages of ``topics`` (all, if empty) in the order of recording."""
        reader = self._reader()
        if topics:
            reader.set_filter(self._rosbag2.StorageFilter(topics=sorted(topics)))
        try:
            while reader.has_next():
                name, data, t_ns = reader.read_next()
                yield BagMessage(name, self._topics[name].type, int(t_ns), memoryview(data))
        except RuntimeError as error:
            self.problems.append(f"{self.path.name}: rosbag2 stopped: {error}")

    def close(self) -> None:
        """Nothing stays open between passes."""

    def _reader(self):  # type: ignore[no-untyped-def]
        reader = self._rosbag2.SequentialReader()
        options = self._rosbag2.StorageOptions(uri=str(self.path), storage_id="")
        converter = self._rosbag2.ConverterOptions("cdr", "cdr")
        try:
            reader.open(options, converter)
        except RuntimeError as error:
            raise InputError(f"{self.path}: rosbag2 cannot open it: {error}") from error
        return reader
