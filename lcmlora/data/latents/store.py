"""The files of a latent cache in the making, over kills and between processes, here or in a bucket."""

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

from lcmlora.data.latents.cache import ROWS, TEXT, Entry, Tensors, fault
from lcmlora.data.latents.shards import object_name
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write, write_json
from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.io.remote import Files

SMALL = ("orig_size", "crop_tl", "text_row", "key")  # tensors of a shard that are not large

_VISIBLE = 120.0  # seconds until another machine's files must be seen; NFS may take 60 (acdirmax in nfs(5))


class Store:
    """The files of a cache in the making that are finished, kept in `work` over kills; `done` has their entries.

    Each has its entry in a file of its own, so that many processes can write to one folder. The files in `own`, which
    this process makes, are read whole to see whether they are sound. Shards that go to a bucket leave their small
    tensors here.

    Args:
        place: s3://bucket/prefix of the shards; None keeps them here.
    """

    def __init__(self, work: Path, fingerprint: str, own: Sequence[str], place: str | None = None) -> None:
        self.files = work / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprint
        self.place = place
        self._bucket = Files(place) if place else None
        self._there = self._bucket.sizes(missing_ok=True) if self._bucket else {}
        self._entries = work / "done"
        self._own = {*own, TEXT}
        self.done: dict[str, Entry] = {}
        self._read()

    def save(self, name: str, tensors: Tensors, **told: int | str) -> None:
        content = to_bytes({n: t.contiguous() for n, t in tensors.items()}, {"fingerprint": self.fingerprint})
        atomic_write(self.files / name, lambda path: path.write_bytes(content))
        sha256 = hashlib.sha256(content).hexdigest()
        self.done[name] = {"name": name, "bytes": len(content), "sha256": sha256, **told}
        if name == TEXT:
            write_json(self._entries / f"{name}.json", self.done[name])

    def save_shard(self, name: str, tensors: Tensors, made_of: str) -> None:
        """Keeps a shard, in the bucket if there is one."""
        self.save(name, tensors, pictures=len(tensors["key"]), made_of=made_of)
        if self._bucket:
            remote = object_name(self.done[name])
            self._bucket.put(self.files / name, remote)
            self._there[remote] = self.done[name]["bytes"]
            self._keep_small(name, {part: tensors[part] for part in SMALL})
            (self.files / name).unlink()
        write_json(self._entries / f"{name}.json", self.done[name])

    def adopt(self, folder: Path, entry: Entry, rows: range, name: str) -> None:
        """Takes a shard of a finished cache, where it is sound, under this name."""
        if self._bucket:
            if self._there.get(object_name(entry)) != entry["bytes"]:
                return
            small = load_file(folder / ROWS)
            self._keep_small(name, {part: small[part][rows.start : rows.stop].clone() for part in SMALL})
        elif fault(folder, entry, contents=True) is None:
            link(folder / entry["name"], self.files / name)
        else:
            return
        self.done[name] = {key: value for key, value in entry.items() if key != "bucket"} | {"name": name}
        write_json(self._entries / f"{name}.json", self.done[name])

    def small_rows(self, names: Iterable[str]) -> Tensors:
        """Returns the small tensors of all shards."""
        parts = [load_file(self._small(name)) for name in names]
        return {part: torch.cat([tensors[part] for tensors in parts]) for part in SMALL}

    def _small(self, name: str) -> Path:
        return self.files / f"small-{name}"

    def _keep_small(self, name: str, tensors: Tensors) -> None:
        content = to_bytes({part: tensor.contiguous() for part, tensor in tensors.items()})
        atomic_write(self._small(name), lambda path: path.write_bytes(content))

    def gather(self, names: Sequence[str]) -> None:
        """Adds what the other processes have finished to `done`.

        Raises:
            UserError: one of these files does not appear.
        """
        until = time.monotonic() + _VISIBLE
        while missing := [name for name in names if name not in self.done]:
            if time.monotonic() > until:
                raise UserError(
                    f"{self.files / missing[0]}: is not there, though another process has made it, and neither are "
                    f"{len(missing) - 1} others; all machines need one and the same scratch folder"
                )
            self._read()
            time.sleep(0.1)

    def _read(self) -> None:
        for path in sorted(self._entries.glob("*.json")):
            try:
                entry: Entry = parse_json(path.read_bytes())
                name = entry["name"]
                sound = name not in self.done and self._sound(entry)
            except (Malformed, KeyError, TypeError):  # damaged: what it tells of is made again
                continue
            if sound:
                self.done[name] = entry

    def _sound(self, entry: Entry) -> bool:
        name = entry["name"]
        if self._bucket is None or name == TEXT:
            return fault(self.files, entry, contents=name in self._own) is None
        # What another process has just put there was not seen when the listing was made.
        return self._small(name).is_file() and (
            name not in self._own or self._there.get(object_name(entry)) == entry["bytes"]
        )


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
