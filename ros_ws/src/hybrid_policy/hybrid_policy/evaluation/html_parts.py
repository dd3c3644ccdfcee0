"""Small pieces of the report's HTML. Cells and lines given to them are HTML already where it says so."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def escape(value: object) -> str:
    """Text as HTML."""
    return html.escape(str(value), quote=True)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], columns: str = "") -> str:
    """A table of cells that are HTML already.

    columns: a letter each: ``n`` a number (set to the right), ``u`` a remark (grey), else text.
    """
    kinds = [{"n": " class=n", "u": " class=u"}.get(letter, "") for letter in columns.ljust(len(heads), "t")]
    top = "".join(f"<th{kind}>{head}</th>" for head, kind in zip(heads, kinds))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds)) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def lines(title: str, texts: Sequence[str], kind: str) -> str:
    """A box of plain lines under a title; nothing for no line. kind: ``bad`` or ``warn``."""
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<div class='lines {kind}'><b>{escape(title)}</b><ul>{items}</ul></div>"


def titled(title: str, content: str, how: str = "") -> str:
    """HTML under a heading, with a word on how to read it; nothing for no content."""
    if not content:
        return ""
    word = f"<p class=how>{escape(how)}</p>" if how else ""
    return f"<h3>{escape(title)}</h3>{word}{content}"


def picture(name: str, pixels: NDArray[np.uint8]) -> str:
    """uint8 [height, width, 3] as an inlined JPEG with its name below."""
    import cv2

    bgr = np.ascontiguousarray(pixels[:, :, ::-1])
    done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 85])
    source = "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode() if done else ""
    image = f"<img alt='{escape(name)}' src='{source}'>"
    return f"<figure>{image}<figcaption>{escape(name)}</figcaption></figure>"


def number(value: float | None) -> str:
    """A number in as many digits as one reads; a dash where there is none."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value)}"
    return f"{value:.5f}" if 0.9 < abs(value) < 1.0 else f"{value:.3g}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds."""
    return "–" if seconds is None else f"{seconds * 1e3:.1f}"
