"""The latent cache: all that training reads, made by the stage `encode` (encode.py).

A cache is a folder:
    manifest.json              counts, shapes, and size and SHA-256 of every other file that training reads
    shard-00000.safetensors    latent_mean, latent_logvar (N, C, h, w) fp16; orig_size (N, 2) height and width of the
                               picture, crop_tl (N, 2) top and left of the crop, text_row (N,), all int32;
                               key (N, 16) uint8, the first bytes of the picture's SHA-256; of prompts without
                               pictures what rollouts.py says
                               With `encode.shards` these files are in a bucket (shards.py), and here is
    rows.safetensors           all that is in them but latents and states
    text.safetensors           embeddings of the distinct captions, `text_row` numbers them; `unconditional.*` one row.
                               Where those would be large (texts.py) `token_ids` (N, T) int32 instead of embeddings,
                               and `token_ids_2` for a second text encoder
    captions-00000.jsonl       key and caption of each row of the shard, for people
A shard has latents of one shape. With aspect buckets the manifest has the `buckets` (height and width in pixels) and
which one each shard is of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcmlora import config
from lcmlora.bases import families
from lcmlora.bases.families import Conditioning
from lcmlora.data.latents.sampling_plan import Plan
from lcmlora.data.latents.shards import Shards
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file
from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.io.remote import Files

VERSION = 1
MANIFEST = "manifest.json"
TEXT = "text.safetensors"
ROWS = "rows.safetensors"
UNCONDITIONAL = "unconditional."  # begins the names of such embeddings
TOKENS = "token_ids"  # and token_ids_2 and so on, of further text encoders

Tensors = dict[str, Tensor]
Entry = dict[str, Any]  # of the manifest: name, bytes and sha256 of a file


def fault(folder: Path, entry: Entry, *, contents: bool) -> str | None:
    """Returns what is wrong with a file of the manifest, or None; `contents` reads it whole."""
    path = folder / entry["name"]
    if not path.is_file():
        return f"{path}: is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path}: has {path.stat().st_size} bytes and the manifest says {entry['bytes']}"
    if contents and sha256_file(path) != entry["sha256"]:
        return f"{path}: is damaged, its SHA-256 is not the manifest's"
    return None


class _File(BaseModel):
    """A file of the manifest."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # in the cache, and nowhere else
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Shard(_File):
    pictures: config.Positive
    bucket: Annotated[int, Field(ge=0)] = 0


class _Manifest(BaseModel):
    """What a manifest must have; others may know more of it."""

    version: int
    kind: str
    pictures: config.Positive
    resolution: config.Positive
    latent_shape: tuple[config.Positive, config.Positive, config.Positive]
    shards: Annotated[list[_Shard], Field(min_length=1)]
    text: _File
    rows: _File | None = None
    at: str | None = None
    buckets: Annotated[list[tuple[config.Positive, config.Positive]], Field(min_length=1)] | None = None
    rollouts: config.Rollouts | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.at and not self.rows:
            raise ValueError(f"rows: is missing, and the shards are at {self.at}")
        if max(shard.bucket for shard in self.shards) >= len(self.buckets or [()]):
            raise ValueError("shards: one is of a bucket that is not among buckets")
        return self


def parse_manifest(content: bytes) -> dict[str, Any]:
    """Returns what a manifest says. Raises Malformed where it does not say what a cache has, or has another version."""
    found = parse_json(content)
    if not isinstance(found, dict) or found.get("version") != VERSION:
        told = found.get("version") if isinstance(found, dict) else "none"
        raise Malformed(f"version {told}, expected {VERSION}")
    try:
        _Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Malformed(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}") from None
    return found


def tokens(number: int) -> str:
    """Returns what the token ids for a text encoder are called, counted from 0."""
    return f"{TOKENS}_{number + 1}" if number else TOKENS


