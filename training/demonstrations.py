"""Write the expert's demonstrations as a LeRobot dataset (v2.1), for others to learn from.

    python training/demonstrations.py --out out/demonstrations --episodes 400

One file of numbers (parquet) and one video a camera (H.264) an episode, 20 frames per second; state and
action in the units of the robot file's policy side (rad; grippers 0 closed, 1 open). The action of a frame is
the set-point commanded from it to the next. Scenes are varied as for training (light, shades, sizes, start
pose, phrasing, sometimes a third cube), the set-points disturbed by --motor-noise. Episode k comes from seed
``--seed`` + k alone, so the dataset is the same for any number of processes. Failed episodes are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from collect import SCENES
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.progress import progress
from hybrid_policy.share import share_path
from hybrid_policy.sim.expert import PERIOD, next_set_points
from hybrid_policy.sim.rendering import choose_gl
from hybrid_policy.sim.robot import CAMERAS, IMAGE_SIZE, TIME_STEP, SimRobot
from hybrid_policy.sim.tasks import expert_state, judge, sample_scene
from numpy.typing import NDArray

FPS = round(1 / PERIOD)
LIMIT, AFTER = 120, 6  # frames an episode at most; frames kept after success
CHUNK = 1000
IMAGES = "observation.images."


@dataclass(frozen=True)
class Recorded:
    """What one episode gave: its prompt, its length and the statistics that LeRobot wants."""

    index: int
    prompt: str
    length: int
    stats: dict[str, Any]


def _video(path: Path, frames: NDArray[np.uint8]) -> None:
    """uint8 [n, height, width, 3] as H.264, every second frame a key frame (as LeRobot writes videos)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _statistics(values: NDArray[Any]) -> dict[str, Any]:
    """min, max, mean, std and count over the frames of [n, d]."""
    rows = np.asarray(values, np.float64).reshape(len(values), -1)
    return {
        "min": rows.min(0).tolist(),
        "max": rows.max(0).tolist(),
        "mean": rows.mean(0).tolist(),
        "std": rows.std(0).tolist(),
        "count": [len(rows)],
    }


