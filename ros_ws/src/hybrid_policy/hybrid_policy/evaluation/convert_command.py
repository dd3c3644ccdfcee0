"""Turn an episode of a LeRobot dataset (v2.0, v2.1, v3.0) into a bag with a robot file's topics.

The bag holds what the robot would have published: its cameras, joint states and prompt, each stamped
with its frame's time, and the dataset's actions on the command topic (a trajectory of one point each,
recorded at the frame's time). `hybrid-policy replay` reads it, and so do `ros2 bag play`, Foxglove and
PlotJuggler.

  hybrid-policy convert ~/datasets/g1 g1_bag --robot g1
  hybrid-policy convert ~/datasets/aloha bag --robot arm.yaml --episode 12 \\
      --camera base_0_rgb=observation.images.top

Values are taken to be in the checkpoint's convention (the robot file's `policy.conventions`), as
datasets made for training are. Cameras and joints are matched by name, else by number and order.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control.robot_file import Camera, Convention, RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag_writer import COMPRESSION, STORAGE, BagWriter
from hybrid_policy.evaluation.extras import require
from hybrid_policy.evaluation.lerobot_episode import ACTION, STATE, LeRobotEpisode, open_episode
from hybrid_policy.evaluation.progress import progress
from hybrid_policy.share import resolve

#: 2024-01-01 00:00 UTC: a stamp of zero would count as no stamp.
_START = 1_704_067_200_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("dataset", type=Path, help="the dataset's folder (holds meta/info.json)")
    parser.add_argument("bag", type=Path, help="the bag to write: a new folder")
    parser.add_argument("--robot", required=True, help="robot file, or the name of one that ships (g1, sim_aloha)")
    parser.add_argument("--episode", type=int, help="episode index (default: the first whose data is there)")
    parser.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="NAME=FEATURE",
        help="robot file's camera = dataset feature, e.g. base_0_rgb=observation.images.top; may be repeated",
    )
    parser.add_argument("--prompt", help="the task (default: the dataset's)")
    parser.add_argument("--storage", choices=STORAGE, default="mcap", help="default: %(default)s")
    parser.add_argument("--compression", choices=COMPRESSION, default="none", help="default: %(default)s")
    parser.add_argument("--jpeg-quality", type=int, default=90, help="of compressed cameras (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a bag that is there")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert; exit code 0, or 2 through InputError."""
    require("rosbags", "pyarrow", "av")
    robot = RobotFile.load(resolve(args.robot, "config/robots"))
    episode = open_episode(args.dataset, args.episode)
    if not 1 <= args.jpeg_quality <= 100:
        raise InputError(f"--jpeg-quality: {args.jpeg_quality} given, expected 1 to 100")
    cameras = match_cameras(robot, episode, dict(_pair(given) for given in args.camera))
    if args.bag.exists() and args.force:
        if not (args.bag / "metadata.yaml").exists():
            raise InputError(f"{args.bag}: not a bag, so --force does not replace it")
        shutil.rmtree(args.bag)
    written = convert(episode, robot, args.bag, cameras, args.prompt, args.storage, args.compression, args.jpeg_quality)
    if args.json:
        print(json.dumps(written))
    else:
        print(
            f"{args.bag}: {written['frames']} frames, {written['seconds']:.1f} s, "
            f"{len(cameras)} cameras, prompt {written['prompt']!r}"
        )
    return 0


def convert(
    episode: LeRobotEpisode,
    robot: RobotFile,
    bag: Path,
    cameras: Mapping[str, str],
    prompt: str | None = None,
    storage: str = "mcap",
    compression: str = "none",
    jpeg_quality: int = 90,
) -> dict[str, Any]:
    """Write the bag.

    Args:
        episode: what to convert.
        robot: whose topics and joint names the bag gets.
        bag: a new folder.
        cameras: robot file's camera name -> dataset feature, from :func:`match_cameras`.
        prompt: the task; None: the dataset's.
        storage: mcap or sqlite3.
        compression: none, chunk (mcap), message or file.
        jpeg_quality: 1 to 100, of cameras whose type is ``compressed``.

    Returns:
        What was written: frames, seconds, topics, prompt.

    Raises:
        InputError: names or sizes of state or action do not fit the robot file, or data is missing.
    """
    state = episode.vectors(STATE)
    if state is None:
        raise InputError(f"{episode.root}: episode {episode.index} has no {STATE}")
    joints = _joint_positions(robot, state[:, _order(episode, robot, STATE, robot.state_names)])
    action = episode.vectors(ACTION)
    commands = None
    if action is not None:
        commands = robot.commands(action[:, _order(episode, robot, ACTION, robot.action_names)])
    prompt = episode.task if prompt is None else prompt
    by_name = {camera.name: camera for camera in robot.cameras}
    streams = [(by_name[name], episode.frames(feature)) for name, feature in cameras.items()]
    names, commanded = list(robot.joint_names), list(robot.command_names)
    with BagWriter(bag, storage, compression) as writer:
        if prompt:
            writer.write(_topic(robot.prompt_topic), "std_msgs/msg/String", writer.text(prompt), _START)
        for k in progress(range(episode.length), "converting", "frames"):
            t = _START + int(episode.times[k])
            for camera, frames in streams:
                _write_frame(writer, camera, next(frames), t, jpeg_quality)
            writer.write(
                _topic(robot.joint_states_topic), "sensor_msgs/msg/JointState",
                writer.joint_state(t, names, joints[k]), t,
            )  # fmt: skip
            if commands is not None:
                _write_command(writer, robot, commanded, commands[k], t)
    seconds = float(episode.times[-1]) * 1e-9 if episode.length else 0.0
    return {"bag": str(bag), "frames": episode.length, "seconds": seconds, "prompt": prompt,
            "cameras": dict(cameras), "commands": commands is not None}  # fmt: skip


