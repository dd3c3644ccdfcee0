"""Read an mcap file from front to back, without its index, as far as it goes.

rosbags wants a closing magic, a summary and a ``ros2`` profile. A recorder that was killed, a full disk
or a broken copy leaves none of them, yet nearly all messages are there. This reader walks the records
in file order, checks each chunk, steps over a damaged one and stops at the first byte that is no record.

Format: https://mcap.dev/spec (version 0).
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"\x89MCAP0\r\n"
_FOOTER, _SCHEMA, _CHANNEL, _MESSAGE = 0x02, 0x03, 0x04, 0x05
_CHUNK, _CHUNK_INDEX, _DATA_END = 0x06, 0x08, 0x0F
_FOOTER_SIZE = 9 + 20 + len(MAGIC)
#: A record longer than this is taken for damage; a 4K rgb image is 25 MB.
_MAX_RECORD = 1 << 31


@dataclass(frozen=True)
class Channel:
    """A channel of the file: ``definition`` is the schema's text, ``encoding`` ros2msg or ros2idl."""

    topic: str
    type: str
    encoding: str
    definition: str
    message_encoding: str


@dataclass(frozen=True)
class ScannedMessage:
    """One message: its channel, the time it was recorded (ns) and its serialised bytes."""

    channel: Channel
    t_ns: int
    data: memoryview


class _Damage(Exception):
    """The bytes at hand are no whole record."""


@dataclass
class McapScan:
    """A pass over one file. ``problems`` fills while ``messages`` is consumed."""

    path: Path
    problems: list[str] = field(default_factory=list)
    channels: dict[int, Channel] = field(default_factory=dict)
    _schemas: dict[int, tuple[str, str, str]] = field(default_factory=dict)

    def messages(self) -> Iterator[ScannedMessage]:
        """Messages in file order; within a chunk sorted by record time (stable)."""
        with self.path.open("rb") as file:
            if file.read(8) != MAGIC:
                self.problems.append(f"{self.path.name}: not an mcap file (its first bytes are not mcap's)")
                return
            self._learn(_summary(file, self.path.stat().st_size))
            file.seek(len(MAGIC))
            count = 0
            try:
                for opcode, offset, body in self._records(file):
                    if opcode in (_SCHEMA, _CHANNEL):
                        self._define(opcode, body)
                    elif opcode == _MESSAGE:
                        message = self._message(body)
                        if message is not None:
                            count += 1
                            yield message
                    elif opcode == _CHUNK:
                        for message in self._chunk(body, offset):
                            count += 1
                            yield message
                    elif opcode == _DATA_END:
                        return
            except _Damage as damage:
                self.problems.append(f"{self.path.name}: {damage}; {count} messages before it were read")

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, int, memoryview]]:
        size = self.path.stat().st_size
        while True:
            offset = file.tell()
            head = file.read(9)
            if not head:
                raise _Damage(f"ends at byte {offset} without a footer (the recorder did not close it)")
            if len(head) < 9:
                raise _Damage(f"cut off at byte {offset}")
            opcode, length = struct.unpack("<BQ", head)
            if opcode == 0 or length > _MAX_RECORD:
                raise _Damage(f"damaged at byte {offset} (record of kind {opcode}, {length} bytes)")
            body = file.read(length)
            if len(body) < length:
                if opcode == _CHUNK:  # its first messages may still be whole
                    yield opcode, offset, memoryview(body)
                raise _Damage(f"cut off at byte {offset}: a record of {length} bytes, {size - offset - 9} left")
            yield opcode, offset, memoryview(body)

    def _learn(self, summary: bytes) -> None:
        """Topics and types from the summary: their first mention may lie in a chunk that is damaged."""
        at = 0
        try:
            while at + 9 <= len(summary):
                opcode, length = struct.unpack_from("<BQ", summary, at)
                if opcode in (_SCHEMA, _CHANNEL):
                    self._define(opcode, memoryview(summary)[at + 9 : at + 9 + length])
                at += 9 + length
        except _Damage:
            return  # the data section says it too

    def _define(self, opcode: int, body: memoryview) -> None:
        reader = _Fields(body)
        if opcode == _SCHEMA:
            key = reader.number("<H")
            self._schemas[key] = (reader.text(), reader.text(), reader.text())
            return
        key, schema = reader.number("<H"), reader.number("<H")
        name, encoding, definition = self._schemas.get(schema, ("", "", ""))
        self.channels[key] = Channel(reader.text(), name, encoding, definition, reader.text())

    def _message(self, body: memoryview) -> ScannedMessage | None:
        if len(body) < 22:
            raise _Damage(f"a message record of {len(body)} bytes")
        key, _, t_ns, _ = struct.unpack_from("<HIQQ", body)
        channel = self.channels.get(key)
        return None if channel is None else ScannedMessage(channel, t_ns, body[22:])

    def _chunk(self, body: memoryview, offset: int) -> list[ScannedMessage]:
        where = f"{self.path.name}: the chunk at byte {offset}"
        try:
            reader = _Fields(body)
            reader.skip(16)
            size, crc = reader.number("<Q"), reader.number("<I")
            compression, packed = reader.text(), reader.number("<Q")
            raw = _decompress(compression, bytes(reader.rest()[:packed]))
        except (_Damage, ValueError, RuntimeError, EOFError, zstd_module().ZstdError) as error:
            self.problems.append(f"{where} is unreadable ({error}) and was left out")
            return []
        if len(raw) < size:
            self.problems.append(f"{where} is cut off: {len(raw)} of {size} bytes")
        elif crc and zlib.crc32(raw) != crc:
            self.problems.append(f"{where} fails its checksum and was left out")
            return []
        found: list[ScannedMessage] = []
        view, at = memoryview(raw), 0
        try:
            while at + 9 <= len(view):
                opcode, length = struct.unpack_from("<BQ", view, at)
                record = view[at + 9 : at + 9 + length]
                at += 9 + length
                if len(record) < length:
                    break
                if opcode in (_SCHEMA, _CHANNEL):
                    self._define(opcode, record)
                elif opcode == _MESSAGE:
                    message = self._message(record)
                    if message is not None:
                        found.append(message)
        except _Damage as damage:
            self.problems.append(f"{where}: {damage}")
        return sorted(found, key=lambda m: m.t_ns)


