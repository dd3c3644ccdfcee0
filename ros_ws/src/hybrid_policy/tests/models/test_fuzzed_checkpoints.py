"""Mutated checkpoints: each is refused with an InputError, or loads to exactly what it says.

A mutation that leaves the checkpoint's meaning intact (bytes of a tensor that is not used, spaces in the
header) may load, but then to the same actions; anything else must be refused. Never another exception.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.models.checkpoint import load_checkpoint, open_checkpoint
from hybrid_policy.models.tensor_files import TensorFile

FIXTURE = Path(__file__).parent / "fixtures" / "lerobot_pi05_tiny"
SOURCE = (FIXTURE / "model.safetensors").read_bytes()
HEADER_BYTES = int.from_bytes(SOURCE[:8], "little")
HEADER = json.loads(SOURCE[8 : 8 + HEADER_BYTES])
DATA = SOURCE[8 + HEADER_BYTES :]
NAMES = [name for name in HEADER if name != "__metadata__"]
USED = [name for name in NAMES if "lm_head" not in name]
TIMES = 30


def build(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def copied() -> dict[str, dict]:
    return json.loads(json.dumps(HEADER))


def truncated(r: random.Random) -> bytes:
    return SOURCE[: r.choice([r.randrange(16), r.randrange(len(SOURCE)), len(SOURCE) - 1 - r.randrange(64)])]


def extended(r: random.Random) -> bytes:
    return SOURCE + bytes(r.randrange(1, 100))


def wrong_dtype(r: random.Random) -> bytes:
    header = copied()
    header[r.choice(USED)]["dtype"] = r.choice(["I32", "U32", "F16", "BF16", "I64", "BOOL", "F9", 7, None, [], "F64"])
    return build(header)


def wrong_shape(r: random.Random) -> bytes:
    header = copied()
    entry = header[r.choice(USED)]
    shape = entry["shape"]
    entry["shape"] = r.choice(
        [
            [*shape, 2],
            shape[:-1],
            [-1, *shape[1:]],
            [float(shape[0]), *shape[1:]],
            "8",
            [2**62, 2**62],
            [1, *shape],
            None,
        ]
    )
    return build(header)


def reshaped_with_the_same_bytes(r: random.Random) -> bytes:
    header = copied()
    name = r.choice([n for n in USED if len(HEADER[n]["shape"]) == 2 and len(set(HEADER[n]["shape"])) == 2])
    header[name]["shape"] = header[name]["shape"][::-1]
    return build(header)


def renamed(r: random.Random) -> bytes:
    header = copied()
    name = r.choice(USED)
    new = r.choice([name + "x", name[6:-1], "", "model." + name, name.replace("model.", "model_", 1), r.choice(NAMES)])
    entry = header.pop(name)
    header[new] = entry
    return build(header)


def dropped(r: random.Random) -> bytes:
    header = copied()
    del header[r.choice(USED)]
    return build(header)


def given_twice(r: random.Random) -> bytes:
    name = r.choice(USED)
    again = f", {json.dumps(name)}: {json.dumps(HEADER[r.choice(USED)])}}}"
    return build((json.dumps(HEADER)[:-1] + again).encode())


def moved_offsets(r: random.Random) -> bytes:
    header = copied()
    entry = header[r.choice(USED)]
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = r.choice(
        [
            [begin + 4, end + 4],
            [begin - 4, end - 4],
            [end, begin],
            [begin, end + 1],
            [0, end - begin],
            [begin],
            None,
            [2**70, 2**71],
        ]
    )
    return build(header) if begin or entry["data_offsets"] != [0, end - begin] else build(header)[:-1]


def swapped_tensors(r: random.Random) -> bytes:
    """Two entries point at each other's bytes of another size."""
    header = copied()
    a = r.choice(USED)
    b = r.choice([n for n in USED if HEADER[n]["shape"] != HEADER[a]["shape"]])
    header[a]["shape"], header[b]["shape"] = header[b]["shape"], header[a]["shape"]
    header[a]["data_offsets"], header[b]["data_offsets"] = (
        header[b]["data_offsets"],
        header[a]["data_offsets"],
    )
    return build(header)


def huge_header(r: random.Random) -> bytes:
    return build(HEADER, length=r.choice([2**63 - 1, 2**64 - 1, 100_000_001, len(SOURCE), len(SOURCE) - 7, 2**40]))


