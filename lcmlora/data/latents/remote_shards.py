"""Shards of a latent cache that lie in a bucket, downloaded to this disk as training needs them.

The sampling plan (sampling_plan.py) says which shards a step reads and which come next, so nothing is guessed: the
shards of the current windows are on this disk, those of the next windows are being downloaded, and if there is no room
the shards that are needed last are deleted.
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
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from lcmlora.data.latents.sampling_plan import SamplingPlan, Window
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import parsing, temporaries
from lcmlora.io.documents import Document
from lcmlora.io.files import atomic_write, sha256_file
from lcmlora.io.parsing import JsonObject
from lcmlora.io.remote import Files
from lcmlora.io.terminal import note

REQUEST_TIMEOUT = 600.0  # seconds for which a request that the bucket does not answer is repeated

_REQUEST_BYTES = 8 << 20
_DOWNLOADS = 4  # shards that are downloaded at the same time
_TRIES = 5  # for a shard that other processes delete
_EPOCHS_CHECKED = 8  # whose windows must fit into the budget before training begins
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "U8": torch.uint8}

T = TypeVar("T")


class CacheFile(Document):
    """A file of a latent cache, as the manifest lists it. The name is that in the cache folder."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # no path that leads out of the folder
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardFile(CacheFile):
    """A shard, as the manifest lists it.

    bucket: aspect bucket, as an index into the manifest's list.
    made_of: SHA-256 of the pictures and captions in it; caches of early versions have none.
    """

    pictures: Annotated[int, Field(gt=0)]
    bucket: Annotated[int, Field(ge=0)] = 0
    made_of: str | None = None


def object_name(shard: ShardFile) -> str:
    """Returns the name of a shard's object in the S3 bucket: its SHA-256, so that no object is ever overwritten."""
    return f"{shard.sha256}.safetensors"


