"""The finished files of a latent cache that is being made: kept over kills, written by workers, here or in a bucket."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lcmlora.data.latents.cache import ROWS, TEXT, Tensors, TextFile, fault
from lcmlora.data.latents.remote_shards import CacheFile, ShardFile, object_name
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write, temporary_folder
from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.io.remote import Files

ROW_TENSORS = ("orig_size", "crop_tl", "text_row", "key")  # tensors of a shard that have a few bytes a row

_VISIBLE_SECONDS = 120.0  # until another machine's file must be seen; NFS may take 60 (acdirmax in nfs(5))


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of a cache, in any process: into the folder `files`, which all see, or into a bucket.

    fingerprint: SHA-256 of what makes the latents.
    place: s3://bucket/prefix of the shards; None keeps them in the folder.
    """

    files: Path
    fingerprint: str
    place: str | None

    def write(self, name: str, tensors: Tensors, made_of: str) -> tuple[ShardFile, Tensors]:
        """Writes a shard. Returns what is known of it and, if it is in a bucket, its small tensors (ROW_TENSORS).

        Raises:
            UserError: the folder is not on this machine.
        """
        content = _serialized(tensors, self.fingerprint)
        digest, pictures = hashlib.sha256(content).hexdigest(), len(tensors["key"])
        shard = ShardFile(name=name, bytes=len(content), sha256=digest, pictures=pictures, made_of=made_of)
        if self.place is None:
            if not self.files.is_dir():
                raise UserError(
                    f"{self.files}: is not on {platform.node()}; workers on several machines need one folder for all, "
                    "or shards that lie in a bucket (encode.shards)"
                )
            atomic_write(self.files / name, lambda path: path.write_bytes(content))
            return shard, {}
        with temporary_folder(self.files if self.files.is_dir() else None) as folder:
            (folder / name).write_bytes(content)
            _bucket(self.place).put(folder / name, object_name(shard))
        return shard, {part: tensors[part] for part in ROW_TENSORS}


@lru_cache(1)
def _bucket(place: str) -> Files:
    return Files(place, "encode.shards")


def _serialized(tensors: Tensors, fingerprint: str) -> bytes:
    """Returns the bytes of a file of the cache."""
    return to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, {"fingerprint": fingerprint})


class UnfinishedCache:
    """The finished files of a cache that is being made, in the folder `work`.

    Each file is recorded in a file of its own, after it has been written whole. If the shards go to a bucket, their
    small tensors (ROW_TENSORS) stay here.

    Attributes:
        files: the folder with the files.
        writer: writes the shards, in this process or another one.
        shards: the finished shards, by name.
        text: the finished file of captions.

    Args:
        place: s3://bucket/prefix of the shards; None keeps them here.
    """

    def __init__(self, work: Path, fingerprint: str, place: str | None = None) -> None:
        self.files = work / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.writer = ShardWriter(self.files, fingerprint, place)
        self.fingerprint = fingerprint
        self.place = place
        self._object_sizes = _bucket(place).sizes(missing_ok=True) if place else {}
        self._records = work / "done"
        self.shards: dict[str, ShardFile] = {}
        self.text: TextFile | None = None
        self._read_records()

    def save_text(self, tensors: Tensors, *, captions: int, cut: int) -> None:
        """Keeps the file of captions; `cut` of them are too long for the text encoder."""
        file = self._write(TEXT, tensors)
        self.text = TextFile(name=TEXT, bytes=file.bytes, sha256=file.sha256, captions=captions, cut=cut)
        self.text.write(self._record(TEXT))

    def save_shard(self, name: str, tensors: Tensors, made_of: str) -> None:
        """Writes a shard and keeps it."""
        self.add(*self.writer.write(name, tensors, made_of))

    def add(self, shard: ShardFile, small: Tensors) -> None:
        """Keeps a shard that `writer` has written; its arguments are what that returned.

        Raises:
            UserError: it is not in the folder of this machine.
        """
        if self.place:
            self._object_sizes[object_name(shard)] = shard.bytes
            self._save_row_tensors(shard.name, small)
        else:
            self._wait_for(shard)
        self.shards[shard.name] = shard
        shard.write(self._record(shard.name))

    def _wait_for(self, shard: ShardFile) -> None:
        until = time.monotonic() + _VISIBLE_SECONDS
        while not (self.files / shard.name).exists():
            if time.monotonic() > until:
                raise UserError(
                    f"{self.files / shard.name}: is not there, though a worker has written it; all machines need one "
                    "folder for this, or shards that lie in a bucket (encode.shards)"
                )
            time.sleep(0.1)

    def save_rows(self, names: Iterable[str]) -> CacheFile:
        """Keeps the small tensors of these shards in one file."""
        parts = [load_file(self._row_tensors(name)) for name in names]
        return self._write(ROWS, {part: torch.cat([tensors[part] for tensors in parts]) for part in ROW_TENSORS})

    def adopt(self, folder: Path, shard: ShardFile, rows: range, name: str) -> None:
        """Keeps a shard of a finished cache under this name, if it is sound.

        Args:
            rows: its rows in that cache.
        """
        small: Tensors = {}
        if self.place:
            if self._object_sizes.get(object_name(shard)) != shard.bytes:
                return
            every = load_file(folder / ROWS)
            small = {part: every[part][rows.start : rows.stop].clone() for part in ROW_TENSORS}
        elif fault(folder, shard, contents=True) is None:
            link(folder / shard.name, self.files / name)
        else:
            return
        kept = {key: value for key, value in shard.plain().items() if key != "bucket"}
        self.add(ShardFile.model_validate(kept | {"name": name}), small)

    def _write(self, name: str, tensors: Tensors) -> CacheFile:
        content = _serialized(tensors, self.fingerprint)
        atomic_write(self.files / name, lambda path: path.write_bytes(content))
        return CacheFile(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def _record(self, name: str) -> Path:
        return self._records / f"{name}.json"

    def _row_tensors(self, name: str) -> Path:
        return self.files / f"small-{name}"

    def _save_row_tensors(self, name: str, tensors: Tensors) -> None:
        content = to_bytes({part: tensor.contiguous() for part, tensor in tensors.items()})
        atomic_write(self._row_tensors(name), lambda path: path.write_bytes(content))

    def _read_records(self) -> None:
        """Adds the recorded files that are sound. What a damaged record is of is made again."""
        for path in sorted(self._records.glob("*.json")):
            try:
                content = parse_json(path.read_bytes())
                if path == self._record(TEXT):
                    text = TextFile.parse(content, str(path))
                    if self.text is None and fault(self.files, text, contents=True) is None:
                        self.text = text
                else:
                    shard = ShardFile.parse(content, str(path))
                    if shard.name not in self.shards and self._is_sound(shard):
                        self.shards[shard.name] = shard
            except (Malformed, UserError):
                continue

    def _is_sound(self, shard: ShardFile) -> bool:
        if self.place is None:
            return fault(self.files, shard, contents=True) is None
        return self._row_tensors(shard.name).is_file() and self._object_sizes.get(object_name(shard)) == shard.bytes


def link(source: Path, target: Path) -> None:
    """Links a file; copies it if the target is on another disk, or on one without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