class LatentCache:
    """A cache opened for training. Rows are numbered through all shards."""

    def __init__(
        self, folder: Path, *, ram_bytes: int = 4 << 30, shards: Path | None = None, budget: int = 50 << 30
    ) -> None:
        """Opens the cache in `folder`; latents of up to `ram_bytes` are read into memory, larger ones are mapped.

        Args:
            shards: a folder for shards that lie in a bucket, beside the cache by default.
            budget: bytes that it may hold.

        Raises:
            UserError: no manifest, or a file of it missing, of the wrong size or unreadable.
        """
        self._folder = folder
        try:
            content = (folder / MANIFEST).read_bytes()
            self.manifest = parse_manifest(content)
        except OSError as error:
            raise self._unusable(f"{folder / MANIFEST}: cannot be read ({error.strerror})") from None
        except Malformed as error:
            raise self._unusable(f"{folder / MANIFEST}: {error}") from None
        self.digest = hashlib.sha256(content).hexdigest()
        channels, height, width = self.manifest["latent_shape"]
        self.latent_shape: tuple[int, int, int] = (channels, height, width)
        told = self.manifest.get("rollouts")
        self.rollouts = None if told is None else config.Rollouts(**told)  # how the teacher drew what is in it
        entries = self.manifest["shards"]
        side = self.manifest["resolution"]
        # Height and width in pixels of the shapes that there are, and which one each shard has.
        self.buckets = [(high, wide) for high, wide in self.manifest.get("buckets", [(side, side)])]
        self._bucket_of = torch.tensor([entry.get("bucket", 0) for entry in entries])
        self._latents: dict[str, list[Tensor]] = {}
        self._far: Shards | None = None
        if place := self.manifest.get("at"):
            beside = folder.with_name(f".{folder.name}.shards")
            self._far = Shards(Files(place), entries, shards or beside, budget)
            self._small = self._open(self.manifest["rows"])
            lengths = torch.tensor([entry["pictures"] for entry in entries])
        else:
            opened = [self._open(entry) for entry in entries]
            self._small = {name: torch.cat([s[name] for s in opened]) for name in ("orig_size", "crop_tl", "text_row")}
            large = ("latent_mean", "latent_logvar", *(["states"] if self.rollouts and self.rollouts.states else []))
            self._latents = {name: [s[name] for s in opened] for name in large}
            lengths = torch.tensor([len(part) for part in self._latents["latent_mean"]])
        self._stops = lengths.cumsum(0)
        self._starts = self._stops - lengths
        if self._latents and len(self.buckets) == 1 and sum(entry["bytes"] for entry in entries) <= ram_bytes:
            self._latents = {name: [torch.cat(parts)] for name, parts in self._latents.items()}
        self._family = families.by_name(self.manifest["kind"])
        text = self._open(self.manifest["text"])
        self._unconditional = {n.removeprefix(UNCONDITIONAL): v for n, v in text.items() if n.startswith(UNCONDITIONAL)}
        self._text = {n: v for n, v in text.items() if not n.startswith((UNCONDITIONAL, TOKENS))}
        self._tokens = [text[name] for name in map(tokens, range(len(text))) if name in text]
        # Makes conditioning of token ids (B, T) int64 of each text encoder; whoever opens a tokenized cache sets it.
        self.embed: Callable[[list[Tensor]], Conditioning] | None = None
        if len(self) != self.manifest["pictures"] or len(self) != len(self._small["text_row"]):
            raise self._unusable(
                f"{folder}: has {len(self)} pictures and the manifest says {self.manifest['pictures']}"
            )

    def __len__(self) -> int:
        return int(self._stops[-1])

    @property
    def tokenized(self) -> bool:
        """Whether the captions are kept as token ids, of which `embed` has to make conditioning."""
        return bool(self._tokens)

    def follow(self, plan: Plan, batch: int, window: int) -> None:
        """Prepares for a run by this plan. Raises as Shards.follow does, where the shards are in a bucket."""
        if self._far:
            self._far.follow(plan, batch, window)

    def reach(self, step: int) -> None:
        """Says that the run is at this step of its plan. Raises as Shards.reach does."""
        if self._far:
            self._far.reach(step)

    def bucket(self, rows: Tensor) -> Tensor:
        """Returns the number of the bucket of each row, (B,) int64."""
        return self._bucket_of[self.shards(rows)]

    def bucket_of_shard(self, number: int) -> int:
        return int(self._bucket_of[number])

    def latents(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance (B, C, h, w) fp32 of the rows (B,) int64, which are of one bucket."""
        return self._gather("latent_mean", rows), self._gather("latent_logvar", rows)

    def states(self, rows: Tensor, index: Tensor) -> Tensor:
        """Returns two neighbouring states of the teacher's run, (2, B, C, h, w) fp32, for the rows (B,) int64: at the
        timestep of the grid that `index` (B,) int64 numbers, and where the teacher steps from there."""
        at = torch.stack([index + 1, index])
        pairs = torch.empty(2, len(rows), *self.latent_shape)
        for mine, states, places in self._parts("states", rows):
            pairs[:, mine] = states[places, at[:, mine]].float()
        return pairs

    def conditioning(self, rows: Tensor) -> Conditioning:
        """Returns what the network is given for the rows (B,) int64, fp32: that of the captions, and what the base's
        family tells it of the pictures."""
        text_rows = self._small["text_row"][rows]
        conditioning = {name: value.index_select(0, text_rows).float() for name, value in self._text.items()}
        if self._tokens:
            assert self.embed, "a cache of token ids needs text encoders"
            conditioning = self.embed([ids.index_select(0, text_rows).long() for ids in self._tokens])
        targets = torch.tensor(self.buckets)[self.bucket(rows)]
        return conditioning | self._family.micro_conditioning(
            self._small["orig_size"][rows], self._small["crop_tl"][rows], targets
        )

    def unconditional(self) -> Conditioning:
        """Returns the unconditional embedding as one row, fp32, without what belongs to the picture."""
        return {name: value.float() for name, value in self._unconditional.items()}

    def captions(self) -> Tensor:
        """Returns the number of each picture's caption, (N,) int64: pictures with equal captions have equal ones."""
        return self._small["text_row"].long()

    def shards(self, rows: Tensor) -> Tensor:
        """Returns the number of the shard that holds each row, (B,) int64."""
        return torch.bucketize(rows.contiguous(), self._stops, right=True)

    def names(self, rows: Tensor) -> list[str]:
        """Returns the file names of the pictures in these rows (B,), for messages."""
        names: list[str] = []
        for path in sorted(self._folder.glob("captions-*.jsonl")):
            try:
                names += [parse_json(line)["key"] for line in path.read_bytes().splitlines()]
            except (Malformed, KeyError, TypeError) as error:
                raise self._unusable(f"{path}: cannot be read ({error})") from None
        return [names[row] for row in rows.tolist()]

    def verify(self) -> None:
        """Reads every file that is here. Raises UserError naming the first whose SHA-256 is not the manifest's."""
        here = [self.manifest["rows"]] if self._far else self.manifest["shards"]
        for entry in [*here, self.manifest["text"]]:
            if found := fault(self._folder, entry, contents=True):
                raise self._unusable(found)

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        parts = [(mine, tensor.index_select(0, places).float()) for mine, tensor, places in self._parts(name, rows)]
        if len(parts) == 1:
            return parts[0][1]
        gathered = torch.empty(len(rows), *parts[0][1].shape[1:])
        for mine, values in parts:
            gathered[mine] = values
        return gathered

    def _parts(self, name: str, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields for each tensor that holds some of the rows (B,) which ones, the tensor, and the places in it."""
        here = self._latents.get(name, ())
        if len(here) == 1:
            yield torch.arange(len(rows)), here[0], rows
            return
        shard_of = self.shards(rows)
        for shard in shard_of.unique().tolist():
            mine = torch.nonzero(shard_of == shard).flatten()
            places = rows[mine] - self._starts[shard]
            yield mine, *(self._far.find(shard, name, places) if self._far else (here[shard], places))

    def _open(self, entry: Entry) -> Tensors:
        if found := fault(self._folder, entry, contents=False):
            raise self._unusable(found)
        try:
            tensors: Tensors = load_file(self._folder / entry["name"])  # mapped, not read
            return tensors
        except SafetensorError as error:
            raise self._unusable(f"{self._folder / entry['name']}: cannot be read ({error})") from None

    def _unusable(self, fault: str) -> UserError:
        return UserError(f"{fault}; make the cache again with `lcmlora encode {self._folder.name}`")
