"""Safetensors, memory-mapped and checked before anything is believed. Pickle is never read.

Format: https://github.com/huggingface/safetensors#format. A file is an 8-byte little-endian length,
a JSON header (name -> dtype, shape, data_offsets) and the data; offsets cover the data without holes.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_policy.errors import InputError

#: safetensors' own bound; a header of the full model has 0.1 MB.
MAX_HEADER_BYTES = 100_000_000

#: the format's names; what torch cannot hold is refused when it is read, not when it is listed.
DTYPES: dict[str, tuple[torch.dtype | None, int]] = {
    "F64": (torch.float64, 64),
    "F32": (torch.float32, 32),
    "F16": (torch.float16, 16),
    "BF16": (torch.bfloat16, 16),
    "F8_E4M3": (torch.float8_e4m3fn, 8),
    "F8_E5M2": (torch.float8_e5m2, 8),
    "F8_E8M0": (None, 8),
    "F4": (None, 4),
    "I64": (torch.int64, 64),
    "I32": (torch.int32, 32),
    "I16": (torch.int16, 16),
    "I8": (torch.int8, 8),
    "U64": (None, 64),
    "U32": (None, 32),
    "U16": (None, 16),
    "U8": (torch.uint8, 8),
    "BOOL": (torch.bool, 8),
}

#: elements that are copied and checked at a time
PIECE = 1 << 24

#: what other frameworks and older checkpoints leave in a directory
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``begin`` and ``end`` are bytes from the start of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def floating(self) -> bool:
        """A number format that weights may have."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: unreadable, not JSON, not an object, or a key given twice.
    """
    try:
        return _parse_object(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _parse_object(path: Path, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{path}: {key!r} is given twice")
            found[key] = value
        return found

    def constant(name: str) -> None:
        raise InputError(f"{path}: {name} is not a number that JSON has")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # also a whole number of thousands of digits
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__} given, expected an object")
    return value


def _entry(path: Path, name: str, value: Any, data_begin: int) -> TensorInfo:
    """One checked header entry."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError.at(path, name, value, "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise InputError.at(path, f"{name}: dtype", dtype, f"one of {', '.join(DTYPES)}")

    def counts(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not counts(shape) or len(shape) > 16:
        raise InputError.at(path, f"{name}: shape", shape, "a list of whole numbers")
    if not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError.at(path, f"{name}: data_offsets", offsets, "two rising whole numbers")
    bits = math.prod(shape) * DTYPES[dtype][1]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise InputError.at(path, f"{name}: data_offsets", offsets, f"{bits / 8:g} bytes for {dtype} of shape {shape}")
    return TensorInfo(path, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


class TensorFile:
    """One safetensors file, mapped. Opening checks the whole header; data is read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(8)
                if start[:2] == b"PK" or start[:1] == b"\x80":
                    raise InputError(
                        f"{path}: a pickle (torch.save) under this name; pickles can run code and are never "
                        "loaded. Convert it with safetensors.torch.save_file where you trust it."
                    )
                length = int.from_bytes(start, "little")
                if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                    raise InputError(f"{path}: not a whole safetensors file: {size} bytes with a header of {length}")
                header = file.read(length)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: cannot be read: {error}") from error
        try:
            table = _parse_object(path, header.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: the header is not UTF-8: {error}") from error
        metadata = table.pop("__metadata__", None)
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self.infos = {name: _entry(path, name, value, 8 + length) for name, value in table.items()}
        self._check_cover(8 + length, size)

    def _check_cover(self, begin: int, size: int) -> None:
        at = begin
        for name, info in sorted(self.infos.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != at:
                raise InputError(f"{self.path}: {name} starts at byte {info.begin}, expected {at}")
            at = info.end
        if at != size:
            kind = "truncated" if at > size else "trailing bytes"
            raise InputError(f"{self.path}: {kind}: {size} bytes given, the header tells of {at}")

    def read(self, name: str) -> Tensor:
        """A view of the mapped data: nothing is copied until it is used.

        Raises:
            InputError: a number format that torch cannot hold.
        """
        info = self.infos[name]
        dtype = DTYPES[info.dtype][0]
        if dtype is None:
            raise InputError(f"{self.path}: {name}: {info.dtype} cannot be held by this torch")
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        count = math.prod(info.shape)
        if info.begin % dtype.itemsize == 0:
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=info.begin)
        else:  # legal, though safetensors' writers align
            flat = torch.frombuffer(bytearray(self._map[info.begin : info.end]), dtype=dtype)
        return flat.view(info.shape)

    def forget(self, name: str, begin: int, end: int) -> None:
        """Give the pages of some bytes of a tensor back to the system; they stay readable."""
        info, page = self.infos[name], mmap.PAGESIZE
        begin = -(-(info.begin + begin) // page) * page
        length = (min(info.begin + end, info.end) // page) * page - begin
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)


class TensorStore:
    """All tensors of a checkpoint directory by name, whether in one file or in shards."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self.files = list(files)
        self._owner: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.infos:
                if name in self._owner:
                    raise InputError(f"{file.path}: {name} is also in {self._owner[name].path.name}")
                self._owner[name] = file

    @classmethod
    def open(cls, directory: Path) -> TensorStore:
        """``model.safetensors``, or the shards of ``model.safetensors.index.json``.

        Raises:
            InputError: neither is there (pickles are named), an index that names a file outside the
                directory or a tensor that its file lacks, or a broken file.
        """
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if single.exists():
            return cls([TensorFile(single)])
        if index.exists():
            return cls._open_sharded(directory, index)
        pickles = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLE_SUFFIXES)
        hint = f"; {', '.join(pickles)} may be pickles, which are never loaded" if pickles else ""
        raise InputError(f"{directory}: has no model.safetensors and no model.safetensors.index.json{hint}")

    @classmethod
    def _open_sharded(cls, directory: Path, index: Path) -> TensorStore:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError.at(index, "weight_map", weight_map, "an object: tensor name -> file name")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError.at(
                    index, f"weight_map[{name!r}]", file, "the name of a .safetensors file in this directory"
                )
        store = cls(TensorFile(directory / file) for file in sorted(set(weight_map.values())))
        problems = [
            f"{name}: said to be in {file}, " + (f"is in {store.info(name).file.name}" if name in store else "is not")
            for name, file in weight_map.items()
            if name not in store or store.info(name).file.name != file
        ]
        problems += [f"{name}: in a shard, not in the index" for name in store.names() if name not in weight_map]
        if problems:
            raise InputError(f"{index}: disagrees with its shards:\n  " + "\n  ".join(problems))
        return store

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the data."""
        return sorted(self._owner, key=lambda n: (str(self.info(n).file), self.info(n).begin, n))

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor."""
        return self._owner[name].infos[name]

    def read(self, name: str) -> Tensor:
        """A view of the mapped data on the host."""
        return self._owner[name].read(name)

    def load(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One floating-point tensor straight to ``device`` in ``dtype``, in pieces whose pages are let go.

        Raises:
            InputError: it holds NaN or infinity.
        """
        owner, source = self._owner[name], self.read(name).flatten()
        tensor = torch.empty(self.info(name).shape, dtype=dtype, device=device)
        target = tensor.view(-1)
        for begin in range(0, source.numel(), PIECE):
            piece = target[begin : begin + PIECE]
            piece.copy_(source[begin : begin + PIECE])
            if not bool(torch.isfinite(piece).all()):
                raise InputError(f"{self.info(name).file}: {name}: holds NaN or infinity (as {dtype})")
            owner.forget(name, begin * source.itemsize, (begin + PIECE) * source.itemsize)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._owner)
