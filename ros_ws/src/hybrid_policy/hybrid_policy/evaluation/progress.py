"""Progress on stderr for what takes more than two seconds; silent where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
_PATIENCE = 2.0


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """``items`` unchanged; after two seconds a bar with the time left appears on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
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


class Laps:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, what: str) -> None:
        """All since the last call was spent on this."""
        now = time.perf_counter()
        self.spent[what] = self.spent.get(what, 0.0) + now - self._last
        self._last = now


class Bar:
    """A bar of a fraction, for work that reports how far it is; lines said stand above it, on stderr."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, fraction: float, text: str) -> None:
        """Show ``fraction`` (0 to 1) done and what is being done; nothing in the first two seconds."""
        if self._bar is None:
            if not sys.stderr.isatty() or time.monotonic() - self._started < _PATIENCE:
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=1.0)
        self._bar.update(self._task, completed=fraction, description=text)

    def say(self, line: str) -> None:
        """One finished thing."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr)