def _image_statistics(frames: NDArray[np.uint8]) -> dict[str, Any]:
    """The same of pictures, per channel in [0, 1], shaped [3, 1, 1] as LeRobot has them."""
    pixels = frames[:: max(1, len(frames) // 10)].reshape(-1, 3) / 255.0
    stats = {name: getattr(pixels, name)(0) for name in ("min", "max", "mean", "std")}
    return {
        **{name: value.reshape(3, 1, 1).tolist() for name, value in stats.items()},
        "count": [len(frames)],
    }


def record(out: Path, index: int, seed: int, motor_noise: float) -> Recorded | None:
    """Run the expert in the scene of ``seed`` and write episode ``index``; None where it failed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(seed)
    scene = sample_scene(random, SCENES)
    robot = SimRobot(scene, seed=seed, motor_noise=motor_noise)
    robot_file = RobotFile.load(share_path("config/robots/sim_aloha.yaml"))
    images: dict[str, list[NDArray[np.uint8]]] = {camera: [] for camera in CAMERAS}
    states, actions = [], []
    left = AFTER
    for _ in range(LIMIT):
        for camera in CAMERAS:
            images[camera].append(robot.render(camera))
        states.append(robot_file.state(robot.positions))
        command = next_set_points(expert_state(robot))[0]
        actions.append(robot_file.actions(command))
        robot.command(command)
        robot.step(round(PERIOD / TIME_STEP))
        left -= judge(robot).success
        if left == 0:
            break
    robot.close()
    if left > 0:
        return None
    count = len(states)
    columns = {"observation.state": np.stack(states), "action": np.stack(actions)}
    order = np.arange(count)
    table = {
        **{name: pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), 14) for name, v in columns.items()},
        "timestamp": pa.array((order / FPS).astype(np.float32)),
        "frame_index": pa.array(order),
        "episode_index": pa.array(np.full(count, index)),
    }
    path = out / f"data/chunk-{index // CHUNK:03d}/episode_{index:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    stats = {name: _statistics(values) for name, values in columns.items()}
    for camera, frames in images.items():
        pictures = np.stack(frames)
        _video(out / f"videos/chunk-{index // CHUNK:03d}/{IMAGES}{camera}/episode_{index:06d}.mp4", pictures)
        stats[IMAGES + camera] = _image_statistics(pictures)
    return Recorded(index, scene.prompt, count, stats)


def finish(out: Path, recorded: list[Recorded]) -> None:
    """Number frames and prompts through the whole dataset, and write ``meta``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    meta = out / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    prompts = sorted({episode.prompt for episode in recorded})
    robot_file = RobotFile.load(share_path("config/robots/sim_aloha.yaml"))
    total = 0
    for episode in recorded:
        path = out / f"data/chunk-{episode.index // CHUNK:03d}/episode_{episode.index:06d}.parquet"
        table = pq.read_table(path)
        task = np.full(episode.length, prompts.index(episode.prompt))
        table = table.append_column("index", pa.array(np.arange(total, total + episode.length)))
        pq.write_table(table.append_column("task_index", pa.array(task)), path)
        total += episode.length

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (meta / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    lines("tasks.jsonl", [{"task_index": i, "task": prompt} for i, prompt in enumerate(prompts)])
    lines(
        "episodes.jsonl",
        [{"episode_index": e.index, "tasks": [e.prompt], "length": e.length} for e in recorded],
    )
    lines("episodes_stats.jsonl", [{"episode_index": e.index, "stats": e.stats} for e in recorded])
    vector = {"dtype": "float32", "shape": [14], "names": list(robot_file.joint_names)}
    picture = {
        "dtype": "video",
        "shape": [IMAGE_SIZE, IMAGE_SIZE, 3],
        "names": ["height", "width", "channels"],
        "info": {"video.fps": FPS, "video.codec": "h264", "video.pix_fmt": "yuv420p"},
    }
    single = {name: {"dtype": "int64", "shape": [1], "names": None}
              for name in ("frame_index", "episode_index", "index", "task_index")}  # fmt: skip
    info = {
        "codebase_version": "v2.1",
        "robot_type": robot_file.name,
        "total_episodes": len(recorded),
        "total_frames": total,
        "total_tasks": len(prompts),
        "total_videos": len(recorded) * len(CAMERAS),
        "total_chunks": 1 + max(e.index for e in recorded) // CHUNK,
        "chunks_size": CHUNK,
        "fps": FPS,
        "splits": {"train": f"0:{len(recorded)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": vector,
            "action": vector,
            **{IMAGES + camera: picture for camera in CAMERAS},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **single,
        },
    }
    (meta / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def write(out: Path, episodes: int, seed: int, workers: int, motor_noise: float) -> int:
    """Write ``episodes`` successful episodes; the number of those that failed and were left out.

    Raises:
        InputError: ``out`` holds files already.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError.at("demonstrations", "--out", str(out), "a folder that is empty or does not exist")
    choose_gl()
    recorded: list[Recorded] = []
    failed = 0
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = {pool.submit(record, out, k, seed + k, motor_noise) for k in range(episodes)}
        done = (future.result() for future in as_completed(waiting))
        for episode in progress(done, "demonstrations", "episodes", episodes):
            if episode is None:
                failed += 1
            else:
                recorded.append(episode)
    recorded.sort(key=lambda episode: episode.index)
    if not recorded:
        raise InputError(f"demonstrations: none of {episodes} episodes succeeded")
    finish(out, recorded)
    return failed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset, new or empty")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--motor-noise", type=float, default=0.02, help="standard deviation (rad)")
    args = parser.parse_args()
    try:
        failed = write(args.out, args.episodes, args.seed, args.workers, args.motor_noise)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.episodes - failed} episodes in {args.out}, {failed} failed and left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