class RemoteShards:
    """The shards of one cache that lies in an S3 bucket, and a folder for at most `budget` bytes of them."""

    def __init__(
        self, files: Files, shards: Sequence[ShardFile], folder: Path, budget: int, timeout: float = REQUEST_TIMEOUT
    ) -> None:
        """Args:
        shards: the shards that the manifest lists.
        folder: other processes of this machine may use it as well; complete shards in it are used.
        timeout: seconds for which a request that the bucket does not answer is repeated.
        """
        self._files, self._shards, self._folder = files, shards, folder
        self._budget, self._timeout = budget, timeout
        self._plan: SamplingPlan | None = None
        self._window = 0
        self._windows: dict[int, list[Window]] = {}  # by epoch
        self._next_change = -1  # the step before which the same shards are needed
        self._queue: SimpleQueue[tuple[int, Future[dict[str, Tensor]]]] = SimpleQueue()
        self._downloads: dict[int, Future[dict[str, Tensor]]] = {}
        self._open: dict[int, dict[str, Tensor]] = {}
        self._headers: dict[int, tuple[int, JsonObject]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(_DOWNLOADS):  # daemons, or a process that ends would wait for a bucket that does not answer
            threading.Thread(target=self._work, daemon=True).start()

    def follow_plan(self, plan: SamplingPlan, batch: int, window: int) -> None:
        """Prepares for a run that reads these shards by this plan.

        Raises:
            UserError: the budget has no room for a window; says how much is needed.
        """
        aspect_buckets: dict[int, list[ShardFile]] = {}
        for shard in self._shards:  # every aspect bucket has a window of its own at any time
            aspect_buckets.setdefault(shard.bucket, []).append(shard)
        needed = sum(_largest_window(shards, window // batch * batch) for shards in aspect_buckets.values())
        # Rows that are held out from training are not in the plan, so a window may need more shards than that.
        for epoch in range(_EPOCHS_CHECKED):
            windows = plan.windows(epoch)
            needed = max([needed, *(self._bytes(_current(windows, window.first)) for window in windows)])
        self._check_budget(needed, window)
        self._plan, self._window, self._windows, self._next_change = plan, window, {}, -1

    def _check_budget(self, needed: int, window: int) -> None:
        if needed > self._budget:
            raise UserError(
                f"shard_cache_gb: {self._budget / 1e9:.3g} is not enough for what is mixed at a time: {window} "
                f"pictures (distill.window) may lie in {needed / 1e9:.3g} GB of shards, and twice that lets the next "
                f"ones come ahead; raise it to {needed / 1e9:.3g} at least, or lower the window"
            )

    def _bytes(self, windows: Sequence[Window]) -> int:
        numbers = {int(number) for window in windows for number in window.shards}
        return sum(self._shards[number].bytes for number in numbers)

    def advance_to(self, step: int) -> None:
        """Waits for the shards that this step reads, starts the downloads of the next ones that fit, deletes the rest.

        Raises:
            UserError: a shard is missing or damaged.
            Unavailable: the bucket did not answer for too long.
        """
        if self._plan is None or step < self._next_change:
            return
        epoch = step // self._plan.steps
        self._windows = {n: self._windows.get(n) or self._plan.windows(n) for n in (epoch, epoch + 1)}
        windows = [window for of_epoch in self._windows.values() for window in of_epoch]
        current = _current(windows, step)
        self._check_budget(self._bytes(current), self._window)
        following = [window for window in windows if window.first > step]
        is_first_call = self._next_change < 0
        self._next_change = min([window.last + 1 for window in current] + [window.first for window in following[:1]])
        kept = self._fitting(current + following)
        self._drop([number for number in {*self._open, *self._downloads} if number not in kept])
        if is_first_call:
            self._delete_leftovers({self._path(number).name for number in kept})
        for number in kept:
            if number not in self._downloads:
                self._downloads[number] = Future()
                self._queue.put((number, self._downloads[number]))
        for window in current:
            for number in map(int, window.shards):
                self._tensors(number)

    def _fitting(self, windows: Sequence[Window]) -> list[int]:
        """Returns the shards of the first windows that fit into the budget, of one window at least."""
        kept: dict[int, None] = {}  # ordered
        size = 0
        for window in windows:
            added = [int(number) for number in window.shards if int(number) not in kept]
            size += sum(self._shards[number].bytes for number in added)
            if kept and size > self._budget:
                break
            kept |= dict.fromkeys(added)
        return list(kept)

    def find(self, number: int, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a tensor that has these rows (N,) of a shard's tensor, and their indices in it, (N,).

        It is the shard's whole tensor if the shard is on this disk; otherwise it has these rows only, which are
        downloaded one by one.
        """
        if number in self._downloads and self._downloads[number].done():
            return self._tensors(number)[name], rows
        return torch.stack([self._download_row(number, name, int(row)) for row in rows]), torch.arange(len(rows))

    def _path(self, number: int) -> Path:
        return self._folder / object_name(self._shards[number])

    def _tensors(self, number: int) -> dict[str, Tensor]:
        """Returns the tensors of a shard; waits for its download."""
        if number not in self._open:
            self._open[number] = self._downloads[number].result()
        return self._open[number]

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            future = self._downloads.pop(number, None)
            if future is not None and not future.cancel():
                with contextlib.suppress(UserError, OSError):  # the shard is not needed any more
                    future.result()
            self._open.pop(number, None)
            self._path(number).unlink(missing_ok=True)

    def _delete_leftovers(self, kept: set[str]) -> None:
        """Deletes what earlier runs left in the folder: shards that are not kept, and unfinished downloads."""
        temporaries.sweep(self._folder, None)
        for path in self._folder.iterdir():
            if path.name not in kept and not temporaries.is_temporary(path):
                path.unlink(missing_ok=True)

    def _work(self) -> None:
        """Downloads the shards of the queue, one after the other."""
        while True:
            number, future = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._mapped(number))
            except Exception as error:
                future.set_exception(error)

    def _mapped(self, number: int) -> dict[str, Tensor]:
        """Downloads a shard and returns its tensors, mapped: they stay readable if another process deletes the file."""
        for _ in range(_TRIES):
            path = self._fetch(number)
            try:
                tensors: dict[str, Tensor] = load_file(path)
            except (FileNotFoundError, RuntimeError):  # torch's own, if the file is deleted while it is opened
                if path.exists():
                    raise
                continue  # another process deleted it after the download
            return tensors
        raise UserError(
            f"{self._path(number)}: another process deletes it again and again; give each run a folder of its own"
        )

    def _fetch(self, number: int) -> Path:
        """Returns the path of a shard on this disk; downloads it unless a sound copy is there."""
        shard, path = self._shards[number], self._path(number)
        if path.is_file() and path.stat().st_size == shard.bytes and sha256_file(path) == shard.sha256:
            return path
        atomic_write(path, partial(self._download, number))
        return path

    def _download(self, number: int, target: Path) -> None:
        """Writes a shard from the bucket to the file `target`. Raises UserError if it is damaged."""
        shard, sha256 = self._shards[number], hashlib.sha256()
        with target.open("wb") as file:
            for start in range(0, shard.bytes, _REQUEST_BYTES):
                length = min(_REQUEST_BYTES, shard.bytes - start)
                content = self._repeat(partial(self._read, number, start, length))
                sha256.update(content)
                file.write(content)
        if sha256.hexdigest() != shard.sha256:
            raise self._damaged(number, f"its SHA-256 is {sha256.hexdigest()[:12]}...")

    def _read(self, number: int, start: int, length: int) -> bytes:
        name = object_name(self._shards[number])
        content = self._files.read(name, start, length)
        if len(content) < length:
            raise Unavailable(f"{name}: {len(content)} bytes came where {length} were asked for")
        return content

    def _repeat(self, request: Callable[[], T]) -> T:
        """Returns what the request returns; repeats it while the bucket does not answer, with growing pauses."""
        until, pause = time.monotonic() + self._timeout, 1.0
        while True:
            try:
                return request()
            except Unavailable as error:
                if time.monotonic() + pause > until:
                    raise
                if pause == 1.0:
                    note(f"{error}; asking again for {self._timeout:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, 15.0)

    def _download_row(self, number: int, name: str, row: int) -> Tensor:
        """Returns one row of a shard's tensor from the bucket."""
        begin, header = self._header(number)
        try:
            tensor = header[name]
            dtype, shape = _DTYPES[tensor["dtype"]], tensor["shape"][1:]
            stride = math.prod(shape) * dtype.itemsize
            start = begin + tensor["data_offsets"][0] + row * stride
        except (KeyError, IndexError, TypeError):
            raise self._damaged(number, f"its header has no sound {name}") from None
        content = bytearray(self._repeat(lambda: self._read(number, start, stride)))
        return torch.frombuffer(content, dtype=dtype).view(shape)

    def _header(self, number: int) -> tuple[int, JsonObject]:
        """Returns the byte at which the tensors of a shard begin, and its safetensors header."""
        if number not in self._headers:
            size = int.from_bytes(self._repeat(lambda: self._read(number, 0, 8)), "little")
            if not 0 < size <= self._shards[number].bytes - 8:
                raise self._damaged(number, f"its header has {size} bytes")
            try:
                header = parsing.parse_json(self._repeat(lambda: self._read(number, 8, size)))
            except parsing.Malformed as error:
                raise self._damaged(number, f"its header is {error}") from None
            self._headers[number] = 8 + size, header
        return self._headers[number]

    def _damaged(self, number: int, reason: str) -> UserError:
        return UserError(f"{self._path(number).name}: is damaged in the bucket: {reason}; run `lcmlora encode` again")


def _current(windows: Sequence[Window], step: int) -> list[Window]:
    """Returns the windows that a step reads."""
    return [window for window in windows if window.first <= step <= window.last]


def _largest_window(shards: Sequence[ShardFile], rows: int) -> int:
    """Returns the most bytes of shards that a window of so many rows can touch, in whichever order the shards come."""
    sizes = sorted(shard.pictures for shard in shards)
    inside = count = 0
    while count < len(sizes) and inside + sizes[count] <= rows - 2:
        inside += sizes[count]
        count += 1
    largest = max(shard.bytes for shard in shards)
    return min((count + 2) * largest, sum(shard.bytes for shard in shards))
