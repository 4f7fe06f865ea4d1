"""Stage `encode`: encodes the prepared pictures and captions once into a latent cache (cache.py).

Workers make the shards (shard_encoding.py): the VAE encodes pictures, and of prompts without pictures the teacher draws
the latents (rollouts.py). This process encodes the captions, and puts the cache together.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lcmlora import config, stages
from lcmlora.bases.base import LoadedBase
from lcmlora.data.latents import aspect, texts
from lcmlora.data.latents.cache import MANIFEST, ROWS, TEXT, VERSION, Manifest, parse_manifest
from lcmlora.data.latents.remote_shards import CacheFile, ShardFile
from lcmlora.data.latents.rollouts import SHARD_ROWS
from lcmlora.data.latents.shard_encoding import MakeShardEncoder, Shard
from lcmlora.data.latents.store import UnfinishedCache, link
from lcmlora.data.sources.source import RESIZE_FILTER, Record
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, atomic_write, discard, locked, sha256_folder
from lcmlora.io.parsing import Malformed
from lcmlora.parallel.workers import workers
from lcmlora.plugins import SOURCES
from lcmlora.progress import Bar

ROW_BYTES = 8 + 8 + 16 + 4  # of a picture besides its latent: orig_size, crop_tl, key, text_row

_MB = 1 << 20
_HEADER_BYTES = 4096  # room for a safetensors header


def encode_latents(
    base: LoadedBase,
    data: config.Data,
    settings: config.Encode,
    pictures: Path,
    scratch: Path,
    out: Path,
    launch: config.Launch | None = None,
    load: Callable[[], LoadedBase] | None = None,
) -> None:
    """Encodes the training pictures and captions of `pictures` into a latent cache in the folder `out`.

    Finished shards stay in `scratch` until the whole cache is finished, so a run that was killed continues at the next
    shard, with any workers. The cache has the same bytes whatever workers make it.

    Args:
        base: with its VAE and text encoders; for prompts with its network instead of the VAE.
        pictures: the folder that `prepare` wrote.
        scratch: folder for unfinished work, best on the same disk as `out`.
        launch: the workers that encode; by default this process.
        load: loads `base` in each of them; needed where they are not this process.

    Raises:
        UserError: there is no list of pictures, a picture changed, latents or embeddings are not finite, the disk is
            too small, another run works on the same cache, or there are no such workers. `out` is then as it was
            before.
    """
    launch = launch or config.Launch()
    job = _Job.plan(base, data, settings, pictures)
    work = job.work_folder(scratch)
    with locked(work):
        store = UnfinishedCache(work, job.fingerprint, job.place)
        digests = {name: job.listed.digest_of(rows, job.text_fingerprint) for name, rows in job.shards.items()}
        _reuse_shards(out, store, digests)
        with _disk_space(scratch, job.bytes_needed(store, launch.processes)):
            if store.text is None:
                tensors, cut = texts.encode_captions(base, list(job.listed.captions), settings.batch, job.text)
                store.save_text(tensors, captions=len(job.listed.captions), cut=cut)
            _encode_shards(job, store, digests, launch, load)
            _assemble_cache(job, store, out)
        discard(work)


@dataclass(frozen=True)
class _Job:
    """What is encoded, and how.

    rollouts: how the teacher draws the latents, if there are no pictures.
    row_bytes: of a picture in a shard.
    shards: the rows of each shard, by its name.
    place: s3://bucket/prefix of the shards, if they go to a bucket.
    text: how the captions are kept.
    text_fingerprint: SHA-256 of what makes the embeddings.
    fingerprint: SHA-256 of what makes the latents.
    """

    base: LoadedBase
    data: config.Data
    settings: config.Encode
    listed: PictureList
    rollouts: config.Rollouts | None
    row_bytes: int
    shards: dict[str, range]
    place: str | None
    text: texts.TextPlan
    text_fingerprint: str
    fingerprint: str

    @classmethod
    def plan(cls, base: LoadedBase, data: config.Data, settings: config.Encode, pictures: Path) -> _Job:
        listed = PictureList(pictures / "train.jsonl")
        rollouts = None if SOURCES.get(data.source).has_pictures else settings.rollouts
        if settings.aspect_buckets and not rollouts:
            sizes = aspect.bucket_sizes(base.resolution, base.size_unit, data.max_aspect)
            listed.sort(sizes, settings.bucket_pictures)
        else:
            listed.sort([(base.resolution, base.resolution)], 1)
        channels, height, width = base.latent_shape
        latents = 2 + (rollouts.steps + 1 if rollouts and rollouts.states else 0)  # mean, log-variance, states
        row_bytes = 2 * latents * channels * height * width + ROW_BYTES
        text_fingerprint = _fingerprint(base, "text_encoder*", "tokenizer*", dtype=str(base.dtype))
        return cls(
            base=base,
            data=data,
            settings=settings,
            listed=listed,
            rollouts=rollouts,
            row_bytes=row_bytes,
            shards=_shard_rows(listed, row_bytes, settings, SHARD_ROWS if rollouts else None),
            place=f"{settings.shards.rstrip('/')}/{base.name}" if settings.shards else None,
            text=texts.plan_text(base, len(listed.captions), settings.text_cache_mb),
            text_fingerprint=text_fingerprint,
            fingerprint=_latents_fingerprint(base, rollouts, text_fingerprint),
        )

    def varied_settings(self) -> dict[str, object]:
        """Returns what decides the bytes of the cache besides the list of pictures and the base's weights."""
        return {
            "model": self.base.name,
            "resolution": self.base.resolution,
            "batch": self.settings.batch,
            "shard_mb": self.settings.shard_mb,
            "shards": self.place,
            "shapes": self.listed.sizes,
            "tokenized": self.text.tokenized,
        }

    def work_folder(self, scratch: Path) -> Path:
        """Returns the folder for unfinished work, which a later run of the same job finds again."""
        key = config.digest(self.listed.digest, self.fingerprint, self.text_fingerprint, self.varied_settings())
        return scratch / key[:16]

    def bytes_needed(self, store: UnfinishedCache, processes: int) -> int:
        """Returns how many bytes of disk are still needed."""
        missing = [len(rows) for name, rows in self.shards.items() if name not in store.shards]
        if self.place:  # each process has a shard on this disk until it is in the bucket; small tensors stay
            return self.text.size + ROW_BYTES * sum(missing) + self.row_bytes * max(missing, default=0) * processes
        return self.text.size + self.row_bytes * sum(missing)


