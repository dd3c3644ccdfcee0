"""Pictures of an episode for people: a contact sheet (PNG) and an animation (GIF)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

#: Frames kept; beyond that every other one is dropped, so that the film always spans the episode.
MOST_FRAMES = 96
SHEET_COLUMNS, SHEET_ROWS = 4, 2


class EpisodeFilm:
    """Collects frames while an episode runs and writes ``episode.png`` and ``episode.gif``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._frames: list[tuple[int, NDArray[np.uint8]]] = []
        self._stride, self._count = 1, 0

    def add(self, frame: NDArray[np.uint8], stamp: int) -> None:
        """Keep a frame, uint8 [height, width, 3] RGB, of time ``stamp`` (ns)."""
        if self._count % self._stride == 0:
            self._frames.append((stamp, frame))
        self._count += 1
        if len(self._frames) > MOST_FRAMES:
            self._frames = self._frames[::2]
            self._stride *= 2

    def save(self, report: Mapping[str, object]) -> None:
        """Write both pictures; ``report`` (the task's status) becomes the caption. Nothing without frames."""
        if not self._frames:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        start = self._frames[0][0]
        pictures = [_captioned(frame, (stamp - start) * 1e-9, report) for stamp, frame in self._frames]
        _sheet(pictures).save(self._folder / "episode.png")
        seconds = (self._frames[-1][0] - start) * 1e-9 / max(1, len(self._frames) - 1)
        small = [picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)) for picture in pictures]
        small[0].save(
            self._folder / "episode.gif",
            save_all=True,
            append_images=small[1:],
            duration=max(20, round(1000 * seconds)),
            loop=0,
        )


def _captioned(frame: NDArray[np.uint8], seconds: float, report: Mapping[str, object]) -> Image.Image:
    picture = Image.fromarray(frame)
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), f"{seconds:5.1f} s   lift the {report.get('target', '?')} cube", fill=(255, 255, 255))
    return picture


def _sheet(pictures: list[Image.Image]) -> Image.Image:
    """The first, the last and evenly spaced pictures between them, in a grid."""
    count = min(len(pictures), SHEET_COLUMNS * SHEET_ROWS)
    chosen = [pictures[round(i)] for i in np.linspace(0, len(pictures) - 1, count)]
    columns = min(SHEET_COLUMNS, count)
    width, height = chosen[0].size
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for i, picture in enumerate(chosen):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
