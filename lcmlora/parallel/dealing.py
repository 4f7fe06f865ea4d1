"""Dealing tasks to workers as these become free, and again where a worker dies."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from lcmlora.errors import UserError
from lcmlora.io.terminal import note, shown
from lcmlora.parallel.worker import Done, Failed, Ready

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

IN_HAND = 2  # tasks of a worker: the one it is at, and the one that it finds when it is done
_DEATHS = 3  # workers that may die at one task, or one after the other before they can do anything


class Pool(Protocol[T, R_co]):
    """Workers that all have the same function."""

    @property
    def size(self) -> int:
        """The number of workers."""

    def results(self, tasks: Iterable[T]) -> Iterator[tuple[T, R_co]]:
        """Yields each task with its result, as they are finished and not in order.

        A task is dealt when a worker has fewer than two in hand. Where a worker dies, what it had in hand is dealt to
        others.

        Raises:
            UserError: raised by the function for a task, or three workers died at the same task.
            Exception: likewise raised by the function; its cause is the traceback of the worker.
        """


@dataclass(frozen=True)
class Died:
    """A worker has ended, and does nothing more; the engine starts another one in its place.

    how: that it ended, for a message.
    by_itself: whether it ended by itself, perhaps because of its task; not if its machine was lost.
    """

    how: str
    by_itself: bool = True


Event = Ready | Done | Failed | Died


class Engine(Protocol):
    """Starts workers, which have numbers, and starts others for those that die."""

    @property
    def size(self) -> int:
        """The number of workers."""

    def give(self, worker: int, task: Any) -> None:
        """Gives a worker a task. It does its tasks in the order in which it gets them."""

    def events(self) -> list[tuple[int, Event]]:
        """Returns what the workers, by number, have sent; waits for a moment where that is nothing.

        Of each worker: first Ready, or Failed if it could not make its function; then Done or Failed for each task;
        Died at last.
        """

    def end(self, *, at_once: bool) -> None:
        """Ends all workers: at once, or letting those without a task end in their own time."""


@dataclass(eq=False)
class _Dealt(Generic[T]):
    """A task of one call of `results`."""

    call: object
    task: T
    deaths: int = 0  # of workers, at this task


@dataclass
class Dealer(Generic[T, R]):
    """Deals tasks to the workers of an engine."""

    engine: Engine
    in_hand: dict[int, deque[_Dealt[T]]] = field(default_factory=dict)  # of the workers that are ready
    deaths: int = 0  # of workers that did nothing, one after the other

    @property
    def size(self) -> int:
        return self.engine.size

    def results(self, tasks: Iterable[T]) -> Iterator[tuple[T, R]]:
        call = object()
        coming = (_Dealt(call, task) for task in tasks)
        waiting: deque[_Dealt[T]] = deque()
        while self._deal(coming, waiting) or self._has_any(call):
            for number, event in self.engine.events():
                yield from self._take(number, event, call, waiting)

    def _deal(self, coming: Iterator[_Dealt[T]], waiting: deque[_Dealt[T]]) -> bool:
        """Gives tasks to the workers that have too few in hand. Returns whether one is left."""
        for wanted in range(1, IN_HAND + 1):  # first to those that have nothing to do
            for number, in_hand in self.in_hand.items():
                if len(in_hand) < wanted:
                    waiting.extend(islice(coming, 0 if waiting else 1))
                    if not waiting:
                        return False
                    in_hand.append(waiting.popleft())
                    self.engine.give(number, in_hand[-1].task)
        waiting.extend(islice(coming, 0 if waiting else 1))
        return bool(waiting)

    def _has_any(self, call: object) -> bool:
        return any(dealt.call is call for in_hand in self.in_hand.values() for dealt in in_hand)

    def _take(self, number: int, event: Event, call: object, waiting: deque[_Dealt[T]]) -> Iterator[tuple[T, R]]:
        """Takes note of an event, and yields the task that it is the end of, with its result."""
        if isinstance(event, Ready):
            self.in_hand[number] = deque()
        elif isinstance(event, Died):
            self._bury(number, event, call, waiting)
        elif number not in self.in_hand:
            assert isinstance(event, Failed)
            raise event.raised()
        else:
            self.deaths = 0
            dealt = self.in_hand[number].popleft()
            if dealt.call is not call:  # what an earlier call has not waited for
                return
            if isinstance(event, Failed):
                raise event.raised()
            yield dealt.task, event.result

    def _bury(self, number: int, died: Died, call: object, waiting: deque[_Dealt[T]]) -> None:
        """Keeps what a dead worker had in hand, to be dealt again.

        Raises:
            UserError: too many workers have died at the task that it was at, or before they did anything.
        """
        note(f"launch: a worker {died.how}; another one takes its place")
        left = self.in_hand.pop(number, deque())
        if died.by_itself and left:
            left[0].deaths += 1
            if left[0].deaths == _DEATHS and left[0].call is call:
                raise UserError(f"{shown(left[0].task, 200)}: {_DEATHS} workers died at it; the last one {died.how}")
        elif died.by_itself:
            self.deaths += 1
            if self.deaths == _DEATHS:
                raise UserError(f"{_DEATHS} workers died before they could do anything; the last one {died.how}")
        waiting.extend(dealt for dealt in left if dealt.call is call)
