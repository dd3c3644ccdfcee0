"""Bags of every kind through one door: sqlite3 and mcap, compressed, split, or damaged.

``open_bag(path)`` gives a ``BagSource``: topics with their types and counts, messages in the order they
were recorded, one file at a time and never more than a chunk in memory. What cannot be read is a line
in ``problems``, and what can is given. rosbags reads whole bags; a file that rosbags refuses (killed
recorder, no index, full disk, broken copy) is walked record by record as far as it goes.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import yaml

from hybrid_policy.errors import InputError
from hybrid_policy.evaluation import bag_files

_STORAGE = (".mcap", ".db3")
_PACKED = (".zstd", ".zst")  # rosbag2 writes the first
_METADATA = "metadata.yaml"


@dataclass(frozen=True)
class BagTopic:
    """A topic of a bag.

    count: messages on it; None where no index says so and the file was not walked.
    encoding, definition: the message definition that the bag carries (ros2msg or ros2idl), else empty.
    """

    name: str
    type: str
    count: int | None
    encoding: str = ""
    definition: str = ""


@dataclass(frozen=True)
class BagMessage:
    """A message as recorded: ``t_ns`` is when the recorder got it, ``data`` its CDR bytes."""

    topic: str
    type: str
    t_ns: int
    data: memoryview


class BagSource(Protocol):
    """What the replay asks of a bag, whoever reads it."""

    path: Path
    problems: list[str]

    @property
    def topics(self) -> Mapping[str, BagTopic]:
        """Topics by name."""
        ...

    def messages(self, topics: Collection[str]) -> Iterator[BagMessage]:
        """Messages of ``topics`` (all, if empty) in the order of recording, streamed."""
        ...

    def close(self) -> None:
        """Free what was opened or unpacked."""
        ...


class RosbagsSource:
    """A bag read by rosbags, and by the scanners of this package where rosbags gives up."""

    def __init__(self, path: Path) -> None:
        """Find the bag's files and topics.

        Raises:
            InputError: there is no bag at ``path``, or none of its files can be read.
        """
        self.path = path
        self.problems: list[str] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._files = self._find_files()
        self._topics: dict[str, BagTopic] = {}
        readable = []
        for file in self._files:
            try:
                found = bag_files.topics(self._plain(file), self.problems)
            except InputError as error:
                self.problems += [line for line in str(error).splitlines() if line not in self.problems]
                continue
            readable.append(file)
            for topic in found:
                if isinstance(topic.name, str) and isinstance(topic.type, str):  # not so in a damaged database
                    self._add(topic)
        if not readable:
            raise InputError("\n".join(self.problems) or f"{path}: no readable file")
        self._files = readable

    def _add(self, found: bag_files.FoundTopic) -> None:
        known = self._topics.get(found.name)
        if known is None:
            self._topics[found.name] = BagTopic(found.name, found.type, found.count, found.encoding, found.definition)
        elif known.type != found.type:
            self.problems.append(
                f"{self.path.name}: topic {found.name} has two types, {known.type} and {found.type}: "
                "only the first is read"
            )
        else:
            counts = (known.count, found.count)
            total = None if None in counts else sum(c for c in counts if c is not None)
            self._topics[found.name] = replace(known, count=total)

    @property
    def topics(self) -> Mapping[str, BagTopic]:
        """Topics by name."""
        return self._topics

    def messages(self, topics: Collection[str] = ()) -> Iterator[BagMessage]:
        """Messages of ``topics`` (all, if empty) in the order of recording, streamed.

        Damage met on the way is added to ``problems``. Times step backwards only where the recorder's
        clock did, between two files.
        """
        wanted = set(topics or self._topics)
        for file in self._files:
            for topic, kind, t_ns, data in bag_files.messages(self._plain(file), wanted, self.problems):
                known = self._topics.get(topic)
                if known is None or known.type == kind:
                    yield BagMessage(topic, kind, t_ns, data)

    def close(self) -> None:
        """Remove what was unpacked."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _find_files(self) -> list[Path]:
        if not self.path.exists():
            raise InputError(f"{self.path}: no such bag")
        if self.path.is_file():
            _check_name(self.path)
            return [self.path]
        listed = self._listed()
        present = sorted((p for p in self.path.iterdir() if _is_storage(p)), key=_natural)
        if listed is None:
            files = present
        else:
            files = [p for p in listed if p.exists()]
            missing = [p.name for p in listed if not p.exists()]
            if missing:
                self.problems.append(
                    f"{self.path.name}: {len(missing)} of {len(listed)} files that metadata.yaml names "
                    f"are missing: {', '.join(missing[:5])}"
                )
            if not files and present:
                self.problems.append(f"{self.path.name}: read instead: {', '.join(p.name for p in present)}")
                files = present
        if not files:
            raise InputError(
                f"{self.path}: no storage file, expected *.mcap or *.db3"
                + ("" if listed is None else " (metadata.yaml names files that are not there)")
            )
        return files

    def _listed(self) -> list[Path] | None:
        """The files in metadata.yaml's order, or None where it cannot be used."""
        metadata = self.path / _METADATA
        if not metadata.exists():
            self.problems.append(
                f"{self.path.name}: no metadata.yaml (the recorder did not finish): files read in name order"
            )
            return None
        try:
            information = yaml.safe_load(metadata.read_text("utf-8"))["rosbag2_bagfile_information"]
            return [self.path / Path(str(name)).name for name in information["relative_file_paths"]]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.problems.append(f"{self.path.name}: metadata.yaml is unreadable ({first}): files read in name order")
            return None

    def _plain(self, file: Path) -> Path:
        """The file itself, or its unpacked copy; the copy before it is removed to spare the disk."""
        if file.suffix not in _PACKED:
            return file
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="hybrid_policy_bag_")
        target = Path(self._scratch.name) / file.stem
        if not target.exists():
            for other in target.parent.iterdir():
                other.unlink()
            note = bag_files.unpack(file, target)
            if note and note not in self.problems:
                self.problems.append(note)
        return target


