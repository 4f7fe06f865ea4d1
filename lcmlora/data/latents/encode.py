"""Stage `encode`: pictures, or what the teacher draws of prompts, and captions go through the frozen parts once.

What it makes is described in cache.py.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcmlora import config, stages
from lcmlora.bases.base import LoadedBase
from lcmlora.data.latents import aspect, texts
from lcmlora.data.latents.cache import MANIFEST, ROWS, TEXT, VERSION, Tensors, parse_manifest
from lcmlora.data.latents.pictures import picture_encoder
from lcmlora.data.latents.rollouts import MOST, RolloutEncoder
from lcmlora.data.latents.store import Store, link
from lcmlora.data.sources.source import RESIZE_FILTER, Record
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, atomic_write, discard, locked, sha256_folder, write_json
from lcmlora.io.parsing import Malformed
from lcmlora.parallel.ranks import Ranks
from lcmlora.plugins import SOURCES
from lcmlora.progress import track

_MB = 1 << 20
_ROW_BYTES = 8 + 8 + 16 + 4  # of a picture besides its latent: orig_size, crop_tl, key, text_row
_HEADER_BYTES = 4096  # room for a safetensors header


def encode(
    base: LoadedBase,
    data: config.Data,
    settings: config.Encode,
    pictures: Path,
    scratch: Path,
    out: Path,
    ranks: Ranks | None = None,
) -> None:
    """Encodes the training pictures and captions of `pictures` into a cache in the folder `out`.

    A shard that is finished stays in `scratch` until the whole cache is, so a killed run goes on at the next shard, on
    any number of processes. The cache has the same bytes for any number.

    Args:
        base: with its VAE and text encoders; for prompts with its UNet instead of the VAE.
        pictures: the folder that `prepare` wrote.
        scratch: folder for unfinished work, best on the same disk as `out`, and the same for all processes.
        ranks: this process among those that encode together; alone by default.

    Raises:
        UserError: no list of pictures, a picture that changed, latents or embeddings that are not finite, too little
            disk, another run at work on the same, or processes with other files. `out` is then as it was before.
    """
    ranks = ranks or Ranks()
    listed = _List(pictures / "train.jsonl")
    channels, height, width = base.latent_shape
    rollouts = None if SOURCES.get(data.source).has_pictures else settings.rollouts
    tensors = 2 + (rollouts.steps + 1 if rollouts and rollouts.states else 0)
    row_bytes = 2 * tensors * channels * height * width + _ROW_BYTES
    if settings.aspect_buckets and not rollouts:
        listed.sort(aspect.table(base.resolution, base.size_unit, data.max_aspect), settings.bucket_pictures)
    else:
        listed.sort([(base.resolution, base.resolution)], 1)
    shards = _plan(listed, row_bytes, settings, most=MOST if rollouts else None)
    # Dealt out in turn, so that what a killed run has left to do is divided evenly as well.
    own = list(shards)[ranks.rank :: ranks.size]
    text = _fingerprint(base, "text_encoder*", "tokenizer*", dtype=str(base.dtype))
    fingerprint = _latents_fingerprint(base, rollouts, text)
    sizes = {"model": base.name, "resolution": base.resolution, "batch": settings.batch, "shard_mb": settings.shard_mb}
    place = f"{settings.shards.rstrip('/')}/{base.name}" if settings.shards else None
    plan = texts.plan(base, len(listed.captions), settings.text_cache_mb)
    varied = sizes | {"shards": place, "shapes": listed.sizes, "tokenized": plan.tokenized}
    work = scratch / config.digest(listed.digest, fingerprint, text, varied)[:16]
    with locked(work) if ranks.first else nullcontext():
        store = Store(work, fingerprint, own, place)
        made_of = {name: listed.digest_of(shards[name], text) for name in own}
        _take_over(out, store, made_of)
        missing = {name: shards[name] for name in own if name not in store.done}
        left = [rows for name, rows in shards.items() if name not in store.done] if ranks.first else missing.values()
        needed = plan.size if ranks.first else 0
        pictures_left = sum(map(len, left))
        if place:  # a shard is here until it is there
            needed += _ROW_BYTES * pictures_left
            pictures_left = max(map(len, left), default=0)
        with _room(scratch, needed + row_bytes * pictures_left):
            # Nobody writes before all have looked at the disk and the first one has the lock.
            ranks.agree(listed_pictures=listed.digest, base=(fingerprint, text), settings=varied)
            if ranks.first and TEXT not in store.done:
                kept, cut = texts.tensors(base, list(listed.captions), settings.batch, plan)
                store.save(TEXT, kept, captions=len(listed.captions), cut=cut)
            total = sum(len(_batches(shards[name], settings.batch)) for name in own)
            for name, rows in _encode_shards(base, data, settings, listed, missing, total, ranks):
                store.save_shard(name, rows, made_of[name])
            ranks.wait()
            if ranks.first:
                store.gather([*shards, TEXT])
                _finish(base, listed, shards, store, out, rollouts)
            ranks.wait()
        if ranks.first:
            discard(work)


def _finish(
    base: LoadedBase,
    listed: _List,
    shards: dict[str, range],
    store: Store,
    out: Path,
    rollouts: config.Rollouts | None,
) -> None:
    """Writes what people read and the manifest, and puts the finished files in place."""
    names = [*([ROWS] if store.place else shards), TEXT, MANIFEST]
    if store.place:
        store.save(ROWS, store.small_rows(shards))
    for number, rows in enumerate(shards.values()):
        told = (json.dumps({"key": r.key, "caption": r.caption}) + "\n" for r in listed.read(rows))
        names.append(f"captions-{number:05d}.jsonl")
        content = "".join(told).encode()
        atomic_write(store.files / names[-1], lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
    manifest: dict[str, Any] = {
        "version": VERSION,
        "model": base.name,
        "kind": base.family.name,
        "pictures": len(listed),
        "captions": len(listed.captions),
        "latent_shape": list(base.latent_shape),
        "resolution": base.resolution,
        "fingerprint": store.fingerprint,
        "shards": [dict(store.done[name]) for name in shards],
        "text": store.done[TEXT],
    } | ({"rollouts": rollouts.model_dump()} if rollouts else {})
    if listed.sizes != [(base.resolution, base.resolution)]:
        manifest["buckets"] = [list(size) for size in listed.sizes]
        for entry, rows in zip(manifest["shards"], shards.values(), strict=True):
            entry["bucket"] = listed.bucket(rows.start)
    if store.place:
        manifest |= {"at": store.place, "rows": store.done[ROWS]}
    write_json(store.files / MANIFEST, manifest)
    with atomic_folder(out) as folder:
        for name in names:  # and not what a killed process left half written
            link(store.files / name, folder / name)


def _take_over(out: Path, store: Store, made_of: dict[str, str]) -> None:
    """Reuses the shards of the old cache in `out` whose inputs are unchanged."""
    try:
        manifest = parse_manifest((out / MANIFEST).read_bytes())
    except (OSError, Malformed):  # nothing that can be taken over
        return
    if manifest.get("fingerprint") != store.fingerprint:
        return
    if manifest.get("at") != store.place:
        return
    there, start = {}, 0
    for entry in manifest["shards"]:
        there[entry.get("made_of")] = entry, range(start, start + entry["pictures"])
        start += entry["pictures"]
    for name, digest in made_of.items():
        if name not in store.done and digest in there:
            store.adopt(out, *there[digest], name)


class _List:
    """The list of pictures that `prepare` wrote, read where it is wanted: millions would fill every process's memory.

    captions: the distinct captions and their numbers, in the order of the list.
    digest: SHA-256 of the list.
    sizes: shapes in which the pictures are wanted; rows of one stand together, and else in the order of the list.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError where this is no list of pictures, or an empty one."""
        self._path = path
        self._places = array("Q")  # in the file, of each picture
        self._shapes: list[array[int]] = [array("I"), array("I")]  # widths and heights
        self.sizes: list[aspect.Size] = []
        self._starts = [0]  # of the rows of each size
        self.captions: dict[str, int] = {}
        digest, place = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                for line in file:
                    record = Record(**json.loads(line))
                    self.captions.setdefault(record.caption, len(self.captions))
                    self._places.append(place)
                    self._shapes[0].append(record.width)
                    self._shapes[1].append(record.height)
                    digest.update(line)
                    place += len(line)
        except FileNotFoundError:
            raise UserError(f"{path}: no such list of pictures; run `lcmlora prepare`") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a list of pictures ({error}); run `lcmlora prepare`") from None
        if not self._places:
            raise UserError(f"{path}: lists no pictures; run `lcmlora prepare`")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def sort(self, sizes: list[aspect.Size], least: int) -> None:
        """Sorts the pictures by the size that they are cropped to, the nearest of those that are used.

        Args:
            sizes: that may be used.
            least: pictures that a size must have to be used, unless it is the only one.
        """
        if len(sizes) == 1:
            self.sizes = sizes
            return
        shapes = np.stack([np.asarray(sides) for sides in self._shapes], axis=1)
        different, number, count = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
        self.sizes = aspect.chosen(different, count, sizes, least)
        near = aspect.nearest(different, self.sizes)[number]
        self._places = array("Q", np.asarray(self._places)[np.argsort(near, kind="stable")].tolist())
        counts = np.bincount(near, minlength=len(self.sizes))
        self._starts = (counts.cumsum() - counts).tolist()

    def bucket(self, row: int) -> int:
        """Returns the number of the size of this row."""
        return bisect.bisect_right(self._starts, row) - 1

    def parts(self) -> list[range]:
        """Returns the rows of each size."""
        ends = [*self._starts[1:], len(self)]
        return [range(start, end) for start, end in zip(self._starts, ends, strict=True)]

    def digest_of(self, rows: range, text: str) -> str:
        """Returns a SHA-256 of the pictures, captions and sizes of these rows; the VAE is not part of it.

        Args:
            text: a digest of the text encoders, by whose embeddings the rows are numbered.
        """
        told = hashlib.sha256(f"{text} {self.sizes[self.bucket(rows.start)]}\n".encode())
        for record in self.read(rows):
            told.update(f"{record.sha256} {self.captions[record.caption]} {record.caption}\n".encode())
        return told.hexdigest()

    def read(self, rows: range) -> list[Record]:
        records = []
        with self._path.open("rb") as file:
            for row in rows:
                file.seek(self._places[row])
                records.append(Record(**json.loads(file.readline())))
        return records


def _plan(listed: _List, row_bytes: int, settings: config.Encode, most: int | None = None) -> dict[str, range]:
    """Returns the rows of each shard by its name, at most so many, and of one size."""
    rows = max(1, (settings.shard_mb * _MB - _HEADER_BYTES) // row_bytes)
    rows = min(rows, most or rows)
    if rows > settings.batch:
        rows -= rows % settings.batch  # no short batch but the last
    ranges = [part[i : i + rows] for part in listed.parts() for i in range(0, len(part), rows)]
    return {f"shard-{number:05d}.safetensors": each for number, each in enumerate(ranges)}


def _batches(rows: range, size: int) -> list[range]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _fingerprint(base: LoadedBase, *parts: str, **also: object) -> str:
    """Returns a SHA-256 over these folders of the base and what else decides what comes out of them."""
    folders = sorted(folder for part in parts for folder in base.folder.glob(part))
    # Caches from before algorithms had versions are of the first one.
    version = {"version": stages.VERSIONS["encode"]} if stages.VERSIONS["encode"] > 1 else {}
    return config.digest({folder.name: sha256_folder(folder) for folder in folders} | also | version)


def _latents_fingerprint(base: LoadedBase, rollouts: config.Rollouts | None, text: str) -> str:
    """Returns a SHA-256 over what makes the latents.

    Args:
        text: that of the text encoders, which has a part in what the teacher draws.
    """
    if rollouts is None:
        vae = {"scaling": base.latent_scale, "dtype": str(base.vae.dtype), "resize": RESIZE_FILTER}
        return _fingerprint(base, "vae", **vae)
    drawn = {"dtype": str(base.dtype), "text": text, "rollouts": rollouts.model_dump()}
    return _fingerprint(base, base.family.network.folder, "scheduler", **drawn)


@contextmanager
def _room(folder: Path, needed: int) -> Iterator[None]:
    """Raises UserError with the bytes that are needed and free, if the disk is full or becomes so in the block."""

    def full(where: Path) -> UserError:
        return UserError(
            f"{where}: no disk space: the latent cache needs {needed} bytes more in {folder} and "
            f"{shutil.disk_usage(folder).free} are free; make room and run it again, finished shards are kept"
        )

    if needed > shutil.disk_usage(folder).free:
        raise full(folder)
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise full(error.filename or folder) from error


# --- latents ----------------------------------------------------------------------------------------------------


@contextmanager
def _encoder(
    base: LoadedBase, data: config.Data, settings: config.Encode, wanted: Iterable[tuple[Record, aspect.Size]]
) -> Iterator[Callable[[list[Record]], Tensors]]:
    """Gives what makes the latents of a batch of records, all of which come in the order of `wanted`."""
    if not SOURCES.get(data.source).has_pictures:
        yield RolloutEncoder(base, settings.rollouts)
        return
    with picture_encoder(base, data, wanted, settings.batch) as encoder:
        yield encoder


def _encode_shards(
    base: LoadedBase,
    data: config.Data,
    settings: config.Encode,
    listed: _List,
    shards: dict[str, range],
    total: int,
    ranks: Ranks,
) -> Iterator[tuple[str, Tensors]]:
    """Yields name and tensors of each of `shards`.

    Args:
        total: batches of this process, for the progress; those of an earlier run, too.
    """
    batches = [(name, batch) for name, rows in shards.items() for batch in _batches(rows, settings.batch)]
    sizes = {name: listed.sizes[listed.bucket(rows.start)] for name, rows in shards.items()}
    wanted = ((record, sizes[name]) for name, batch in batches for record in listed.read(batch))
    parts: list[Tensors] = []
    done, unit = total - len(batches), settings.batch * ranks.size
    label = "encode pictures" if SOURCES.get(data.source).has_pictures else "draw rollouts"
    progress = track(batches, label, total=total, completed=done, unit=unit, quiet=not ranks.first)
    with _encoder(base, data, settings, wanted) as encoded:
        for name, batch in progress:
            mine = listed.read(batch)
            tensors = encoded(mine)
            tensors["key"] = torch.tensor([list(bytes.fromhex(r.sha256)[:16]) for r in mine], dtype=torch.uint8)
            tensors["text_row"] = torch.tensor([listed.captions[r.caption] for r in mine], dtype=torch.int32)
            parts.append(tensors)
            if batch.stop == shards[name].stop:
                yield name, {key: torch.cat([part[key] for part in parts]) for key in tensors}
                parts = []
