"""Bags damaged at random, in every storage: what can be used is used, and nothing but InputError escapes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.survey import survey
from hybrid_policy.evaluation.topic_match import match_topics

STORAGES = (("mcap", "none"), ("mcap", "chunk"), ("mcap", "file"), ("mcap", "message"), ("sqlite3", "none"),
            ("sqlite3", "message"))  # fmt: skip


def damage(raw: bytearray, draw: random.Random) -> bytes:
    """Cut off, bytes changed, a stretch zeroed, a stretch lost, or the head changed."""
    at, length = draw.randrange(len(raw)), draw.randrange(1, 5000)
    match draw.randrange(5):
        case 0:
            return bytes(raw[:at])
        case 1:
            for _ in range(draw.randrange(1, 20)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
        case 2:
            raw[at : at + length] = bytes(len(raw[at : at + length]))
        case 3:
            del raw[at : at + length]
        case _:
            for _ in range(5):
                raw[draw.randrange(min(len(raw), 3000))] = draw.randrange(256)
    return bytes(raw)


def look(case: Path, robot) -> bool:
    """Whether anything in the bag could be used; only InputError may say that it could not."""
    try:
        bag = open_bag(case)
        known = survey(bag, robot, match_topics(robot, bag.topics, {}))
        bag.close()
    except InputError:
        return False
    return bool(known.topics)


@pytest.mark.parametrize(("storage", "compression"), STORAGES)
def test_random_damage_never_escapes(sim_humble, robot, tmp_path, storage, compression):
    draw = random.Random(f"{storage} {compression}")
    with BagWriter(tmp_path / "whole", storage, compression) as writer:
        for message in open_bag(sim_humble).messages():
            writer.write_raw(message.topic, message.type, message.data, message.t_ns)
    (file,) = (p for p in (tmp_path / "whole").iterdir() if p.name != "metadata.yaml")
    whole = file.read_bytes()
    useful = 0
    for _ in range(25):
        case = tmp_path / f"case{''.join(file.suffixes)}"
        case.write_bytes(damage(bytearray(whole), draw))
        useful += look(case, robot)
    assert useful >= 12  # most of what was recorded is still there


def test_random_damage_of_the_metadata_never_escapes(sim_expert, robot, tmp_path):
    draw = random.Random(0)
    text = (sim_expert / "metadata.yaml").read_bytes()
    for number in range(25):
        case: Path = shutil.copytree(sim_expert, tmp_path / str(number))
        (case / "metadata.yaml").write_bytes(damage(bytearray(text), draw))
        bag = open_bag(case)  # the storage file is whole, so the bag is
        assert bag.topics["/joint_states"].count == 350
