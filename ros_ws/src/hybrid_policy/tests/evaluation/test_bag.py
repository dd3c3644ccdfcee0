"""Bags of every storage and in every state of repair."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import find_bags, open_bag
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.mcap_scan import is_indexed
from hybrid_policy.evaluation.message_types import Decoder

STORAGES = [("mcap", c) for c in ("none", "chunk", "message", "file")]
STORAGES += [("sqlite3", c) for c in ("none", "message", "file")]
N = 120


def write(path: Path, storage: str = "mcap", compression: str = "none", first: int = 0, count: int = N) -> Path:
    """Joint states and images whose content says which they are."""
    random = np.random.default_rng(0)
    with BagWriter(path, storage, compression) as writer:
        for k in range(first, first + count):
            t = 10**18 + k * 10_000_000
            state = writer.joint_state(t, ["a", "b"], np.array([k, -k], float))
            writer.write("/joint_states", "sensor_msgs/msg/JointState", state, t)
            pixels = random.integers(0, 255, (48, 64, 3), np.uint8)
            pixels[0, 0] = k % 256
            writer.write("/camera", "sensor_msgs/msg/Image", writer.image(t + 1, pixels), t + 1)
    return path


def read(path: Path) -> tuple[list[int], list[int], list[str]]:
    """(numbers of the joint states, numbers of the images, problems)."""
    bag = open_bag(path)
    decoder = Decoder(bag.topics)
    states, images = [], []
    for message in bag.messages():
        decoded = decoder.decode(message)
        if message.topic == "/camera":
            images.append(int(decoded.data[0]))
        else:
            states.append(int(decoded.position[0]))
    bag.close()
    return states, images, bag.problems


@pytest.mark.parametrize(("storage", "compression"), STORAGES)
def test_every_storage_gives_every_message_in_order(tmp_path, storage, compression):
    bag = write(tmp_path / "bag", storage, compression)
    states, images, problems = read(bag)
    assert states == list(range(N))
    assert images == [k % 256 for k in range(N)]
    assert problems == []
    assert {t.name: t.count for t in open_bag(bag).topics.values()} == {"/camera": N, "/joint_states": N}


def test_a_single_file_is_a_bag_too(tmp_path):
    bag = write(tmp_path / "bag")
    assert read(bag / "bag.mcap")[0] == list(range(N))


def test_only_the_topics_asked_for_are_given(tmp_path):
    bag = open_bag(write(tmp_path / "bag"))
    assert {m.topic for m in bag.messages(["/camera"])} == {"/camera"}


def split(tmp_path: Path, parts: int = 3) -> Path:
    """A bag in several files, as `ros2 bag record -b` leaves it."""
    folder = tmp_path / "split"
    folder.mkdir()
    names = []
    for i in range(parts):
        part = write(tmp_path / f"part{i}", first=i * 20, count=20)
        names.append(f"split_{i * 5}.mcap")  # split_10 sorts before split_5 as text
        shutil.move(part / f"part{i}.mcap", folder / names[-1])
    listed = "".join(f"\n    - {name}" for name in names)
    (folder / "metadata.yaml").write_text(
        f"rosbag2_bagfile_information:\n  version: 8\n  storage_identifier: mcap\n  relative_file_paths:{listed}\n"
    )
    return folder


def test_a_split_bag_is_one_bag(tmp_path):
    folder = split(tmp_path)
    assert read(folder)[0] == list(range(60))
    assert open_bag(folder).topics["/camera"].count == 60


def test_without_metadata_files_are_read_in_natural_order(tmp_path):
    folder = split(tmp_path)
    (folder / "metadata.yaml").unlink()
    states, _, problems = read(folder)
    assert states == list(range(60))
    assert "no metadata.yaml" in problems[0]


def test_a_missing_part_is_said_and_the_rest_read(tmp_path):
    folder = split(tmp_path)
    (folder / "split_5.mcap").unlink()
    states, _, problems = read(folder)
    assert states == [*range(20), *range(40, 60)]
    assert "1 of 3 files that metadata.yaml names are missing: split_5.mcap" in problems[0]


def test_a_part_that_is_rubbish_is_said_and_the_rest_read(tmp_path):
    folder = split(tmp_path)
    (folder / "split_5.mcap").write_bytes(b"not a bag at all" * 10)
    states, _, problems = read(folder)
    assert states == [*range(20), *range(40, 60)]
    assert any("split_5.mcap: not an mcap file" in line for line in problems)


def test_unreadable_metadata_is_said_and_the_files_read(tmp_path):
    folder = split(tmp_path)
    (folder / "metadata.yaml").write_text("rosbag2_bagfile_information: [1, {")
    states, _, problems = read(folder)
    assert states == list(range(60))
    assert "metadata.yaml is unreadable" in problems[0]


@pytest.mark.parametrize("compression", ["none", "chunk"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_cut_off_mcap_is_read_as_far_as_it_goes(tmp_path, compression, share):
    bag = write(tmp_path / "bag", "mcap", compression)
    file = bag / "bag.mcap"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    states, images, problems = read(bag)
    assert states == list(range(len(states)))
    assert 0.25 * share * N < len(images) <= N
    assert any("cut off" in line for line in problems)


def test_an_mcap_that_was_never_closed_is_whole(tmp_path):
    bag = write(tmp_path / "bag")
    file = bag / "bag.mcap"
    raw = file.read_bytes()
    end = raw.rindex(b"\x0f\x04\x00\x00\x00\x00\x00\x00\x00")  # the record that ends the data section
    file.write_bytes(raw[:end])
    assert not is_indexed(file)
    states, images, problems = read(bag)
    assert (len(states), len(images)) == (N, N)
    assert any("without a footer" in line for line in problems)


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_chunk_is_left_out_alone(tmp_path, which):
    bag = write(tmp_path / "bag", "mcap", "chunk", count=300)
    file = bag / "bag.mcap"
    raw = bytearray(file.read_bytes())
    at = -1
    for _ in range(which + 1):
        at = raw.index(b"\x28\xb5\x2f\xfd", at + 1)  # the chunk's zstd frame
    raw[at : at + 4] = b"\x00\x00\x00\x00"
    file.write_bytes(raw)
    states, images, problems = read(bag)
    assert 100 < len(states) < 250
    assert sorted(set(states)) == states
    assert len(images) > 100
    assert any("unreadable" in line and "left out" in line for line in problems)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_off_database_is_read_as_far_as_it_goes(tmp_path, share):
    bag = write(tmp_path / "bag", "sqlite3")
    file = bag / "bag.db3"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    states, _, problems = read(bag)
    assert len(states) > 0.3 * N
    assert states == list(range(len(states)))
    assert any("malformed" in line for line in problems)


def test_a_database_with_its_log_left_behind_is_read_with_it(tmp_path):
    bag = write(tmp_path / "bag", "sqlite3")
    live = sqlite3.connect(bag / "bag.db3")
    live.execute("PRAGMA journal_mode=WAL")
    live.execute("PRAGMA wal_autocheckpoint=0")
    row = live.execute("SELECT topic_id, timestamp, data FROM messages ORDER BY id").fetchone()
    live.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES (?,?,?)", (row[0], 2 * 10**18, row[2]))
    live.commit()
    killed = tmp_path / "killed"
    shutil.copytree(bag, killed)  # what a killed recorder leaves: the database and its log
    live.close()
    assert (killed / "bag.db3-wal").stat().st_size > 0
    assert len(read(killed)[0]) == N + 1


def test_humble_bags_need_no_definitions(sim_humble):
    bag = open_bag(sim_humble)
    assert all(topic.definition == "" for topic in bag.topics.values())
    decoder = Decoder(bag.topics)
    kinds = {message.topic: type(decoder.decode(message)).__name__ for message in bag.messages()}
    assert kinds["/joint_states"] == "sensor_msgs__msg__JointState"
    assert len(kinds) == 5


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p / "nothing", "no such bag"),
        (lambda p: _file(p / "x.mcap", b""), r"x.mcap: empty \(0 bytes\)"),
        (lambda p: _file(p / "x.db3", b""), r"x.db3: empty \(0 bytes\)"),
        (lambda p: _file(p / "x.mcap", b"rubbish" * 9), "not an mcap file"),
        (lambda p: _file(p / "x.db3", b"rubbish" * 99), "not a readable rosbag2 database"),
        (lambda p: _file(p / "x.bag", b"#ROSBAG V2.0"), "a ROS 1 bag"),
        (lambda p: _file(p / "x.txt", b"hello"), "not a bag"),
        (lambda p: _file(p / "x.mcap.zstd", b"hello"), "zstd"),
        (lambda p: _folder(p / "empty"), "no storage file"),
        (lambda p: _file(_folder(p / "b") / "metadata.yaml", b"rosbag2_bagfile_information: {}").parent,
         "no storage file"),
    ],
)  # fmt: skip
def test_what_is_no_bag_is_one_clear_error(tmp_path, make, expected):
    with pytest.raises(InputError, match=expected) as error:
        list(open_bag(make(tmp_path)).messages())
    assert len(str(error.value).splitlines()) <= 2


def test_a_message_that_is_cut_off_is_one_clear_error(tmp_path):
    with BagWriter(tmp_path / "bag") as writer:
        state = writer.types.serialize_cdr(writer.joint_state(1, ["a"], np.ones(1)), "sensor_msgs/msg/JointState")
        writer.write_raw("/joint_states", "sensor_msgs/msg/JointState", bytes(state)[:-9], 5)
    bag = open_bag(tmp_path / "bag")
    (message,) = bag.messages()
    with pytest.raises(InputError, match=r"/joint_states: \d+ bytes at 5 ns are no sensor_msgs/msg/JointState"):
        Decoder(bag.topics).decode(message)


def test_find_bags_takes_folders_of_bags_apart(tmp_path):
    for name in ("b2", "b10", "b1"):
        write(tmp_path / "many" / name, count=2)
    assert [p.name for p in find_bags([tmp_path / "many"])] == ["b1", "b2", "b10"]
    with pytest.raises(InputError, match="neither a bag nor a folder of bags"):
        find_bags([_folder(tmp_path / "none")])


def test_rosbag2_py_is_refused_where_it_is_not(tmp_path):
    with pytest.raises(InputError, match="rosbag2_py: not importable"):
        open_bag(write(tmp_path / "bag", count=1), "rosbag2_py")


def test_rosbag2_py_reads_behind_the_same_protocol(tmp_path, monkeypatch):
    """Against a stand-in with rosbag2_py's interface, over rosbags: what is held is our use of it."""
    path = write(tmp_path / "bag", count=5)

    class Reader:
        def open(self, options, converter):
            assert (options, converter) == ((str(path), ""), ("cdr", "cdr"))
            self._messages = list(open_bag(path).messages())

        def set_filter(self, chosen):
            self._messages = [m for m in self._messages if m.topic in chosen]

        def get_metadata(self):
            entry = SimpleNamespace(topic_metadata=SimpleNamespace(name="/camera"), message_count=5)
            return SimpleNamespace(topics_with_message_count=[entry])

        def get_all_topics_and_types(self):
            return [SimpleNamespace(name=t.name, type=t.type) for t in open_bag(path).topics.values()]

        def has_next(self):
            return bool(self._messages)

        def read_next(self):
            message = self._messages.pop(0)
            return message.topic, bytes(message.data), message.t_ns

    module = SimpleNamespace(
        SequentialReader=Reader,
        StorageOptions=lambda uri, storage_id: (uri, storage_id),
        ConverterOptions=lambda a, b: (a, b),
        StorageFilter=lambda topics: topics,
    )
    monkeypatch.setitem(sys.modules, "rosbag2_py", module)
    ours, theirs = open_bag(path), open_bag(path, "rosbag2_py")
    assert theirs.topics["/camera"].count == 5
    pairs = list(zip(ours.messages(["/camera"]), theirs.messages(["/camera"]), strict=True))
    assert len(pairs) == 5
    assert all((a.topic, a.type, a.t_ns, bytes(a.data)) == (b.topic, b.type, b.t_ns, bytes(b.data)) for a, b in pairs)


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