def small_header(r: random.Random) -> bytes:
    return build(HEADER, length=r.randrange(HEADER_BYTES))


def broken_json(r: random.Random) -> bytes:
    at = r.randrange(HEADER_BYTES)
    text = bytearray(SOURCE[8 : 8 + HEADER_BYTES])
    text[at] = r.choice(b'{}[]",:\x00\xff\\')
    return build(bytes(text))


def not_an_object(r: random.Random) -> bytes:
    return build(r.choice([b"[]", b"null", b"3", b"{}", b'"x"', b"[" * 50_000, b'{"a": 1}', b"{" * 2000]))


def not_finite(r: random.Random) -> bytes:
    name = r.choice(USED)
    begin, end = HEADER[name]["data_offsets"]
    at = begin + 4 * r.randrange((end - begin) // 4)
    data = bytearray(DATA)
    data[at : at + 4] = r.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"])
    return build(HEADER, bytes(data))


def random_bytes(r: random.Random) -> bytes:
    return r.randbytes(r.choice([0, 1, 7, 8, 9, 100, 10_000]))


MUTATIONS: list[Callable[[random.Random], bytes]] = [
    truncated,
    extended,
    wrong_dtype,
    wrong_shape,
    reshaped_with_the_same_bytes,
    renamed,
    dropped,
    given_twice,
    moved_offsets,
    swapped_tensors,
    huge_header,
    small_header,
    broken_json,
    not_an_object,
    not_finite,
    random_bytes,
]


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(directory).model.state_dict())


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    return state_of(FIXTURE)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("config.json", "dims.json"):
        shutil.copy(FIXTURE / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda m: m.__name__)
def test_mutated_tensors_are_refused_or_mean_the_same(directory, original, mutate) -> None:
    r = random.Random(mutate.__name__)
    refused = named = 0
    for _ in range(TIMES):
        (directory / "model.safetensors").write_bytes(mutate(r))
        try:
            state = state_of(directory)
        except InputError as error:
            refused += 1
            told = str(error)
            named += any(word in told for word in (str(directory), "model.safetensors", "q_proj", "Config"))
            continue
        assert state.keys() == original.keys()
        assert all(torch.equal(state[name], original[name]) for name in state)
    assert named == refused  # each names the file, the tensor or the dimension
    assert refused >= TIMES - 3  # a key may be renamed to what it was; JSON has bytes that do not matter


ODD = [None, -1, 0, "x", [], {}, 1e308, True, [[]], 2**70, 1 << 20, 999_983, {"a": {"b": []}}, 0.5]


@pytest.mark.parametrize("name", ["config.json", "dims.json"])
def test_mutated_json_is_refused_or_gives_a_whole_policy(directory, name) -> None:
    r = random.Random(name)
    (directory / "model.safetensors").write_bytes(SOURCE)
    text = (FIXTURE / name).read_bytes()
    values = json.loads(text)
    nested = [(key, inner) for key, value in values.items() if isinstance(value, dict) for inner in value]
    mutations: list[bytes] = [b"[1]", b"", b"{", b'{"horizon": NaN}', b'{"horizon": ' + b"9" * 5000 + b"}"]
    for key in values:
        mutations.append(json.dumps({k: v for k, v in values.items() if k != key}).encode())
        mutations += [json.dumps({**values, key: odd}).encode() for odd in r.sample(ODD, 3)]
    for key, inner in nested:
        for odd in (1 << 20, r.choice(ODD)):
            mutations.append(json.dumps({**values, key: {**values[key], inner: odd}}).encode())
    for _ in range(40):
        broken = bytearray(text)
        broken[r.randrange(len(text))] = r.randrange(256)
        mutations.append(bytes(broken))
    outcomes = []
    for mutated in mutations:
        (directory / name).write_bytes(mutated)
        try:
            policy = open_checkpoint(directory)
            outcomes.append("opened")
            assert policy.config.horizon >= 1
        except InputError:
            outcomes.append("refused")
    assert {"opened", "refused"} == set(outcomes)
    assert len(outcomes) > 100


def test_there_are_at_least_200_mutations() -> None:
    assert len(MUTATIONS) * TIMES >= 200


def test_offsets_that_are_not_aligned_are_read(tmp_path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "F32", "shape": [0, 4], "data_offsets": [11, 11]},
    }
    data = b"abc" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(build(header, data))
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.read("b").tolist() == [1.5, -2.0]
    assert file.read("c").shape == (0, 4)
