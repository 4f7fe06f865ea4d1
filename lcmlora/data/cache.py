"""Stage `encode`: the latent cache, all that training reads. Pictures and captions go through the frozen parts once.

A cache is a folder:
    manifest.json              counts, shapes, and size and SHA-256 of every other file that training reads
    shard-00000.safetensors    latent_mean, latent_logvar (N, C, h, w) fp16; orig_size (N, 2) height and width of the
                               picture, crop_tl (N, 2) top and left of the crop, text_row (N,), all int32;
                               key (N, 16) uint8, the first bytes of the picture's SHA-256; of prompts without
                               pictures what rollouts.py says
    text.safetensors           embeddings of the distinct captions, `text_row` numbers them; `unconditional.*` one row
    captions-00000.jsonl       key and caption of each row of the shard, for people
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from lcmlora import checkpoint, config
from lcmlora.bases import Conditioning, LoadedBase
from lcmlora.data.encoding import Tensors, picture_encoder
from lcmlora.data.rollouts import ROWS, RolloutEncoder
from lcmlora.data.sources import RESIZE_FILTER, Record
from lcmlora.errors import UserError
from lcmlora.files import atomic_folder, atomic_write, sha256_file, sha256_folder, write_json
from lcmlora.progress import track
from lcmlora.ranks import Ranks

VERSION = 1
MANIFEST = "manifest.json"
TEXT = "text.safetensors"

_MB = 1 << 20
_ROW_BYTES = 8 + 8 + 16 + 4  # of a picture besides its latent: orig_size, crop_tl, key, text_row
_HEADER_BYTES = 4096  # room for a safetensors header
_UNCONDITIONAL = "unconditional."
_VISIBLE = 120.0  # seconds until another machine's files must be seen; NFS may take 60 (acdirmax in nfs(5))

Entry = dict[str, Any]  # of the manifest: name, bytes and sha256 of a file


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
        UserError: no list of pictures, a picture that changed, latents that are not finite, too much text for
            `text_cache_mb`, too little disk, another run at work on the same, or processes with other files. `out` is
            then as it was before.
    """
    ranks = ranks or Ranks()
    listed = _List(pictures / "train.jsonl")
    channels, height, width = base.latent_shape
    rollouts = settings.rollouts if data.source == "prompts" else None
    tensors = 2 + (rollouts.steps + 1 if rollouts and rollouts.states else 0)
    row_bytes = 2 * tensors * channels * height * width + _ROW_BYTES
    shards = _plan(len(listed), row_bytes, settings, most=ROWS if rollouts else None)
    # Dealt out in turn, so that what a killed run has left to do is divided evenly as well.
    own = list(shards)[ranks.rank :: ranks.size]
    text = _fingerprint(base, "text_encoder*", "tokenizer*", dtype=str(base.dtype))
    fingerprint = _latents_fingerprint(base, rollouts, text)
    sizes = {"model": base.name, "resolution": base.resolution, "batch": settings.batch, "shard_mb": settings.shard_mb}
    work = scratch / config.digest(listed.digest, fingerprint, text, sizes)[:16]
    with checkpoint.locked(work) if ranks.first else nullcontext():
        store = _Store(work, fingerprint, own)
        missing = {name: shards[name] for name in own if name not in store.done}
        left = [rows for name, rows in shards.items() if name not in store.done] if ranks.first else missing.values()
        text_bytes = _text_bytes(base, listed.captions, settings.text_cache_mb) if ranks.first else 0
        with _room(scratch, row_bytes * sum(map(len, left)) + text_bytes):
            # Nobody writes before all have looked at the disk and the first one has the lock.
            ranks.agree(listed_pictures=listed.digest, base=(fingerprint, text), settings=sizes)
            if ranks.first and TEXT not in store.done:
                captions = list(listed.captions)
                store.save(TEXT, _encode_captions(base, captions, settings.batch), captions=len(captions))
            total = sum(len(_batches(shards[name], settings.batch)) for name in own)
            for name, rows in _encode_shards(base, data, settings, listed, missing, total, ranks):
                store.save(name, rows, pictures=len(rows["key"]))
            ranks.wait()
            if ranks.first:
                store.gather([*shards, TEXT])
                _finish(base, listed, shards, store, out, rollouts)
            ranks.wait()
        if ranks.first:
            checkpoint.discard(work)


def _finish(
    base: LoadedBase,
    listed: _List,
    shards: dict[str, range],
    store: _Store,
    out: Path,
    rollouts: config.Rollouts | None,
) -> None:
    """Writes what people read and the manifest, and puts the finished files in place."""
    names = [*shards, TEXT, MANIFEST]
    for number, rows in enumerate(shards.values()):
        told = (json.dumps({"key": r.key, "caption": r.caption}) + "\n" for r in listed.read(rows))
        names.append(f"captions-{number:05d}.jsonl")
        (store.files / names[-1]).write_text("".join(told), encoding="utf-8")
    manifest = {
        "version": VERSION,
        "model": base.name,
        "kind": base.kind,
        "pictures": len(listed),
        "captions": len(listed.captions),
        "latent_shape": list(base.latent_shape),
        "resolution": base.resolution,
        "fingerprint": store.fingerprint,
        "shards": [store.done[name] for name in shards],
        "text": store.done[TEXT],
    } | ({"rollouts": rollouts.model_dump()} if rollouts else {})
    write_json(store.files / MANIFEST, manifest)
    with atomic_folder(out) as folder:
        for name in names:  # and not what a killed process left half written
            _link(store.files / name, folder / name)