def _assemble_cache(job: _Job, store: UnfinishedCache, out: Path) -> None:
    """Writes the manifest and the captions for people, and puts all files of the cache into the folder `out`."""
    rows = store.save_rows(job.shards) if store.place else None
    names = [*([ROWS] if rows else job.shards), TEXT, MANIFEST]
    for number, shard_rows in enumerate(job.shards.values()):
        lines = [json.dumps({"key": r.key, "caption": r.caption}) + "\n" for r in job.listed.read(shard_rows)]
        names.append(f"captions-{number:05d}.jsonl")
        atomic_write(store.files / names[-1], partial(Path.write_bytes, data="".join(lines).encode()))
    _manifest(job, store, rows).write(store.files / MANIFEST)
    with atomic_folder(out) as folder:
        for name in names:  # and not what a killed process left half written
            link(store.files / name, folder / name)


def _manifest(job: _Job, store: UnfinishedCache, rows: CacheFile | None) -> Manifest:
    base, listed = job.base, job.listed
    shards, buckets = [store.shards[name] for name in job.shards], None
    if listed.sizes != [(base.resolution, base.resolution)]:
        buckets = listed.sizes
        numbers = [listed.bucket(shard_rows.start) for shard_rows in job.shards.values()]
        shards = [shard.model_copy(update={"bucket": n}) for shard, n in zip(shards, numbers, strict=True)]
    assert store.text is not None
    return Manifest(
        version=VERSION,
        model=base.name,
        kind=base.family.name,
        pictures=len(listed),
        captions=len(listed.captions),
        latent_shape=base.latent_shape,
        resolution=base.resolution,
        fingerprint=store.fingerprint,
        shards=shards,
        text=store.text,
        rows=rows,
        at=store.place,
        buckets=buckets,
        rollouts=job.rollouts,
    )


