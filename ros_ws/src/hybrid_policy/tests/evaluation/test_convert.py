"""LeRobot episodes become bags: a real v2.1 one, and small v2.1 and v3.0 ones made here."""

from __future__ import annotations

import json

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hybrid_policy.cli import main
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.lerobot_episode import open_episode
from hybrid_policy.evaluation.message_types import Decoder
from hybrid_policy.evaluation.survey import survey
from hybrid_policy.evaluation.topic_match import match_topics
from hybrid_policy.share import resolve

ROBOT = """
name: toy
cameras: [{name: top, topic: cam/image_raw, type: image, rate: 10.0}]
joint_states: {topic: joint_states, rate: 10.0}
prompt: {topic: prompt, default: go}
joints:
  - {name: lift, min: 0.0, max: 1.0, max_velocity: 9.0}
  - {name: turn, min: -3.0, max: 3.0, max_velocity: 9.0}
policy:
  rate: 10.0
  state: [turn, lift]
  action: [turn, lift]
  conventions: {lift: {offset: 0.1, scale: 10.0}}
command: {interface: joint_trajectory, topic: controller/joint_trajectory}
timeouts: {camera: 0.5, joint_states: 0.2, skew: 0.1, action: hold}
"""
FRAMES = 12


def video(path, frames: int, fps: int, first: int = 0) -> None:
    """Grey frames whose brightness is 10 x their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size = 5
        for k in range(first, first + frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * k, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def info(version: str, data: str, movie: str, names=("turn", "lift")) -> dict:
    vector = {"dtype": "float32", "shape": [2], "names": list(names)}
    return {
        "codebase_version": version, "fps": 10, "chunks_size": 1000, "data_path": data, "video_path": movie,
        "features": {
            "observation.state": vector, "action": vector,
            "observation.images.top": {"dtype": "video", "shape": [48, 64, 3], "names": ["h", "w", "c"]},
        },
    }  # fmt: skip


def table(episodes: list[int], extra: dict | None = None) -> pyarrow.Table:
    rows = [(e, k) for e in episodes for k in range(FRAMES)]
    return pyarrow.table({
        "observation.state": [[0.1 * k, 1.0 + e] for e, k in rows],
        "action": [[0.1 * k + 0.5, 2.0 + e] for e, k in rows],
        "frame_index": [k for _, k in rows],
        "episode_index": [e for e, _ in rows],
        "task_index": [e for e, _ in rows],
        "timestamp": np.array([k / 10 for _, k in rows], np.float32),
        **(extra or {}),
    })  # fmt: skip


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.yaml").write_text(ROBOT)
    return tmp_path / "toy.yaml"


@pytest.fixture
def v21(tmp_path):
    root = tmp_path / "v21"
    (root / "meta").mkdir(parents=True)
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    movie = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (root / "meta/info.json").write_text(json.dumps(info("v2.1", data, movie)))
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "fold"}\n{"task_index": 3, "task": "stack"}\n')
    for e in (0, 3):
        path = root / data.format(episode_chunk=0, episode_index=e)
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table([e]), path)
        video(root / movie.format(episode_chunk=0, episode_index=e, video_key="observation.images.top"), FRAMES, 10)
    return root


@pytest.fixture
def v30(tmp_path):
    """Two episodes in one parquet file and one video."""
    root = tmp_path / "v30"
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    movie = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    (root / "meta/info.json").write_text(json.dumps(info("v3.0", data, movie)))
    pyarrow.parquet.write_table(
        pyarrow.table({"task_index": [0, 1], "__index_level_0__": ["fold", "stack"]}), root / "meta/tasks.parquet"
    )
    key = "videos/observation.images.top/"
    pyarrow.parquet.write_table(
        pyarrow.table({
            "episode_index": [0, 1], "data/chunk_index": [0, 0], "data/file_index": [0, 0],
            key + "chunk_index": [0, 0], key + "file_index": [0, 0],
            key + "from_timestamp": [0.0, FRAMES / 10], key + "to_timestamp": [FRAMES / 10, 2 * FRAMES / 10],
        }),
        root / "meta/episodes/chunk-000/file-000.parquet",
    )  # fmt: skip
    path = root / data.format(chunk_index=0, file_index=0)
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(table([0, 1]), path)
    movie_path = movie.format(chunk_index=0, file_index=0, video_key="observation.images.top")
    video(root / movie_path, 2 * FRAMES, 10)
    return root


def contents(path):
    """topic -> [(time, message)]"""
    bag = open_bag(path)
    decoder = Decoder(bag.topics)
    found: dict = {}
    for message in bag.messages():
        found.setdefault(message.topic, []).append((message.t_ns, decoder.decode(message)))
    return found


@pytest.mark.parametrize(("dataset", "episode", "task"), [("v21", 3, "stack"), ("v30", 1, "stack"), ("v30", 0, "fold")])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_an_episode_becomes_the_robots_topics(dataset, episode, task, storage, toy, tmp_path, request):
    root = request.getfixturevalue(dataset)
    out = tmp_path / "bag"
    given = ["convert", str(root), str(out), "--robot", str(toy), "--episode", str(episode), "--storage", storage]
    assert main(given) == 0
    found = contents(out)
    assert {t: len(m) for t, m in found.items()} == {
        "/prompt": 1, "/cam/image_raw": FRAMES, "/joint_states": FRAMES, "/controller/joint_trajectory": FRAMES,
    }  # fmt: skip
    assert found["/prompt"][0][1].data == task
    start = found["/joint_states"][0][0]
    for k, (t, state) in enumerate(found["/joint_states"]):
        assert t - start == k * 100_000_000
        assert state.header.stamp.sec * 10**9 + state.header.stamp.nanosec == t
        assert state.name == ["lift", "turn"]
        # lift: the checkpoint's value is (position - 0.1) * 10
        np.testing.assert_allclose(state.position, [(1.0 + episode) / 10 + 0.1, 0.1 * k], rtol=1e-6)
    for k, (_, told) in enumerate(found["/controller/joint_trajectory"]):
        assert told.joint_names == ["lift", "turn"]
        np.testing.assert_allclose(told.points[0].positions, [(2.0 + episode) / 10 + 0.1, 0.1 * k + 0.5], rtol=1e-6)
    offset = FRAMES * episode if dataset == "v30" else 0
    for k, (_, image) in enumerate(found["/cam/image_raw"]):
        assert abs(float(image.data.mean()) - 10 * (k + offset) % 256) < 6.0


def test_the_real_episode_is_converted_whole(g1, tmp_path):
    out = tmp_path / "g1"
    assert main(["convert", str(g1), str(out), "--robot", "g1", "--json"]) == 0
    found = contents(out)
    assert len(found["/joint_states"]) == len(found["/head_camera/image_raw/compressed"]) == 450
    episode = open_episode(g1)
    state = episode.vectors("observation.state")
    np.testing.assert_allclose(found["/joint_states"][200][1].position, state[200], rtol=1e-6)
    robot = RobotFile.load(resolve("g1", "config/robots"))
    bag = open_bag(out)
    known = survey(bag, robot, match_topics(robot, bag.topics, {}))
    assert (known.lacks, known.notes) == ([], [])
    assert known.seconds == pytest.approx(449 / 30)
    # what is sampled at a frame's time is that frame's action
    told = known.actions.segment(0).sample(known.joint_times)
    np.testing.assert_allclose(told, robot.commands(episode.vectors("action")), atol=1e-6)


def test_a_camera_is_chosen_by_name(v21, toy, tmp_path):
    text = toy.read_text().replace("name: top", "name: base_0_rgb")
    toy.write_text(text)
    assert main(["convert", str(v21), str(tmp_path / "a"), "--robot", str(toy)]) == 0  # the only one left
    given = ["--camera", "base_0_rgb=observation.images.top"]
    assert main(["convert", str(v21), str(tmp_path / "b"), "--robot", str(toy), *given]) == 0


@pytest.mark.parametrize(
    ("change", "given", "expected"),
    [
        (lambda r, t: None, ["--episode", "7"], "episode 7 given, expected one of 000000, 000003"),
        (lambda r, t: None, ["--camera", "top"], "'top' given, expected NAME=FEATURE"),
        (lambda r, t: None, ["--camera", "x=observation.images.top"], "'x' given, expected one of top"),
        (lambda r, t: None, ["--camera", "top=front"], "'front' given, expected one of observation.images.top"),
        (lambda r, t: None, ["--jpeg-quality", "0"], "--jpeg-quality: 0 given"),
        (lambda r, t: (r / "meta/info.json").unlink(), [], "no LeRobot dataset"),
        (lambda r, t: (r / "meta/info.json").write_text("{"), [], "not readable as LeRobot's info.json"),
        (lambda r, t: (r / "meta/info.json").write_text(
            '{"codebase_version": "v9", "features": {"observation.state": 1}}'),
         [], "'v9' given, expected v2.0, v2.1 or v3.0"),
        (lambda r, t: next(r.glob("videos/**/episode_000000.mp4")).unlink(), [], "no video at"),
        (lambda r, t: next(r.glob("videos/**/episode_000000.mp4")).write_bytes(b"x" * 99), [], "not a readable video"),
        (lambda r, t: video(next(r.glob("videos/**/episode_000000.mp4")), 5, 10), [], "5 frames, expected 12"),
        (lambda r, t: next(r.glob("data/**/episode_000000.parquet")).write_bytes(b"x"), [], "not a readable parquet"),
        (lambda r, t: t.write_text(ROBOT.replace("state: [turn, lift]", "state: [turn]")), [],
         "joints lift are not in policy.state"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_one_clear_error(v21, toy, tmp_path, capsys, change, given, expected):
    change(v21, toy)
    assert main(["convert", str(v21), str(tmp_path / "bag"), "--robot", str(toy), *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


def test_a_bag_is_replaced_only_when_told(v21, toy, tmp_path, capsys):
    given = ["convert", str(v21), str(tmp_path / "bag"), "--robot", str(toy)]
    assert main(given) == 0
    assert main(given) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*given, "--force"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear")
    assert main(["convert", str(v21), str(tmp_path / "mine"), "--robot", str(toy), "--force"]) == 2
    assert (tmp_path / "mine" / "letters.txt").exists()


def test_pictures_in_the_table_are_read(v21, tmp_path):
    import io

    from PIL import Image

    def png(k: int) -> dict:
        data = io.BytesIO()
        Image.fromarray(np.full((4, 6, 3), k, np.uint8)).save(data, "PNG")
        return {"bytes": data.getvalue(), "path": None}

    described = json.loads((v21 / "meta/info.json").read_text())
    described["features"]["observation.images.top"]["dtype"] = "image"
    (v21 / "meta/info.json").write_text(json.dumps(described))
    pyarrow.parquet.write_table(
        table([0], {"observation.images.top": [png(k) for k in range(FRAMES)]}),
        v21 / "data/chunk-000/episode_000000.parquet",
    )
    frames = list(open_episode(v21, 0).frames("observation.images.top"))
    assert [int(f[0, 0, 0]) for f in frames] == list(range(FRAMES))
    assert frames[0].shape == (4, 6, 3)


def test_an_unnamed_vector_of_another_size_is_refused(v21, tmp_path):
    from hybrid_policy.evaluation.convert_command import convert

    robot_path = tmp_path / "three.yaml"
    robot_path.write_text(
        ROBOT.replace("policy:", "  - {name: tilt, min: 0.0, max: 1.0, max_velocity: 1.0}\npolicy:").replace(
            "[turn, lift]", "[turn, lift, tilt]"
        )
    )
    with pytest.raises(InputError, match=r"observation.state: 2 values \(turn, lift ...\) given, expected the 3"):
        convert(open_episode(v21, 0), RobotFile.load(robot_path), tmp_path / "bag", {"top": "observation.images.top"})
