"""Make the bags that the tests replay: the scripted expert on the simulated robot, as its drivers publish.

    python make_bag.py            # writes sim_expert (mcap, chunks compressed) and sim_humble (sqlite3, version 5)

Images are JPEG (topics ``.../compressed``) to keep the repository small. ``sim_humble`` has the form that
ROS 2 Humble writes: schema version 3, metadata version 5, no message definitions.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
from pathlib import Path

import cv2
import numpy as np
import yaml
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.share import resolve
from hybrid_policy.sim.expert import next_set_points
from hybrid_policy.sim.robot import TIME_STEP, SimRobot
from hybrid_policy.sim.tasks import expert_state, judge, sample_scene

START = 1_717_243_200_000_000_000  # 2024-06-01 12:00 UTC
QUALITY = 80


def record_expert(path: Path, seed: int, seconds: float, storage: str = "mcap", compression: str = "chunk") -> bool:
    """An episode as a bag; whether the expert lifted the cube in it."""
    file = RobotFile.load(resolve("sim_aloha", "config/robots"))
    random = np.random.default_rng(seed)
    robot = SimRobot(sample_scene(random), seed)
    names = list(file.joint_names)
    per_command, per_state = round(0.05 / TIME_STEP), round(0.02 / TIME_STEP)
    entries: list[tuple[int, str, str, object]] = []
    lifted = False
    with BagWriter(path, storage, compression) as writer:

        def add(topic: str, kind: str, message: object, sent: int) -> None:
            entries.append((START + sent, "/" + topic, kind, message))

        add(file.prompt_topic, "std_msgs/msg/String", writer.text(robot.scene.prompt), 0)
        for step in range(round(seconds / TIME_STEP)):
            now = round(step * TIME_STEP * 1e9)
            if step % per_state == 0:
                state = writer.joint_state(START + now, names, robot.positions)
                add(file.joint_states_topic, "sensor_msgs/msg/JointState", state, now + _latency(random, 0.3))
            if step % per_command == 0:
                for camera in file.cameras:
                    pixels = robot.render(camera.name)
                    _, data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
                    add(
                        camera.topic + "/compressed", "sensor_msgs/msg/CompressedImage",
                        writer.jpeg(START + now, data.tobytes(), camera.name), now + _latency(random, 4.0),
                    )  # fmt: skip
                set_points = next_set_points(expert_state(robot))[0]
                robot.command(set_points)
                told = writer.trajectory(0, names, set_points[None], np.array([file.period]))
                add(file.command.topic, "trajectory_msgs/msg/JointTrajectory", told, now + 1)
            robot.step(1)
            lifted = lifted or judge(robot).success
        for sent, topic, kind, message in sorted(entries, key=lambda entry: entry[0]):
            writer.write(topic, kind, message, sent)
    robot.close()
    return lifted


def _latency(random: np.random.Generator, milliseconds: float) -> int:
    """Nanoseconds from capture to arrival: most near ``milliseconds``, some late."""
    return round(milliseconds * 1e6 * (0.5 + random.gamma(2.0, 0.5)))


def as_humble(source: Path, target: Path) -> None:
    """The same messages as Humble's rosbag2 stores them: sqlite3, schema 3, metadata version 5."""
    bag = open_bag(source)
    target.mkdir()
    name = f"{target.name}_0.db3"
    database = sqlite3.connect(target / name)
    database.executescript(
        "CREATE TABLE schema(schema_version INTEGER PRIMARY KEY, ros_distro TEXT NOT NULL);"
        "CREATE TABLE metadata(id INTEGER PRIMARY KEY, metadata_version INTEGER NOT NULL, metadata TEXT NOT NULL);"
        "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL,"
        " serialization_format TEXT NOT NULL, offered_qos_profiles TEXT NOT NULL);"
        "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL,"
        " data BLOB NOT NULL);"
        "CREATE INDEX timestamp_idx ON messages (timestamp ASC);"
        "INSERT INTO schema VALUES (3, 'humble');"
    )
    keys = {topic.name: i for i, topic in enumerate(bag.topics.values(), 1)}
    for topic in bag.topics.values():
        database.execute("INSERT INTO topics VALUES (?,?,?,'cdr','')", (keys[topic.name], topic.name, topic.type))
    times = []
    for message in bag.messages():
        times.append(message.t_ns)
        database.execute(
            "INSERT INTO messages(topic_id, timestamp, data) VALUES (?,?,?)",
            (keys[message.topic], message.t_ns, bytes(message.data)),
        )
    database.commit()
    database.close()
    span = {"nanoseconds": times[-1] - times[0]}
    start = {"nanoseconds_since_epoch": times[0]}
    topics = [
        {
            "topic_metadata": {
                "name": t.name, "type": t.type, "serialization_format": "cdr", "offered_qos_profiles": "",
            },
            "message_count": t.count,
        }
        for t in bag.topics.values()
    ]  # fmt: skip
    information = {
        "version": 5, "storage_identifier": "sqlite3", "duration": span, "starting_time": start,
        "message_count": len(times), "topics_with_message_count": topics, "compression_format": "",
        "compression_mode": "", "relative_file_paths": [name],
        "files": [{"path": name, "starting_time": start, "duration": span, "message_count": len(times)}],
    }  # fmt: skip
    text = yaml.safe_dump({"rosbag2_bagfile_information": information}, sort_keys=False)
    (target / "metadata.yaml").write_text(text)


def main() -> int:
    """Write both bags beside this file, replacing those there."""
    folder = Path(__file__).parent / "bags"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lifted = record_expert(folder / "sim_expert", seed=11, seconds=7.0)
    print(f"sim_expert: {'the cube was lifted' if lifted else 'the cube was not lifted'}")
    record_expert(folder / "short", seed=12, seconds=1.6)
    as_humble(folder / "short", folder / "sim_humble")
    shutil.rmtree(folder / "short")
    return 0 if lifted else 1


if __name__ == "__main__":
    sys.exit(main())
