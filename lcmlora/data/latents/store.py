"""The finished files of a latent cache that is being made: kept over kills, by many processes, here or in a bucket."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lcmlora.data.latents.cache import ROWS, TEXT, Tensors, TextFile, fault
from lcmlora.data.latents.remote_shards import CacheFile, ShardFile, object_name
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write
from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.io.remote import Files

ROW_TENSORS = ("orig_size", "crop_tl", "text_row", "key")  # tensors of a shard that have a few bytes a row

_VISIBLE_SECONDS = 120.0  # until another machine's files must be seen; NFS may take 60 (acdirmax in nfs(5))


class UnfinishedCache:
    """The finished files of a cache that is being made, in the folder `work`.

    Each file is recorded in a file of its own, so that many processes can write to one folder. A process checks the
    SHA-256 of the shards in `own`, which it makes, and only the size of the others. If the shards go to a bucket, their
    small tensors (ROW_TENSORS) stay here.

    Attributes:
        files: the folder with the files.
        shards: the finished shards, by name.
        text: the finished file of captions.

    Args:
        place: s3://bucket/prefix of the shards; None keeps them here.
    """

    def __init__(self, work: Path, fingerprint: str, own: Sequence[str], place: str | None = None) -> None:
        self.files = work / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprint
        self.place = place
        self._bucket = Files(place, "encode.shards") if place else None
        self._object_sizes = self._bucket.sizes(missing_ok=True) if self._bucket else {}
        self._records = work / "done"
        self._own = set(own)
        self.shards: dict[str, ShardFile] = {}
        self.text: TextFile | None = None
        self._read_records()

    def save_text(self, tensors: Tensors, *, captions: int, cut: int) -> None:
        """Keeps the file of captions; `cut` of them are too long for the text encoder."""
        file = self._write(TEXT, tensors)
        self.text = TextFile(name=TEXT, bytes=file.bytes, sha256=file.sha256, captions=captions, cut=cut)
        self.text.write(self._record(TEXT))

    def save_shard(self, name: str, tensors: Tensors, made_of: str) -> None:
        """Keeps a shard, in the bucket if there is one."""
        file, pictures = self._write(name, tensors), len(tensors["key"])
        shard = ShardFile(name=name, bytes=file.bytes, sha256=file.sha256, pictures=pictures, made_of=made_of)
        if self._bucket:
            remote = object_name(shard)
            self._bucket.put(self.files / name, remote)
            self._object_sizes[remote] = shard.bytes
            self._save_row_tensors(name, {part: tensors[part] for part in ROW_TENSORS})
            (self.files / name).unlink()
        self._add_shard(shard)

    def save_rows(self, names: Iterable[str]) -> CacheFile:
        """Keeps the small tensors of these shards in one file."""
        parts = [load_file(self._row_tensors(name)) for name in names]
        return self._write(ROWS, {part: torch.cat([tensors[part] for tensors in parts]) for part in ROW_TENSORS})

    def adopt(self, folder: Path, shard: ShardFile, rows: range, name: str) -> None:
        """Keeps a shard of a finished cache under this name, if it is sound.

        Args:
            rows: its rows in that cache.
        """
        if self._bucket:
            if self._object_sizes.get(object_name(shard)) != shard.bytes:
                return
            small = load_file(folder / ROWS)
            self._save_row_tensors(name, {part: small[part][rows.start : rows.stop].clone() for part in ROW_TENSORS})
        elif fault(folder, shard, contents=True) is None:
            link(folder / shard.name, self.files / name)
        else:
            return
        kept = {key: value for key, value in shard.plain().items() if key != "bucket"}
        self._add_shard(ShardFile.model_validate(kept | {"name": name}))

    def wait_for_others(self, names: Sequence[str]) -> None:
        """Adds the shards and the file of captions that the other processes have finished.

        Raises:
            UserError: one of these files does not appear.
        """
        until = time.monotonic() + _VISIBLE_SECONDS
        while missing := [*(name for name in names if name not in self.shards), *([] if self.text else [TEXT])]:
            if time.monotonic() > until:
                raise UserError(
                    f"{self.files / missing[0]}: is not there, though another process has made it, and neither are "
                    f"{len(missing) - 1} others; all machines need one and the same scratch folder"
                )
            self._read_records()
            time.sleep(0.1)

    def _write(self, name: str, tensors: Tensors) -> CacheFile:
        content = to_bytes({n: t.contiguous() for n, t in tensors.items()}, {"fingerprint": self.fingerprint})
        atomic_write(self.files / name, lambda path: path.write_bytes(content))
        return CacheFile(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def _add_shard(self, shard: ShardFile) -> None:
        self.shards[shard.name] = shard
        shard.write(self._record(shard.name))

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
        is_own = shard.name in self._own
        if self._bucket is None:
            return fault(self.files, shard, contents=is_own) is None
        # The listing of the bucket does not have what another process has put there since.
        return self._row_tensors(shard.name).is_file() and (
            not is_own or self._object_sizes.get(object_name(shard)) == shard.bytes
        )


def link(source: Path, target: Path) -> None:
    """Links a file; copies it if the target is on another disk, or on one without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
