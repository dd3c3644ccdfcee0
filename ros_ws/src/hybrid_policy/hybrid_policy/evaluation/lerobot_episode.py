"""An episode of a LeRobot dataset on disk: v2.0, v2.1 (a file an episode) and v3.0 (many in a file).

Layouts: LeRobot's ``meta/info.json`` names the files by ``data_path`` and ``video_path``; in v3.0
``meta/episodes/**.parquet`` says in which file and at which time of a video an episode lies.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError

STATE, ACTION = "observation.state", "action"
_IMAGES = "observation.image"


@dataclass(frozen=True)
class LeRobotEpisode:
    """One episode. Made by :func:`open_episode`; tables are read when asked for."""

    root: Path
    index: int
    info: Mapping[str, Any]
    table: Any
    location: Mapping[str, Any]

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.info["fps"])

    @property
    def length(self) -> int:
        """Frames."""
        return int(self.table.num_rows)

    @cached_property
    def cameras(self) -> tuple[str, ...]:
        """Feature keys of the cameras."""
        return tuple(
            key
            for key, feature in self.info["features"].items()
            if key.startswith(_IMAGES) and feature.get("dtype") in ("video", "image")
        )

    def names(self, key: str) -> tuple[str, ...]:
        """Names of a vector feature's entries; empty where the dataset gives none."""
        given = self.info["features"].get(key, {}).get("names")
        if isinstance(given, Mapping):  # {"motors": [...]} or {"a": 0, "b": 1}
            values = list(given.values())
            given = values[0] if len(values) == 1 and isinstance(values[0], list) else list(given)
        while isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
            given = given[0]
        return tuple(str(name) for name in given) if isinstance(given, list) else ()

    def vectors(self, key: str) -> NDArray[np.float64] | None:
        """float64 [frames, dim] of a feature; None where the dataset lacks it.

        Raises:
            InputError: rows differ in length.
        """
        if key not in self.table.column_names:
            return None
        try:
            values = np.array(self.table[key].to_pylist(), dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.root}: {key}: rows of unlike length, expected one vector a frame") from error
        return values.reshape(self.length, -1)

    @cached_property
    def times(self) -> NDArray[np.int64]:
        """int64 [frames]: nanoseconds from the first frame, by frame index (float32 timestamps drift)."""
        if "frame_index" in self.table.column_names:
            index = np.asarray(self.table["frame_index"].to_pylist(), dtype=np.int64)
        else:
            index = np.arange(self.length, dtype=np.int64)
        return np.round((index - index[0]) * (1e9 / self.fps)).astype(np.int64)

    @cached_property
    def task(self) -> str:
        """The prompt; empty where the dataset says none."""
        if "task_index" not in self.table.column_names or not self.length:
            return ""
        return _tasks(self.root).get(int(self.table["task_index"][0].as_py()), "")

    def frames(self, key: str) -> Iterator[NDArray[np.uint8]]:
        """uint8 [height, width, 3] RGB of a camera, frame by frame, streamed.

        Raises:
            InputError: the video is missing, unreadable or shorter than the episode.
        """
        if self.info["features"][key].get("dtype") == "image":
            yield from self._pictures(key)
            return
        path = self._video(key)
        start = float(self.location.get(f"videos/{key}/from_timestamp", 0.0))
        given = 0
        for frame in _decode(path, start, self.fps):
            yield frame
            given += 1
            if given == self.length:
                return
        raise InputError(f"{path}: {given} frames, expected {self.length} (episode {self.index})")

    def _pictures(self, key: str) -> Iterator[NDArray[np.uint8]]:
        from PIL import Image

        for row in self.table[key]:
            cell = row.as_py()
            source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else self.root / str(cell.get("path"))
            with Image.open(source) as picture:
                yield np.asarray(picture.convert("RGB"))

    def _video(self, key: str) -> Path:
        form = self.info.get("video_path") or ""
        path = self.root / form.format(
            video_key=key,
            episode_index=self.index,
            episode_chunk=self.index // int(self.info.get("chunks_size", 1000)),
            chunk_index=self.location.get(f"videos/{key}/chunk_index", 0),
            file_index=self.location.get(f"videos/{key}/file_index", 0),
        )
        if not path.is_file():
            raise InputError(f"{self.root}: {key}: no video at {path.relative_to(self.root)}")
        return path