def match_cameras(robot: RobotFile, episode: LeRobotEpisode, given: Mapping[str, str]) -> dict[str, str]:
    """Robot file's camera name -> dataset feature: as given, else by name, else the only one left.

    Raises:
        InputError: a name given does not exist, or a camera has no counterpart.
    """
    names = [camera.name for camera in robot.cameras]
    for name, feature in given.items():
        if name not in names:
            raise InputError(f"--camera: {name!r} given, expected one of {', '.join(names)} ({robot.path})")
        if feature not in episode.cameras:
            raise InputError(f"--camera: {feature!r} given, expected one of {', '.join(episode.cameras)}")
    matched = dict(given)
    for name in names:
        alike = [f for f in episode.cameras if f.rsplit(".", 1)[-1] == name]
        if name not in matched and alike:
            matched[name] = alike[0]
    left = [name for name in names if name not in matched]
    spare = [f for f in episode.cameras if f not in matched.values()]
    if len(left) == 1 and len(spare) == 1:
        matched[left[0]] = spare[0]
    elif left:
        raise InputError(
            f"{robot.path}: cameras {', '.join(left)} have no counterpart among the dataset's "
            f"{', '.join(episode.cameras) or '(none)'}; say --camera {left[0]}=<feature>"
        )
    return {name: matched[name] for name in names}


def _pair(text: str) -> tuple[str, str]:
    name, sign, feature = text.partition("=")
    if not sign or not name or not feature:
        raise InputError(f"--camera: {text!r} given, expected NAME=FEATURE")
    return name, feature


def _order(episode: LeRobotEpisode, robot: RobotFile, key: str, wanted: Sequence[str]) -> NDArray[np.intp]:
    """Column of ``key`` for each wanted name: by name where the dataset names them, else in order."""
    given = episode.names(key)
    dim = int(np.prod(episode.info["features"][key]["shape"]))
    if given and all(name in given for name in wanted):
        return np.array([given.index(name) for name in wanted], dtype=np.intp)
    if dim != len(wanted):
        raise InputError(
            f"{episode.root}: {key}: {dim} values ({', '.join(given[:4]) or 'unnamed'} ...) given, "
            f"expected the {len(wanted)} that {robot.path} names ({', '.join(wanted[:4])} ...)"
        )
    return np.arange(dim, dtype=np.intp)


def _joint_positions(robot: RobotFile, state: NDArray[np.float64]) -> NDArray[np.float64]:
    """The checkpoint's state [frames, state] -> joint positions [frames, joints] in ROS units."""
    lacking = [name for name in robot.joint_names if name not in robot.state_names]
    if lacking:
        raise InputError(f"{robot.path}: joints {', '.join(lacking)} are not in policy.state, so no dataset has them")
    positions = np.empty((len(state), len(robot.joint_names)))
    for column, name in enumerate(robot.state_names):
        used = robot.conventions.get(name, Convention())
        positions[:, robot.joint_names.index(name)] = state[:, column] / used.scale + used.offset
    return positions


def _topic(relative: str) -> str:
    return "/" + relative.lstrip("/~")


def _write_frame(writer: BagWriter, camera: Camera, pixels: NDArray[np.uint8], t: int, quality: int) -> None:
    if camera.type == "compressed":
        import cv2

        done, data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        if not done:
            raise InputError(f"{camera.name}: a frame of {pixels.shape} cannot be encoded as JPEG")
        message, kind = writer.jpeg(t, data.tobytes(), camera.name), "sensor_msgs/msg/CompressedImage"
    else:
        message, kind = writer.image(t, pixels, camera.name), "sensor_msgs/msg/Image"
    writer.write(_topic(camera.topic), kind, message, t)


def _write_command(writer: BagWriter, robot: RobotFile, names: list[str], command: NDArray[np.float64], t: int) -> None:
    topic = _topic(robot.command.topic)
    if robot.command.interface == "joint_trajectory":
        # Stamp 0: a controller that hears the bag starts the step when it arrives.
        message = writer.trajectory(0, names, command[None], np.array([robot.period]))
        writer.write(topic, "trajectory_msgs/msg/JointTrajectory", message, t)
    elif robot.command.interface == "forward_position":
        writer.write(topic, "std_msgs/msg/Float64MultiArray", writer.floats(command), t)
    else:
        writer.write(topic, "geometry_msgs/msg/TwistStamped", writer.twist(t, command), t)
