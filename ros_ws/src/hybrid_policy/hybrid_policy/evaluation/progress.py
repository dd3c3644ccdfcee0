"""Progress on stderr for what takes more than two seconds; silent where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = 2.0


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """``items`` unchanged; after two seconds a bar with the time left appears on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield from items
        return
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None
    started, bar, task = time.monotonic(), None, None
    try:
        for count, item in enumerate(items):
            yield item
            if bar is None and time.monotonic() - started > _PATIENCE:
                bar = _bar(unit)
                bar.start()
                task = bar.add_task(what, total=total)
            if bar is not None and task is not None:
                bar.update(task, completed=count + 1)
    finally:
        if bar is not None:
            bar.stop()


def _bar(unit: str):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
