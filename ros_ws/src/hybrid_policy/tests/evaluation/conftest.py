from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.share import resolve

# Worker processes import the policy by name, so it must be on the path, not only loaded by pytest.
sys.path.append(str(Path(__file__).parent))

BAGS = Path(__file__).parent / "bags"
REPOSITORY = Path(__file__).resolve().parents[5]
G1 = REPOSITORY.parent / "shared" / "fixtures" / "g1_real"
T0 = 1_700_000_000_000_000_000


@pytest.fixture
def sim_expert() -> Path:
    """The expert's episode on the simulated robot: mcap, JPEG images, 7 s."""
    return BAGS / "sim_expert"


@pytest.fixture
def sim_humble() -> Path:
    """1.6 s of the same as ROS 2 Humble writes it: sqlite3, version 5, no definitions."""
    return BAGS / "sim_humble"


@pytest.fixture
def g1() -> Path:
    if not G1.is_dir():
        pytest.skip(f"the real episode is not at {G1}")
    return G1


@pytest.fixture
def robot() -> RobotFile:
    return RobotFile.load(resolve("sim_aloha", "config/robots"))


@pytest.fixture
def stub() -> str:
    """A policy for ``--policy`` that needs no checkpoint; see stub_policy.py."""
    return "stub_policy:make"


@pytest.fixture
def copy(tmp_path: Path):
    """Copies a bag to a place where it may be damaged."""

    def make(bag: Path, name: str = "bag") -> Path:
        return Path(shutil.copytree(bag, tmp_path / name))

    return make


@pytest.fixture
def two_joints(tmp_path: Path):
    """Writes a bag of joint states [[a, b], ...] at 20 Hz and what else ``extra(writer)`` adds."""

    def make(rows, extra=None, name: str = "joints", **kwargs) -> Path:
        path = tmp_path / name
        with BagWriter(path, **kwargs) as writer:
            for k, row in enumerate(rows):
                t = T0 + k * 50_000_000
                state = writer.joint_state(t, ["a", "b"], np.asarray(row, float))
                writer.write("/joint_states", "sensor_msgs/msg/JointState", state, t)
            if extra is not None:
                extra(writer)
        return path

    return make