class _Fields:
    """Reads the fields of one record in order."""

    def __init__(self, body: memoryview) -> None:
        self._body, self._at = body, 0

    def number(self, form: str) -> int:
        try:
            (value,) = struct.unpack_from(form, self._body, self._at)
        except struct.error as error:
            raise _Damage("a record shorter than its fields") from error
        self._at += struct.calcsize(form)
        return int(value)

    def text(self) -> str:
        length = self.number("<I")
        raw = self._body[self._at : self._at + length]
        if len(raw) < length:
            raise _Damage("a string longer than its record")
        self._at += length
        return bytes(raw).decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        self._at += count

    def rest(self) -> memoryview:
        return self._body[self._at :]


def _decompress(compression: str, data: bytes) -> bytes:
    """As much as ``data`` holds: streaming decoders give the front of a chunk that was cut off."""
    if compression == "":
        return data
    if compression == "zstd":
        return zstd_module().ZstdDecompressor().decompress(data)
    if compression == "lz4":
        import lz4.frame

        return lz4.frame.LZ4FrameDecompressor().decompress(data)
    raise ValueError(f"compression {compression!r}, expected lz4, zstd or none")


def zstd_module() -> Any:
    """The standard library's zstd (3.14) or its backport, which rosbags brings."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def is_indexed(path: Path) -> bool:
    """Whether the file is closed and has a chunk index, so that rosbags can read it in time order."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < _FOOTER_SIZE + 8 or file.read(8) != MAGIC:
            return False
        header = file.read(9)
        profile_record = file.read(min(struct.unpack("<BQ", header)[1], 1 << 16))
        try:
            profile = _Fields(memoryview(profile_record)).text()
        except _Damage:
            return False
        return profile == "ros2" and _has_chunk_index(_summary(file, size))


def _summary(file: BinaryIO, size: int) -> bytes:
    """The summary section; empty where the file was not closed or has none."""
    if size < _FOOTER_SIZE + len(MAGIC):
        return b""
    file.seek(-_FOOTER_SIZE, 2)
    footer = file.read()
    if footer[-8:] != MAGIC or footer[0] != _FOOTER:
        return b""
    (start,) = struct.unpack_from("<Q", footer, 9)
    if not 0 < start < size:
        return b""
    file.seek(start)
    return file.read(size - start - _FOOTER_SIZE)


def _has_chunk_index(summary: bytes) -> bool:
    at = 0
    while at + 9 <= len(summary):
        opcode, length = struct.unpack_from("<BQ", summary, at)
        if opcode == _CHUNK_INDEX:
            return True
        at += 9 + length
    return False
