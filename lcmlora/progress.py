"""Progress of long work: a bar on a terminal, a plain line every 15 seconds in a log."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, Self, TypeVar

from lcmlora.io.terminal import note, shown

T = TypeVar("T")

_LABEL = 100  # characters
_LOG_EVERY = 15.0  # seconds between lines where there is no terminal


class Track(Generic[T]):
    """Iterates over `items` and shows the number done, the rate, the time left and the noted figures."""

    def __init__(self, items: Iterable[T], label: str, total: int, completed: int, unit: int, quiet: bool) -> None:
        self._items = items
        self._label = shown(label, _LABEL)
        self._total = total
        self._start = completed
        self._unit = unit
        self._quiet = quiet
        self._figures: dict[str, float] = {}

    def note(self, **figures: float) -> None:
        """Shows these figures beside the bar from now on."""
        self._figures |= figures

    def __iter__(self) -> Generator[T, None, None]:
        if self._quiet:
            yield from self._items
        else:
            yield from self._on_terminal() if sys.stderr.isatty() else self._in_log()

    def _text(self, done: int, seconds: float) -> str:
        rate = (done - self._start) * self._unit / max(seconds, 1e-9)
        left = (self._total - done) * self._unit / rate if rate else float("inf")
        figures = "".join(f"  {name} {value:.4g}" for name, value in self._figures.items())
        return f"{rate:.1f}/s  {left:.0f} s left{figures}"

    def _in_log(self) -> Iterator[T]:
        began = last = time.monotonic()
        done = self._start
        for item in self._items:
            yield item
            done += 1
            now = time.monotonic()
            if now - last > _LOG_EVERY or (done == self._total and now - began > 1):
                note(f"{self._label}: {done}/{self._total}  {self._text(done, now - began)}")
                last = now

    def _on_terminal(self) -> Iterator[T]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        began = time.monotonic()
        done = self._start
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(self._label, total=self._total, completed=done, text="")
            for item in self._items:
                yield item
                done += 1
                bar.update(task, completed=done, text=self._text(done, time.monotonic() - began))


def track(
    items: Iterable[T],
    label: str,
    *,
    total: int | None = None,
    completed: int = 0,
    unit: int = 1,
    quiet: bool = False,
) -> Track[T]:
    """Returns an iterable over `items` that shows its progress on standard error.

    Args:
        total: how many items there are in all, those already `completed` by an earlier run included.
        unit: pictures in one item, such as a batch, for the rate.
        quiet: show nothing, since another process does.
    """
    count = len(items) if total is None else total  # type: ignore[arg-type]
    return Track(items, label, count, completed, unit, quiet)


class Bar:
    """Progress that is shown from the beginning to the end of a block, and advanced where no loop does it."""

    def __init__(self, items: int, label: str, *, total: int, completed: int, unit: int) -> None:
        """The arguments are those of `track`; `items` is how many are left."""
        self._steps = iter(track(range(items), label, total=total, completed=completed, unit=unit))

    def __enter__(self) -> Self:
        self.advance()  # the first step begins
        return self

    def advance(self, items: int = 1) -> None:
        for _ in range(items):
            next(self._steps, None)

    def __exit__(self, *_: object) -> None:
        self._steps.close()


def parse_log_line(line: str) -> tuple[str, int, int] | None:
    """Returns label, items done and total of a line that `track` wrote to a log; None for any other line."""
    found = re.match(r"(.+): (\d+)/(\d+)  [\d.]+/s  \S+ s left", line)
    return (found[1], int(found[2]), int(found[3])) if found else None