def _reuse_shards(out: Path, store: UnfinishedCache, digests: dict[str, str]) -> None:
    """Keeps the shards of the old cache in `out` whose inputs are unchanged.

    Args:
        digests: of the inputs of each shard that is wanted, by the shard's name.
    """
    try:
        manifest = parse_manifest((out / MANIFEST).read_bytes())
    except (OSError, Malformed):  # there is no cache, or none that can be reused
        return
    if manifest.fingerprint != store.fingerprint or manifest.at != store.place:
        return
    old: dict[str | None, tuple[ShardFile, range]] = {}
    start = 0
    for shard in manifest.shards:
        old[shard.made_of] = shard, range(start, start + shard.pictures)
        start += shard.pictures
    for name, digest in digests.items():
        if name not in store.shards and digest in old:
            store.adopt(out, *old[digest], name)


class PictureList:
    """The list of pictures that `prepare` wrote. Only what is needed of it is read: millions of records would fill the
    memory of every process.

    Attributes:
        captions: the distinct captions and their numbers, in the order of the list.
        digest: SHA-256 of the list.
        sizes: the sizes to which pictures are cropped. Rows are sorted by size, then by the order of the list.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if this is no list of pictures, or an empty one."""
        self._path = path
        self._offsets = array("Q")  # of each row's line in the file
        self._shapes: list[array[int]] = [array("I"), array("I")]  # widths and heights
        self.sizes: list[aspect.Size] = []
        self._starts = [0]  # the first row of each size
        self.captions: dict[str, int] = {}
        digest, offset = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                for line in file:
                    record = Record(**json.loads(line))
                    self.captions.setdefault(record.caption, len(self.captions))
                    self._offsets.append(offset)
                    self._shapes[0].append(record.width)
                    self._shapes[1].append(record.height)
                    digest.update(line)
                    offset += len(line)
        except FileNotFoundError:
            raise UserError(f"{path}: no such list of pictures; run `lcmlora prepare`") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a list of pictures ({error}); run `lcmlora prepare`") from None
        if not self._offsets:
            raise UserError(f"{path}: lists no pictures; run `lcmlora prepare`")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def sort(self, sizes: list[aspect.Size], least: int) -> None:
        """Chooses the sizes that are used, and sorts the rows by the size that each picture is cropped to.

        Args:
            sizes: that may be used.
            least: the number of pictures that a size must have to be used, unless it is the only one.
        """
        if len(sizes) == 1:
            self.sizes = sizes
            return
        shapes = np.stack([np.asarray(sides) for sides in self._shapes], axis=1)
        distinct, index, count = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
        self.sizes = aspect.used_sizes(distinct, count, sizes, least)
        size_of_row = aspect.nearest(distinct, self.sizes)[index]
        self._offsets = array("Q", np.asarray(self._offsets)[np.argsort(size_of_row, kind="stable")].tolist())
        counts = np.bincount(size_of_row, minlength=len(self.sizes))
        self._starts = (counts.cumsum() - counts).tolist()

    def bucket(self, row: int) -> int:
        """Returns the index in `sizes` of the size of this row."""
        return bisect.bisect_right(self._starts, row) - 1

    def parts(self) -> list[range]:
        """Returns the rows of each size."""
        ends = [*self._starts[1:], len(self)]
        return [range(start, end) for start, end in zip(self._starts, ends, strict=True)]

    def digest_of(self, rows: range, text: str) -> str:
        """Returns a SHA-256 of the pictures, captions and size of these rows; the VAE is not part of it.

        Args:
            text: the fingerprint of the text encoders, by whose embeddings the rows are numbered.
        """
        digest = hashlib.sha256(f"{text} {self.sizes[self.bucket(rows.start)]}\n".encode())
        for record in self.read(rows):
            digest.update(f"{record.sha256} {self.captions[record.caption]} {record.caption}\n".encode())
        return digest.hexdigest()

    def read(self, rows: range) -> list[Record]:
        """Returns the records of these rows."""
        records = []
        with self._path.open("rb") as file:
            for row in rows:
                file.seek(self._offsets[row])
                records.append(Record(**json.loads(file.readline())))
        return records


