"""Shards of a latent cache that lie in a bucket, brought to this disk as training comes to need them.

The plan (plan.py) says which shards a step reads and which come next, so nothing is guessed: what is read now is there,
what comes next is on its way, and what goes is what is needed last.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from lcmlora.data.latents.sampling_plan import Load, Plan
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import parsing, temporaries
from lcmlora.io.files import atomic_write, sha256_file
from lcmlora.io.remote import Files
from lcmlora.io.terminal import note

PATIENCE = 600.0  # seconds for which a bucket that does not answer is asked again

_PIECE = 8 << 20  # bytes that are asked for at once
_AT_ONCE = 4  # shards on their way
_TRIES = 5  # for a shard that others delete
_EPOCHS = 8  # whose windows are looked at beforehand
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "U8": torch.uint8}

T = TypeVar("T")


def object_name(entry: dict[str, Any]) -> str:
    """Returns the name of a shard in the bucket: by its contents, so that none is ever overwritten."""
    return f"{entry['sha256']}.safetensors"


class Shards:
    """The shards of one cache, in a folder that holds at most `budget` bytes of them."""

    def __init__(
        self, files: Files, entries: Sequence[dict[str, Any]], folder: Path, budget: int, patience: float = PATIENCE
    ) -> None:
        """Args:
        entries: of the manifest: bytes, sha256 and number of pictures.
        folder: may be shared with other processes of this machine; finished shards in it are used.
        patience: seconds for which a bucket that does not answer is asked again.
        """
        self._files, self._entries, self._folder = files, entries, folder
        self._budget, self._patience = budget, patience
        self._plan: Plan | None = None
        self._window = 0
        self._loads: dict[int, list[Load]] = {}
        self._until = -1  # the step before which nothing changes
        self._wanted: SimpleQueue[tuple[int, Future[dict[str, Tensor]]]] = SimpleQueue()
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
        self._open: dict[int, dict[str, Tensor]] = {}
        self._headers: dict[int, tuple[int, dict[str, Any]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_AT_ONCE):  # daemons, or a process that ends would wait for a bucket that does not answer
            threading.Thread(target=self._work, daemon=True).start()

    def follow(self, plan: Plan, batch: int, window: int) -> None:
        """Prepares for a run by this plan over these shards.

        Raises:
            UserError: the budget has not the room for a window; with what is needed.
        """
        kinds: dict[int, list[dict[str, Any]]] = {}
        for entry in self._entries:  # of each shape a window is open
            kinds.setdefault(entry.get("bucket", 0), []).append(entry)
        needed = sum(_needed(entries, window // batch * batch) for entries in kinds.values())
        # What is kept from training makes shards shorter than they are in the manifest.
        for epoch in range(_EPOCHS):
            loads = plan.loads(epoch)
            needed = max([needed, *(self._bytes(_live(loads, load.first)) for load in loads)])
        self._check(needed, window)
        self._plan, self._window, self._loads, self._until = plan, window, {}, -1

    def _check(self, needed: int, window: int) -> None:
        if needed > self._budget:
            raise UserError(
                f"shard_cache_gb: {self._budget / 1e9:.3g} is not enough for what is mixed at a time: {window} "
                f"pictures (distill.window) may lie in {needed / 1e9:.3g} GB of shards, and twice that lets the next "
                f"ones come ahead; raise it to {needed / 1e9:.3g} at least, or lower the window"
            )

    def _bytes(self, loads: Sequence[Load]) -> int:
        shards = {int(number) for load in loads for number in load.shards}
        return sum(self._entries[number]["bytes"] for number in shards)

    def reach(self, step: int) -> None:
        """Says that the run is at this step: what it reads stays or comes, then what comes next, then all else goes.

        Raises:
            UserError: a shard is missing or damaged.
            Unavailable: the bucket did not answer for too long.
        """
        if self._plan is None or step < self._until:
            return
        epoch = step // self._plan.steps
        self._loads = {n: self._loads.get(n) or self._plan.loads(n) for n in (epoch, epoch + 1)}
        loads = [load for of_epoch in self._loads.values() for load in of_epoch]
        live = _live(loads, step)
        self._check(self._bytes(live), self._window)
        following = [load for load in loads if load.first > step]
        begins = self._until < 0
        self._until = min([load.last + 1 for load in live] + [load.first for load in following[:1]])
        kept: dict[int, None] = {}
        size = 0
        for load in live + following:
            fresh = [int(n) for n in load.shards if int(n) not in kept]
            size += sum(self._entries[n]["bytes"] for n in fresh)
            if kept and size > self._budget:
                break
            kept |= dict.fromkeys(fresh)
        self._leave([n for n in {*self._open, *self._coming} if n not in kept])
        if begins:
            self._sweep({self._path(n).name for n in kept})
        for number in kept:
            if number not in self._coming:
                self._coming[number] = Future()
                self._wanted.put((number, self._coming[number]))
        for load in live:
            for number in map(int, load.shards):
                self._opened(number)

    def find(self, number: int, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a tensor that has these rows (N,) of a tensor of a shard, and where in it, (N,): the whole one, on
        the disk, where it is there, else these alone, brought from the bucket row by row."""
        if number in self._coming and self._coming[number].done():
            return self._opened(number)[name], rows
        return torch.stack([self._far(number, name, int(row)) for row in rows]), torch.arange(len(rows))

    def _path(self, number: int) -> Path:
        return self._folder / object_name(self._entries[number])

    def _opened(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            self._open[number] = self._coming[number].result()
        return self._open[number]

    def _leave(self, numbers: list[int]) -> None:
        for number in numbers:
            future = self._coming.pop(number, None)
            if future is not None and not future.cancel():
                with contextlib.suppress(UserError, OSError):  # it is not needed
                    future.result()
            self._open.pop(number, None)
            self._path(number).unlink(missing_ok=True)

    def _sweep(self, kept: set[str]) -> None:
        """Deletes what earlier runs left: shards that are not kept, and pieces of those that were on their way."""
        temporaries.sweep(self._folder, None)
        for path in self._folder.iterdir():
            if path.name not in kept and not temporaries.is_temporary(path):
                path.unlink(missing_ok=True)

    def _work(self) -> None:
        while True:
            number, future = self._wanted.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._mapped(number))
            except Exception as error:
                future.set_exception(error)

    def _mapped(self, number: int) -> dict[str, Tensor]:
        """Returns the tensors of a shard, which stay when another process, which does not need it, deletes the file."""
        for _ in range(_TRIES):
            path = self._fetch(number)
            try:
                tensors: dict[str, Tensor] = load_file(path)
            except (FileNotFoundError, RuntimeError):  # torch's own, where the file goes while it is opened
                if path.exists():
                    raise
                continue  # it was deleted after it had come
            return tensors
        raise UserError(
            f"{self._path(number)}: another process deletes it again and again; give each run a folder of its own"
        )

    def _fetch(self, number: int) -> Path:
        entry, path = self._entries[number], self._path(number)
        if path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]:
            return path
        atomic_write(path, partial(self._bring, number))
        return path

    def _bring(self, number: int, target: Path) -> None:
        """Writes a shard out of the bucket to the file `target`."""
        entry, digest = self._entries[number], hashlib.sha256()
        with target.open("wb") as file:
            for start in range(0, entry["bytes"], _PIECE):
                length = min(_PIECE, entry["bytes"] - start)
                piece = self._patiently(partial(self._piece, number, start, length))
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != entry["sha256"]:
            raise self._damaged(number, f"its SHA-256 is {digest.hexdigest()[:12]}...")

    def _piece(self, number: int, start: int, length: int) -> bytes:
        name = object_name(self._entries[number])
        content = self._files.read(name, start, length)
        if len(content) < length:
            raise Unavailable(f"{name}: {len(content)} bytes came where {length} were asked for")
        return content

    def _patiently(self, call: Callable[[], T]) -> T:
        until, pause = time.monotonic() + self._patience, 1.0
        while True:
            try:
                return call()
            except Unavailable as error:
                if time.monotonic() + pause > until:
                    raise
                if pause == 1.0:
                    note(f"{error}; asking again for {self._patience:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, 15.0)

    def _far(self, number: int, name: str, row: int) -> Tensor:
        """Returns a row out of the bucket."""
        begin, header = self._header(number)
        try:
            told = header[name]
            dtype, shape = _DTYPES[told["dtype"]], told["shape"][1:]
            stride = math.prod(shape) * dtype.itemsize
            start = begin + told["data_offsets"][0] + row * stride
        except (KeyError, IndexError, TypeError):
            raise self._damaged(number, f"its header has no sound {name}") from None
        content = bytearray(self._patiently(lambda: self._piece(number, start, stride)))
        return torch.frombuffer(content, dtype=dtype).view(shape)

    def _header(self, number: int) -> tuple[int, dict[str, Any]]:
        """Returns where the tensors of a shard begin in its file, and what it says of them."""
        if number not in self._headers:
            size = int.from_bytes(self._patiently(lambda: self._piece(number, 0, 8)), "little")
            if not 0 < size <= self._entries[number]["bytes"] - 8:
                raise self._damaged(number, f"its header has {size} bytes")
            try:
                told = parsing.parse_json(self._patiently(lambda: self._piece(number, 8, size)))
            except parsing.Malformed as error:
                raise self._damaged(number, f"its header is {error}") from None
            self._headers[number] = 8 + size, told
        return self._headers[number]

    def _damaged(self, number: int, why: str) -> UserError:
        return UserError(f"{self._path(number).name}: is damaged in the bucket: {why}; run `lcmlora encode` again")


def _live(loads: Sequence[Load], step: int) -> list[Load]:
    """Returns the windows that are open at a step."""
    return [load for load in loads if load.first <= step <= load.last]


def _needed(entries: Sequence[dict[str, Any]], window: int) -> int:
    """Returns the bytes of the shards under a window, wherever it lies and in whichever order they come."""
    sizes = sorted(entry["pictures"] for entry in entries)
    inside = count = 0
    while count < len(sizes) and inside + sizes[count] <= window - 2:
        inside += sizes[count]
        count += 1
    largest = max(entry["bytes"] for entry in entries)
    return min((count + 2) * int(largest), sum(entry["bytes"] for entry in entries))