class _List:
    """The list of pictures that `prepare` wrote, read where it is wanted: millions would fill every process's memory.

    captions: the distinct captions and their numbers, in the order of the pictures.
    digest: SHA-256 of the list.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError where this is no list of pictures, or an empty one."""
        self._path = path
        self._places = array("Q")  # in the file, of each picture
        self.captions: dict[str, int] = {}
        digest, place = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                for line in file:
                    self.captions.setdefault(Record(**json.loads(line)).caption, len(self.captions))
                    self._places.append(place)
                    digest.update(line)
                    place += len(line)
        except FileNotFoundError:
            raise UserError(f"{path}: no such list of pictures; run `lcmlora prepare`") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: not a list of pictures ({error}); run `lcmlora prepare`") from None
        if not self._places:
            raise UserError(f"{path}: lists no pictures; run `lcmlora prepare`")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, rows: range) -> list[Record]:
        with self._path.open("rb") as file:
            file.seek(self._places[rows.start])
            return [Record(**json.loads(line)) for line in islice(file, len(rows))]


def _plan(pictures: int, row_bytes: int, settings: config.Encode, most: int | None = None) -> dict[str, range]:
    """Returns the rows of each shard by its name, at most so many."""
    rows = max(1, (settings.shard_mb * _MB - _HEADER_BYTES) // row_bytes)
    rows = min(rows, most or rows)
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


def _latents_fingerprint(base: LoadedBase, rollouts: config.Rollouts | None, text: str) -> str:
    """Returns a SHA-256 over what makes the latents.

    Args:
        text: that of the text encoders, which has a part in what the teacher draws.
    """
    if rollouts is None:
        vae = {"scaling": base.latent_scale, "dtype": str(base.vae.dtype), "resize": RESIZE_FILTER}
        return _fingerprint(base, "vae", **vae)
    drawn = {"dtype": str(base.dtype), "text": text, "rollouts": rollouts.model_dump()}
    return _fingerprint(base, "unet", "scheduler", **drawn)


def _text_bytes(base: LoadedBase, captions: Sized, limit_mb: int) -> int:
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
    """The files of a cache in the making that are finished, kept in `work` over kills; `done` has their entries.

    Each has its entry in a file of its own, so that many processes can write to one folder. The files in `own`, which
    this process makes, are read whole to see whether they are sound.
    """

    def __init__(self, work: Path, fingerprint: str, own: Sequence[str]) -> None:
        self.files = work / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprint
        self._entries = work / "done"
        self._own = {*own, TEXT}
        self.done: dict[str, Entry] = {}
        self._read()

    def save(self, name: str, tensors: Tensors, **counts: int) -> None:
        content = to_bytes({n: t.contiguous() for n, t in tensors.items()}, {"fingerprint": self.fingerprint})
        atomic_write(self.files / name, lambda path: path.write_bytes(content))
        sha256 = hashlib.sha256(content).hexdigest()
        self.done[name] = {"name": name, "bytes": len(content), "sha256": sha256, **counts}
        write_json(self._entries / f"{name}.json", self.done[name])

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
            entry: Entry = json.loads(path.read_text())
            name = entry["name"]
            if name not in self.done and _fault(self.files, entry, contents=name in self._own) is None:
                self.done[name] = entry


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


# --- latents ----------------------------------------------------------------------------------------------------


@contextmanager
def _encoder(
    base: LoadedBase, data: config.Data, settings: config.Encode, wanted: Iterable[Record]
) -> Iterator[Callable[[list[Record]], Tensors]]:
    """Gives what makes the latents of a batch of records, all of which come in the order of `wanted`."""
    if data.source == "prompts":
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
    wanted = (record for _, batch in batches for record in listed.read(batch))
    parts: list[Tensors] = []
    done, unit = total - len(batches), settings.batch * ranks.size
    label = "draw rollouts" if data.source == "prompts" else "encode pictures"
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
        told = self.manifest.get("rollouts")
        self.rollouts = None if told is None else config.Rollouts(**told)  # how the teacher drew what is in it
        shards = [self._open(entry) for entry in self.manifest["shards"]]
        self._small = {name: torch.cat([s[name] for s in shards]) for name in ("orig_size", "crop_tl", "text_row")}
        large = ("latent_mean", "latent_logvar", *(["states"] if self.rollouts and self.rollouts.states else []))
        self._latents = {name: [s[name] for s in shards] for name in large}
        lengths = torch.tensor([len(part) for part in self._latents["latent_mean"]])
        self._stops = lengths.cumsum(0)
        self._starts = self._stops - lengths
        if sum(entry["bytes"] for entry in self.manifest["shards"]) <= ram_bytes:
            self._latents = {name: [torch.cat(parts)] for name, parts in self._latents.items()}
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

    def states(self, rows: Tensor, index: Tensor) -> Tensor:
        """Returns two neighbouring states of the teacher's run, (2, B, C, h, w) fp32, for the rows (B,) int64: at the
        timestep of the grid that `index` (B,) int64 numbers, and where the teacher steps from there."""
        parts, shard_of = self._latents["states"], self.shards(rows)
        starts = self._starts if len(parts) > 1 else torch.zeros_like(self._starts)
        pairs = torch.empty(2, len(rows), *self.latent_shape)
        for i, (shard, row) in enumerate(zip(shard_of.tolist(), rows - starts[shard_of], strict=True)):
            pair = parts[shard if len(parts) > 1 else 0][row, index[i] : index[i] + 2]
            pairs[:, i] = pair.flip(0).float()
        return pairs

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

    def shards(self, rows: Tensor) -> Tensor:
        """Returns the number of the shard that holds each row, (B,) int64."""
        return torch.bucketize(rows, self._stops, right=True)

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
        shard_of = self.shards(rows)
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