def open_episode(root: str | Path, index: int | None = None) -> LeRobotEpisode:
    """Episode ``index`` of the dataset at ``root``; without an index, the first whose data is there.

    Raises:
        InputError: no dataset, another format version, or no such episode.
    """
    root = Path(root).expanduser()
    meta = root / "meta" / "info.json"
    if not meta.is_file():
        raise InputError(f"{root}: no LeRobot dataset (meta/info.json is missing)")
    try:
        info = json.loads(meta.read_text("utf-8"))
        version, features = str(info["codebase_version"]), info["features"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{meta}: not readable as LeRobot's info.json ({error})") from error
    if STATE not in features:
        raise InputError(f"{meta}: features: {', '.join(features)} given, expected {STATE} too")
    if version.startswith("v2"):
        return _open_v2(root, info, index)
    if version.startswith("v3"):
        return _open_v3(root, info, index)
    raise InputError(f"{meta}: codebase_version: {version!r} given, expected v2.0, v2.1 or v3.0")


def _open_v2(root: Path, info: Mapping[str, Any], index: int | None) -> LeRobotEpisode:
    if index is None:
        found = sorted((root / "data").glob("**/episode_*.parquet"))
        if not found:
            raise InputError(f"{root}: no data/**/episode_*.parquet")
        index = int(found[0].stem.removeprefix("episode_"))
    chunk = index // int(info.get("chunks_size", 1000))
    path = root / info["data_path"].format(episode_chunk=chunk, episode_index=index)
    if not path.is_file():
        have = sorted(p.stem.removeprefix("episode_") for p in (root / "data").glob("**/episode_*.parquet"))
        raise InputError(f"{root}: episode {index} given, expected one of {_some(have)}")
    return LeRobotEpisode(root, index, info, _read(path), {})


def _open_v3(root: Path, info: Mapping[str, Any], index: int | None) -> LeRobotEpisode:
    from pyarrow import compute

    rows: list[dict[str, Any]] = []
    for path in sorted((root / "meta" / "episodes").glob("**/*.parquet")):
        table = _read(path)
        keep = [name for name in table.column_names if not name.startswith("stats/")]
        rows += table.select(keep).to_pylist()
    if not rows:
        raise InputError(f"{root}: no meta/episodes/**/*.parquet")
    by_index = {int(row["episode_index"]): row for row in rows}
    index = min(by_index) if index is None else index
    if index not in by_index:
        raise InputError(f"{root}: episode {index} given, expected one of {_some(sorted(by_index))}")
    location = by_index[index]
    path = root / info["data_path"].format(
        chunk_index=location.get("data/chunk_index", 0), file_index=location.get("data/file_index", 0)
    )
    if not path.is_file():
        raise InputError(f"{root}: episode {index}: no data at {path.relative_to(root)}")
    table = _read(path)
    return LeRobotEpisode(root, index, info, table.filter(compute.equal(table["episode_index"], index)), location)


def _tasks(root: Path) -> dict[int, str]:
    lines, table = root / "meta" / "tasks.jsonl", root / "meta" / "tasks.parquet"
    if lines.is_file():
        rows = [json.loads(line) for line in lines.read_text("utf-8").splitlines() if line.strip()]
    elif table.is_file():
        rows = _read(table).to_pylist()  # v3.0 keeps the task as the pandas index
    else:
        return {}
    return {
        int(row["task_index"]): str(next((row[k] for k in ("task", "__index_level_0__") if k in row), ""))
        for row in rows
    }


def _read(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _decode(path: Path, start: float, fps: float) -> Iterator[NDArray[np.uint8]]:
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if start > 0 and stream.time_base is not None:
                container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is None or frame.time >= start - 0.5 / fps:
                    yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"{path}: not a readable video ({error})") from error


def _some(values: list[Any]) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return shown + (f" and {len(values) - 8} more" if len(values) > 8 else "")
