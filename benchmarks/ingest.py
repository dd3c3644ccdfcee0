"""How fast a bag is read and every message in it checked, as a replay does before the first inference.

    python benchmarks/ingest.py                        raw images, mcap and sqlite3
    python benchmarks/ingest.py --seconds 10 --json

Makes a bag of two raw 640 x 480 cameras at 30 Hz and joint states (55 MB a second of bag), reads it twice, from
the file cache, and gives the rate of the file's bytes and the process's largest memory. Each storage has a process
of its own: what an allocator has learnt from one changes the other's figures by a factor of two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.survey import survey
from hybrid_policy.evaluation.topic_match import match_topics
from hybrid_policy.share import share_path

START = 10**18
PERIOD = 33_000_000


def make(path: Path, storage: str, robot: RobotFile, frames: int) -> int:
    """Write the bag; its bytes."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (480, 640, 3), dtype=np.uint8) for _ in range(8)]
    names = list(robot.joint_names)
    with BagWriter(path, storage, "none") as bag:
        for i in range(frames):
            stamp = START + i * PERIOD
            for camera in robot.cameras:
                image = bag.image(stamp, pictures[i % len(pictures)], camera.name)
                bag.write(f"/{camera.topic}", "sensor_msgs/msg/Image", image, stamp + 1000)
            state = bag.joint_state(stamp, names, np.zeros(len(names)))
            bag.write(f"/{robot.joint_states_topic}", "sensor_msgs/msg/JointState", state, stamp + 2000)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def read(path: Path, robot: RobotFile) -> float:
    """Seconds for the whole bag."""
    began = time.perf_counter()
    bag = open_bag(path)
    survey(bag, robot, match_topics(robot, bag.topics, {}))
    bag.close()
    return time.perf_counter() - began


def measure(storage: str, seconds: float) -> dict[str, Any]:
    """One storage's figures."""
    robot = RobotFile.load(share_path("config/robots/sim_aloha.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / storage
        print(f"making {seconds:g} s of {storage}", file=sys.stderr)
        size = make(path, storage, robot, round(seconds * 1e9 / PERIOD))
        rates = [round(size / 1e6 / read(path, robot)) for _ in range(2)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"storage": storage, "bytes": size, "MB/s": rates, "memory MiB": round(memory)}


def main() -> int:
    """Make, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=46.0, help="length of the bag (default: 46 s, 2.6 GB)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for storage in ("mcap", "sqlite3"):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append(pool.submit(measure, storage, args.seconds).result())
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            first, second = row["MB/s"]
            size, memory = row["bytes"] / 1e9, row["memory MiB"]
            print(f"{row['storage']:8s} {size:.2f} GB  {first} MB/s, again {second} MB/s, {memory} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