def _is_storage(path: Path) -> bool:
    name = path.stem if path.suffix in _PACKED else path.name
    return path.is_file() and name.endswith(_STORAGE)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """``bag_2`` before ``bag_10``."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


def _check_name(path: Path) -> None:
    if path.suffix == ".bag":
        raise InputError(f"{path}: {bag_files.ros1_hint(path)}")
    if path.name == _METADATA:
        raise InputError(f"{path}: give the bag's folder, {path.parent}, or one of its *.mcap or *.db3 files")
    if not _is_storage(path):
        raise InputError(f"{path}: not a bag, expected a folder, *.mcap or *.db3 (also with .zstd)")


def open_bag(path: str | Path, backend: str = "rosbags") -> BagSource:
    """The bag at ``path``: a folder with metadata.yaml or without, or one storage file.

    Args:
        path: the bag.
        backend: ``rosbags`` (pure Python, always there) or ``rosbag2_py`` (a ROS 2 installation's own,
            for storage plugins that rosbags does not know).

    Raises:
        InputError: there is no bag, or nothing in it can be read.
    """
    path = Path(path).expanduser()
    if backend == "rosbags":
        return RosbagsSource(path)
    if backend == "rosbag2_py":
        from hybrid_policy.evaluation.rosbag2_source import Rosbag2Source

        return Rosbag2Source(path)
    raise InputError(f"--backend: {backend!r} given, expected rosbags or rosbag2_py")


def find_bags(paths: Collection[str | Path]) -> list[Path]:
    """The bags that ``paths`` name; a folder of bags stands for each bag in it.

    Raises:
        InputError: a path does not exist, or a folder holds no bag.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            raise InputError(f"{path}: no such bag")
        if path.is_file() or _is_bag_folder(path):
            found.append(path)
            continue
        old = sorted(path.glob("*.bag"))
        if old:
            raise InputError(f"{old[0]}: {bag_files.ros1_hint(old[0])}")
        inside = sorted((p for p in path.iterdir() if p.is_dir() and _is_bag_folder(p)), key=_natural)
        if not inside:
            raise InputError(f"{path}: neither a bag nor a folder of bags (no *.mcap, *.db3 or metadata.yaml)")
        found += inside
    return found


def _is_bag_folder(path: Path) -> bool:
    return path.is_dir() and ((path / _METADATA).exists() or any(_is_storage(p) for p in path.iterdir()))


def disk_size(path: Path) -> int:
    """Bytes that the bag takes."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.iterdir() if _is_storage(p))


def free_space(path: Path) -> int:
    """Bytes free where ``path`` will be written."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
