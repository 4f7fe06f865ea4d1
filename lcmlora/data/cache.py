"""Stage `encode`: the latent cache, all that training reads. Pictures and captions go through the frozen parts once.

A cache is a folder:
    manifest.json              counts, shapes, and size and SHA-256 of every other file that training reads
    shard-00000.safetensors    latent_mean, latent_logvar (N, C, h, w) fp16; orig_size (N, 2) height and width of the
                               picture, crop_tl (N, 2) top and left of the crop, text_row (N,), all int32;
                               key (N, 16) uint8, the first bytes of the picture's SHA-256
    text.safetensors           embeddings of the distinct captions, `text_row` numbers them; `unconditional.*` one row
    captions-00000.jsonl       key and caption of each row of the shard, for people
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from lcmlora import checkpoint, config
from lcmlora.bases import Conditioning, LoadedBase
from lcmlora.data.sources import RESIZE_FILTER, Record, fit, open_picture, read_records, workers
from lcmlora.errors import UserError
from lcmlora.files import atomic_folder, atomic_write, sha256_file, sha256_folder, write_json
from lcmlora.progress import track

VERSION = 1
MANIFEST = "manifest.json"
TEXT = "text.safetensors"

_MB = 1 << 20
_LOGVAR = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution clamps it
_ROW_BYTES = 8 + 8 + 16 + 4  # of a picture besides its latent: orig_size, crop_tl, key, text_row
_HEADER_BYTES = 4096  # room for a safetensors header
_UNCONDITIONAL = "unconditional."

T = TypeVar("T")
R = TypeVar("R")
Tensors = dict[str, Tensor]
Entry = dict[str, Any]  # of the manifest: name, bytes and sha256 of a file
Loaded = tuple[np.ndarray, tuple[int, int], tuple[int, int]]


def encode(
    base: LoadedBase, data: config.Data, settings: config.Encode, pictures: Path, scratch: Path, out: Path
) -> dict[str, Any]:
    """Encodes the training pictures and captions of `pictures` into a cache in the folder `out`; returns its manifest.

    A shard that is finished stays in `scratch` until the whole cache is, so a killed run goes on at the next shard.

    Args:
        base: with its VAE and text encoders.
        pictures: the folder that `prepare` wrote.
        scratch: folder for unfinished work, best on the same disk as `out`.

    Raises:
        UserError: no list of pictures, a picture that changed, latents that are not finite, too much text for
            `text_cache_mb`, too little disk, or another run at work on the same. `out` is then as it was before.
    """
    records = read_records(pictures / "train.jsonl")
    if not records:
        raise UserError(f"{pictures / 'train.jsonl'}: lists no pictures; run `lcmlora prepare`")
    captions = list(dict.fromkeys(r.caption for r in records))
    channels, height, width = base.latent_shape
    row_bytes = 2 * 2 * channels * height * width + _ROW_BYTES
    shards = _plan(len(records), row_bytes, settings)
    fingerprint = _fingerprint(base, "vae", scaling=base.latent_scale, dtype=str(base.vae.dtype), resize=RESIZE_FILTER)
    text = _fingerprint(base, "text_encoder*", "tokenizer*", dtype=str(base.dtype))
    lines = "".join(f"{r.sha256} {r.key} {r.caption}\n" for r in records)
    sizes = {"model": base.name, "resolution": base.resolution, "batch": settings.batch, "shard_mb": settings.shard_mb}
    with checkpoint.locked(scratch / config.digest(lines, fingerprint, text, sizes)[:16]) as work:
        store = _Store(work, fingerprint)
        missing = {name: rows for name, rows in shards.items() if name not in store.done}
        text_bytes = _text_bytes(base, captions, settings.text_cache_mb)
        with _room(scratch, row_bytes * sum(map(len, missing.values())) + text_bytes):
            if TEXT not in store.done:
                store.save(TEXT, _encode_captions(base, captions, settings.batch), captions=len(captions))
            total = sum(len(_batches(rows, settings.batch)) for rows in shards.values())
            for name, tensors in _encode_pictures(base, data, records, captions, missing, settings.batch, total):
                store.save(name, tensors, pictures=len(tensors["key"]))
            for number, rows in enumerate(shards.values()):
                told = (json.dumps({"key": records[i].key, "caption": records[i].caption}) + "\n" for i in rows)
                (store.files / f"captions-{number:05d}.jsonl").write_text("".join(told), encoding="utf-8")
            manifest = {
                "version": VERSION,
                "model": base.name,
                "kind": base.kind,
                "pictures": len(records),
                "captions": len(captions),
                "latent_shape": list(base.latent_shape),
                "resolution": base.resolution,
                "fingerprint": fingerprint,
                "shards": [store.done[name] for name in shards],
                "text": store.done[TEXT],
            }
            write_json(store.files / MANIFEST, manifest)
            with atomic_folder(out) as folder:
                for path in store.files.iterdir():
                    _link(path, folder / path.name)
        checkpoint.discard(work)
    return manifest


def _plan(pictures: int, row_bytes: int, settings: config.Encode) -> dict[str, range]:
    """Returns the rows of each shard by its name."""
    rows = max(1, (settings.shard_mb * _MB - _HEADER_BYTES) // row_bytes)
    if rows > settings.batch:
        rows -= rows % settings.batch  # no short batch but the last
    starts = range(0, pictures, rows)
    return {f"shard-{i:05d}.safetensors": range(a, min(a + rows, pictures)) for i, a in enumerate(starts)}


def _batches(rows: range, size: int) -> list[range]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _fingerprint(base: LoadedBase, *parts: str, **also: object) -> str:
    """Returns a SHA-256 over these folders of the base and what else decides what comes out of them."""
    folders = sorted(folder for part in parts for folder in base.folder.glob(part))
    return config.digest({folder.name: sha256_folder(folder) for folder in folders} | also)


def _text_bytes(base: LoadedBase, captions: list[str], limit_mb: int) -> int:
    """Returns the size of the embeddings. Raises UserError where it is over the limit."""
    row = sum(value.numel() for value in base.unconditional().values()) * _text_dtype(base).itemsize
    size = row * (len(captions) + 1)
    if size > limit_mb * _MB:
        raise UserError(
            f"encode.text_cache_mb: the embeddings of {len(captions)} captions take {size / _MB:.1f} MB and "
            f"{limit_mb} MB are allowed; raise it, or use fewer distinct captions"
        )
    return size


@contextmanager
def _room(folder: Path, needed: int) -> Iterator[None]:
    """Says what is missing where the disk has not the room, or has it no longer."""

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


class _Store:
    """The files of a cache in the making that are finished, kept in `work` over kills; `done` has their entries."""

    def __init__(self, work: Path, fingerprint: str) -> None:
        self.files = work / "files"
        self.files.mkdir(exist_ok=True)
        self._list = work / "done.json"
        self._fingerprint = fingerprint
        entries: dict[str, Entry] = json.loads(self._list.read_text()) if self._list.exists() else {}
        self.done = {name: e for name, e in entries.items() if _fault(self.files, e, contents=True) is None}

    def save(self, name: str, tensors: Tensors, **counts: int) -> None:
        content = to_bytes({n: t.contiguous() for n, t in tensors.items()}, {"fingerprint": self._fingerprint})
        atomic_write(self.files / name, lambda path: path.write_bytes(content))
        sha256 = hashlib.sha256(content).hexdigest()
        self.done[name] = {"name": name, "bytes": len(content), "sha256": sha256, **counts}
        write_json(self._list, self.done)


# --- text -------------------------------------------------------------------------------------------------------


def _text_dtype(base: LoadedBase) -> torch.dtype:
    return torch.float32 if base.dtype == torch.float32 else torch.float16


def _encode_captions(base: LoadedBase, captions: list[str], size: int) -> Tensors:
    def stored(conditioning: Conditioning) -> Tensors:
        return {name: value.to("cpu", _text_dtype(base)) for name, value in conditioning.items()}

    batches = [captions[rows.start : rows.stop] for rows in _batches(range(len(captions)), size)]
    encoded = [stored(base.encode_text(batch)) for batch in track(batches, "encode captions", unit=size)]
    tensors = {name: torch.cat([rows[name] for rows in encoded]) for name in encoded[0]}
    for name, value in tensors.items():
        finite = value.flatten(1).isfinite().all(1)
        if not finite.all():
            raise UserError(
                f"{name} of caption {captions[int(finite.int().argmin())]!r} is not finite; is {base.folder} whole?"
            )
    return tensors | {_UNCONDITIONAL + name: value for name, value in stored(base.unconditional()).items()}


# --- pictures ---------------------------------------------------------------------------------------------------


def _encode_pictures(
    base: LoadedBase,
    data: config.Data,
    records: list[Record],
    captions: list[str],
    shards: dict[str, range],
    size: int,
    total: int,
) -> Iterator[tuple[str, Tensors]]:
    """Yields name and tensors of each of `shards`. Pictures are read ahead, so that the encoder need not wait.

    Args:
        size: pictures in a batch.
        total: batches of the whole cache, for the progress.
    """
    text_row = {caption: row for row, caption in enumerate(captions)}

    def load(record: Record) -> Loaded:
        picture = open_picture(data, record, size=base.resolution)
        fitted, crop = fit(picture, base.resolution)
        return np.asarray(fitted), (picture.height, picture.width), crop

    batches = [(name, batch) for name, rows in shards.items() for batch in _batches(rows, size)]
    wanted = (records[i] for _, batch in batches for i in batch)
    parts: list[Tensors] = []
    # Drawing emoji holds the interpreter's lock: there a second thread would only wait.
    with ThreadPoolExecutor(1 if data.source == "emoji" else workers()) as pool:
        loaded = _ahead(pool, load, wanted, depth=2 * size)
        for name, batch in track(batches, "encode pictures", total=total, completed=total - len(batches), unit=size):
            mine = [records[i] for i in batch]
            tensors = _encode_batch(base, mine, list(islice(loaded, len(batch))))
            tensors["text_row"] = torch.tensor([text_row[r.caption] for r in mine], dtype=torch.int32)
            parts.append(tensors)
            if batch.stop == shards[name].stop:
                yield name, {key: torch.cat([part[key] for part in parts]) for key in tensors}
                parts = []


def _encode_batch(base: LoadedBase, records: list[Record], loaded: list[Loaded]) -> Tensors:
    pixels, sizes, crops = zip(*loaded, strict=True)
    pictures = torch.from_numpy(np.stack(pixels)).to(base.device).permute(0, 3, 1, 2).contiguous()
    mean, logvar = base.encode_pictures(pictures.float().div_(127.5).sub_(1))
    mean = mean.half()
    finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(1)
    if not finite.all():
        raise UserError(
            f"{records[int(finite.int().argmin())].key}: its latent is not finite (NaN or infinite); leave the picture "
            f"out, or encode with a VAE in higher precision (now {base.vae.dtype})"
        )
    return {
        "latent_mean": mean.cpu(),
        "latent_logvar": logvar.clamp(*_LOGVAR).half().cpu(),
        "orig_size": torch.tensor(sizes, dtype=torch.int32),
        "crop_tl": torch.tensor(crops, dtype=torch.int32),
        "key": torch.tensor([list(bytes.fromhex(r.sha256)[:16]) for r in records], dtype=torch.uint8),
    }


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """Yields function(item) in order, computed in the pool at most `depth` items ahead."""
    source = iter(items)
    waiting = deque(pool.submit(function, item) for item in islice(source, depth))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _fault(folder: Path, entry: Entry, *, contents: bool) -> str | None:
    """Returns what is wrong with a file of the manifest, or None; `contents` reads it whole."""
    path = folder / entry["name"]
    if not path.is_file():
        return f"{path}: is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path}: has {path.stat().st_size} bytes and the manifest says {entry['bytes']}"
    if contents and sha256_file(path) != entry["sha256"]:
        return f"{path}: is damaged, its SHA-256 is not the manifest's"
    return None


class LatentCache:
    """A cache opened for training. Rows are numbered through all shards."""

    def __init__(self, folder: Path, *, ram_bytes: int = 4 << 30) -> None:
        """Opens the cache in `folder`; latents of up to `ram_bytes` are read into memory, larger ones are mapped.

        Raises:
            UserError: no manifest, or a file of it missing, of the wrong size or unreadable.
        """
        self._folder = folder
        try:
            content = (folder / MANIFEST).read_bytes()
            self.manifest: dict[str, Any] = json.loads(content)
        except (OSError, ValueError) as error:
            raise self._unusable(f"{folder / MANIFEST}: cannot be read ({error})") from None
        if self.manifest.get("version") != VERSION:
            raise self._unusable(f"{folder / MANIFEST}: version {self.manifest.get('version')}, expected {VERSION}")
        self.digest = hashlib.sha256(content).hexdigest()
        channels, height, width = self.manifest["latent_shape"]
        self.latent_shape: tuple[int, int, int] = (channels, height, width)
        shards = [self._open(entry) for entry in self.manifest["shards"]]
        self._small = {name: torch.cat([s[name] for s in shards]) for name in ("orig_size", "crop_tl", "text_row")}
        self._latents = {name: [s[name] for s in shards] for name in ("latent_mean", "latent_logvar")}
        if sum(entry["bytes"] for entry in self.manifest["shards"]) <= ram_bytes:
            self._latents = {name: [torch.cat(parts)] for name, parts in self._latents.items()}
        lengths = torch.tensor([len(part) for part in self._latents["latent_mean"]])
        self._stops = lengths.cumsum(0)
        self._starts = self._stops - lengths
        text = self._open(self.manifest["text"])
        self._unconditional = {
            n.removeprefix(_UNCONDITIONAL): v for n, v in text.items() if n.startswith(_UNCONDITIONAL)
        }
        self._text = {n: v for n, v in text.items() if not n.startswith(_UNCONDITIONAL)}
        if len(self) != self.manifest["pictures"]:
            raise self._unusable(
                f"{folder}: has {len(self)} pictures and the manifest says {self.manifest['pictures']}"
            )

    def __len__(self) -> int:
        return int(self._stops[-1])

    def latents(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance (B, C, h, w) fp32 of the rows (B,) int64."""
        return self._gather("latent_mean", rows), self._gather("latent_logvar", rows)

    def conditioning(self, rows: Tensor) -> Conditioning:
        """Returns what the UNet is given for the rows (B,) int64, fp32: encoder_hidden_states (B, T, D), and for the
        SDXL family text_embeds (B, P) and time_ids (B, 6), (height, width) before (top, left) before the target."""
        text_rows = self._small["text_row"][rows]
        conditioning = {name: value.index_select(0, text_rows).float() for name, value in self._text.items()}
        if self.manifest["kind"] == "sdxl":
            target = torch.full((len(rows), 2), self.manifest["resolution"])
            parts = [self._small["orig_size"][rows], self._small["crop_tl"][rows], target]
            conditioning["time_ids"] = torch.cat(parts, dim=1).float()
        return conditioning

    def unconditional(self) -> Conditioning:
        """Returns the unconditional embedding as one row, fp32, without time_ids: those are the picture's own."""
        return {name: value.float() for name, value in self._unconditional.items()}

    def captions(self) -> Tensor:
        """Returns the number of each picture's caption, (N,) int64: pictures with equal captions have equal ones."""
        return self._small["text_row"].long()

    def names(self, rows: Tensor) -> list[str]:
        """Returns the file names of the pictures in these rows (B,), for messages."""
        names: list[str] = []
        for path in sorted(self._folder.glob("captions-*.jsonl")):
            names += [json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines()]
        return [names[row] for row in rows.tolist()]

    def verify(self) -> None:
        """Reads every file whole. Raises UserError naming the first whose SHA-256 is not the manifest's."""
        for entry in [*self.manifest["shards"], self.manifest["text"]]:
            fault = _fault(self._folder, entry, contents=True)
            if fault:
                raise self._unusable(fault)

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        parts = self._latents[name]
        if len(parts) == 1:
            return parts[0].index_select(0, rows).float()
        picked = torch.empty(len(rows), *self.latent_shape)
        shard_of = torch.bucketize(rows, self._stops, right=True)
        for shard in set(shard_of.tolist()):
            mine = shard_of == shard
            picked[mine] = parts[shard].index_select(0, rows[mine] - self._starts[shard]).float()
        return picked

    def _open(self, entry: Entry) -> Tensors:
        fault = _fault(self._folder, entry, contents=False)
        if fault:
            raise self._unusable(fault)
        try:
            tensors: Tensors = load_file(self._folder / entry["name"])  # mapped, not read
            return tensors
        except SafetensorError as error:
            raise self._unusable(f"{self._folder / entry['name']}: cannot be read ({error})") from None

    def _unusable(self, fault: str) -> UserError:
        return UserError(f"{fault}; make the cache again with `lcmlora encode {self._folder.name}`")
