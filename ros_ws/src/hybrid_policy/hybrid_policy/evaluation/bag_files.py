"""One storage file of a bag: by rosbags where it is whole, by a scan where it is not."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.mcap_scan import McapScan, is_indexed, zstd_module

#: (topic, type, record time in ns, CDR bytes)
Raw = tuple[str, str, int, memoryview]
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ROS1_MAGIC = b"#ROSBAG V"
_COPY = 1 << 22


@dataclass(frozen=True)
class FoundTopic:
    """A topic as one file has it; ``count`` is None where that file has no index to say."""

    name: str
    type: str
    count: int | None
    encoding: str = ""
    definition: str = ""


def ros1_hint(path: Path) -> str:
    """What to do with a ROS 1 bag."""
    return (
        f"a ROS 1 bag, expected a ROS 2 one; `rosbags-convert --src {path.name} --dst {path.stem}` "
        "(from the rosbags package) makes one"
    )


def topics(file: Path, problems: list[str]) -> list[FoundTopic]:
    """The topics of one file.

    Raises:
        InputError: the file is empty, or nothing in it can be read.
    """
    if file.stat().st_size == 0:
        raise InputError(f"{file.name}: empty (0 bytes)")
    with file.open("rb") as opened:
        if opened.read(len(_ROS1_MAGIC)) == _ROS1_MAGIC:
            raise InputError(f"{file.name}: {ros1_hint(file)}")
    if _by_rosbags(file):
        try:
            with _rosbags_reader(file) as reader:
                return [
                    FoundTopic(c.topic, c.msgtype, c.msgcount, _ENCODINGS.get(c.msgdef.format.name, ""),
                               c.msgdef.data)
                    for c in reader.connections
                ]  # fmt: skip
        except _reader_errors() as error:
            problems.append(f"{file.name}: {_first_line(error)}; walked from the front instead")
    return _scanned_topics(file, problems)


def messages(file: Path, wanted: Collection[str], problems: list[str]) -> Iterator[Raw]:
    """The messages of one file on ``wanted`` topics, in the order of recording."""
    last, damaged = -1, 0
    if _by_rosbags(file):
        try:
            with _rosbags_reader(file) as reader:
                connections = [c for c in reader.connections if c.topic in wanted]
                if not connections:
                    return
                for connection, t_ns, data in reader.messages(connections):
                    # In message compression the packed bytes are no more trustworthy than the file.
                    plain = _plain(data) if isinstance(t_ns, int) else None
                    if plain is None:
                        damaged += 1
                        continue
                    last = t_ns
                    yield connection.topic, connection.msgtype, t_ns, plain
                _say_damaged(file, damaged, problems)
                return
        except _reader_errors() as error:
            if not any(_first_line(error) in known for known in problems):
                problems.append(f"{file.name}: {_first_line(error)}; the rest walked from the front")
    scan = _scan_mcap if _is_mcap(file) else _scan_sqlite
    for topic, kind, t_ns, data in scan(file, problems):
        if not isinstance(t_ns, int) or t_ns <= last or topic not in wanted:
            continue
        plain = _plain(data)
        if plain is None:
            damaged += 1
        else:
            yield topic, kind, t_ns, plain
    _say_damaged(file, damaged, problems)


def _say_damaged(file: Path, count: int, problems: list[str]) -> None:
    line = f"{file.name}: {count} messages are damaged and were left out"
    if count and line not in problems:
        problems.append(line)


def unpack(file: Path, target: Path) -> str | None:
    """Unpack ``x.zst`` to ``target``; a line on what was lost where the archive is cut off."""
    decoder = zstd_module().ZstdDecompressor()
    with file.open("rb") as packed, target.open("wb") as plain:
        try:
            while data := packed.read(_COPY):
                while data:
                    plain.write(decoder.decompress(data))
                    data = b""
                    if decoder.eof:
                        data = decoder.unused_data
                        decoder = zstd_module().ZstdDecompressor()
        except Exception as error:  # the module's own error class differs between stdlib and backport
            return f"{file.name}: not whole zstd data ({_first_line(error)}): what was unpacked is read"
        if plain.tell() == 0:
            raise InputError(f"{file.name}: holds no zstd data")
    return None


_ENCODINGS = {"MSG": "ros2msg", "IDL": "ros2idl"}


def _is_mcap(file: Path) -> bool:
    return file.suffix == ".mcap"


def _by_rosbags(file: Path) -> bool:
    """Whether rosbags can be expected to read the file whole."""
    if _is_mcap(file):
        return is_indexed(file)
    # rosbags opens a database as immutable, so it would not see what a killed recorder left in the log.
    log = file.with_name(file.name + "-wal")
    return not (log.exists() and log.stat().st_size > 0)


def _rosbags_reader(file: Path) -> Any:
    from rosbags.rosbag2 import Reader

    return Reader(file)


def _reader_errors() -> tuple[type[Exception], ...]:
    """What rosbags lets through on damaged files: its own errors and those of its parts."""
    import struct

    import apsw
    from rosbags.rosbag2 import ReaderError

    zstd_error: type[Exception] = zstd_module().ZstdError
    return (ReaderError, apsw.Error, zstd_error, struct.error, RuntimeError, ValueError, KeyError,
            TypeError, EOFError, IndexError, OverflowError, MemoryError, AssertionError)  # fmt: skip


def _plain(data: Any) -> memoryview | None:
    """The CDR bytes: bags in compression mode ``message`` pack each message by itself. None: damaged."""
    if not isinstance(data, (bytes, memoryview)):
        return None  # a damaged database gives NULL or a number
    if bytes(data[:4]) == _ZSTD_MAGIC:
        try:
            return memoryview(zstd_module().decompress(data))
        except zstd_module().ZstdError:
            return None
    return data if isinstance(data, memoryview) else memoryview(data)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _scan_mcap(file: Path, problems: list[str]) -> Iterator[Raw]:
    scan = McapScan(file)
    for message in scan.messages():
        yield message.channel.topic, message.channel.type, message.t_ns, message.data
    problems += [line for line in scan.problems if line not in problems]


def _scanned_topics(file: Path, problems: list[str]) -> list[FoundTopic]:
    if not _is_mcap(file):
        return _sqlite_topics(file, problems)
    scan = McapScan(file)
    counts: dict[str, int] = {}
    for message in scan.messages():
        counts[message.channel.topic] = counts.get(message.channel.topic, 0) + 1
    problems += [line for line in scan.problems if line not in problems]
    if not scan.channels:
        raise InputError("\n".join(scan.problems) or f"{file.name}: holds no topic and no message")
    found: dict[str, FoundTopic] = {}
    for channel in scan.channels.values():
        if channel.message_encoding != "cdr":
            problems.append(
                f"{file.name}: topic {channel.topic} is encoded as {channel.message_encoding!r}, expected cdr "
                f"({'a recording of ROS 1' if channel.message_encoding == 'ros1' else 'no ROS 2 messages'})"
            )
        elif channel.topic not in found:
            found[channel.topic] = FoundTopic(
                channel.topic,
                channel.type,
                counts.get(channel.topic, 0),
                channel.encoding,
                channel.definition,
            )
    return list(found.values())


def _connect(file: Path) -> sqlite3.Connection:
    database = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
    # Without it sqlite refuses a file shorter than its header says, that is, every cut-off one.
    database.execute("PRAGMA writable_schema=ON")
    return database


def _sqlite_topics(file: Path, problems: list[str]) -> list[FoundTopic]:
    try:
        with closing(_connect(file)) as database:
            rows = database.execute("SELECT name, type FROM topics ORDER BY id").fetchall()
            definitions = _definitions(database)
    except sqlite3.Error as error:
        raise InputError(f"{file.name}: not a readable rosbag2 database ({error})") from error
    counts: dict[str, int] = {}
    for topic, _, _, _ in _scan_sqlite(file, problems):
        counts[topic] = counts.get(topic, 0) + 1
    found = [FoundTopic(name, kind, counts.get(name, 0)) for name, kind in rows]
    return [
        replace(t, encoding=definitions[t.type][0], definition=definitions[t.type][1]) if t.type in definitions else t
        for t in found
    ]


def _definitions(database: sqlite3.Connection) -> dict[str, tuple[str, str]]:
    try:
        rows = database.execute(
            "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
        ).fetchall()
    except sqlite3.Error:
        return {}  # Humble's databases have no such table
    return {kind: (encoding, text) for kind, encoding, text in rows if text}


def _scan_sqlite(file: Path, problems: list[str]) -> Iterator[Raw]:
    """Messages by row, the order they were written in, up to the first page that is damaged."""
    count = 0
    try:
        with closing(_connect(file)) as database:
            names = {key: (name, kind) for key, name, kind in database.execute("SELECT id,name,type FROM topics")}
            for key, t_ns, data in database.execute("SELECT topic_id,timestamp,data FROM messages ORDER BY id"):
                if key in names:
                    count += 1
                    yield *names[key], t_ns, data
    except sqlite3.Error as error:
        note = f"{file.name}: damaged ({error}); {count} messages before it were read"
        if note not in problems:
            problems.append(note)