def _shard_rows(listed: PictureList, row_bytes: int, settings: config.Encode, most: int | None) -> dict[str, range]:
    """Returns the rows of each shard by its name: at most `most` rows, and all of one size."""
    rows = max(1, (settings.shard_mb * _MB - _HEADER_BYTES) // row_bytes)
    rows = min(rows, most or rows)
    if rows > settings.batch:
        rows -= rows % settings.batch  # no short batch but the last
    ranges = [part[i : i + rows] for part in listed.parts() for i in range(0, len(part), rows)]
    return {f"shard-{number:05d}.safetensors": each for number, each in enumerate(ranges)}


def _fingerprint(base: LoadedBase, *parts: str, **also: object) -> str:
    """Returns a SHA-256 of these parts of the base, by the patterns of their folders, and of what else decides their
    output."""
    folders = sorted(folder for part in parts for folder in base.folder.glob(part))
    # Caches that were made before stages had versions are of version 1.
    version = {"version": stages.VERSIONS["encode"]} if stages.VERSIONS["encode"] > 1 else {}
    return config.digest({folder.name: sha256_folder(folder) for folder in folders} | also | version)


def _latents_fingerprint(base: LoadedBase, rollouts: config.Rollouts | None, text: str) -> str:
    """Returns a SHA-256 of what makes the latents.

    Args:
        text: the fingerprint of the text encoders, which take part in teacher rollouts.
    """
    if rollouts is None:
        vae = {"scaling": base.latent_scale, "dtype": str(base.vae.dtype), "resize": RESIZE_FILTER}
        return _fingerprint(base, "vae", **vae)
    drawn = {"dtype": str(base.dtype), "text": text, "rollouts": rollouts.model_dump()}
    return _fingerprint(base, base.family.network.folder, "scheduler", **drawn)


@contextmanager
def _disk_space(folder: Path, needed: int) -> Iterator[None]:
    """Raises UserError with the bytes that are needed and free, if the disk is full or becomes full in the block."""

    def disk_full(path: Path) -> UserError:
        return UserError(
            f"{path}: no disk space: the latent cache needs {needed} bytes more in {folder} and "
            f"{shutil.disk_usage(folder).free} are free; make room and run it again, finished shards are kept"
        )

    if needed > shutil.disk_usage(folder).free:
        raise disk_full(folder)
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full(error.filename or folder) from error


def _encode_shards(
    job: _Job,
    store: UnfinishedCache,
    digests: dict[str, str],
    launch: config.Launch,
    load: Callable[[], LoadedBase] | None,
) -> None:
    """Has the shards encoded that are not finished yet."""
    listed, batch, base = job.listed, job.settings.batch, job.base
    batches = {name: -(-len(rows) // batch) for name, rows in job.shards.items()}
    missing = [name for name in job.shards if name not in store.shards]
    if not missing:
        return
    left, total = sum(batches[name] for name in missing), sum(batches.values())
    label = "draw rollouts" if job.rollouts else "encode pictures"
    bar = Bar(left, label, total=total, completed=total - left, unit=batch)
    make = MakeShardEncoder(
        load=load if load and not launch.alone else lambda: base,
        dtype=base.dtype,
        data=job.data,
        rollouts=job.rollouts,
        batch=batch,
        writer=store.writer,
        after_batch=bar.advance if launch.alone else None,  # of workers only whole shards are known
    )

    def shard(name: str) -> Shard:
        rows = job.shards[name]
        records = listed.read(rows)
        text_rows = [listed.captions[record.caption] for record in records]
        return Shard(name, digests[name], listed.sizes[listed.bucket(rows.start)], records, text_rows)

    with bar, workers(launch, make, job.settings.device) as pool:
        for made, (file, small) in pool.results(map(shard, missing)):
            store.add(file, small)
            if not launch.alone:
                bar.advance(batches[made.name])
