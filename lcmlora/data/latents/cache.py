"""The latent cache: all data that training reads, made by the stage `encode` (encode.py).

A cache is a folder:
    manifest.json              counts, shapes, and the size and SHA-256 of every other file that training reads
    shard-00000.safetensors    latent_mean, latent_logvar (N, C, h, w) fp16; orig_size (N, 2) height and width of the
                               picture, crop_tl (N, 2) top and left of the crop, text_row (N,) the caption's row in
                               text.safetensors, all int32; key (N, 16) uint8, the first bytes of the picture's
                               SHA-256. rollouts.py says what they are for prompts without pictures.
                               With `encode.shards` these files are in a bucket (remote_shards.py), and the folder has
    rows.safetensors           all their tensors except latents and states
    text.safetensors           one row for each distinct caption: embeddings, or, if these would be large (texts.py),
                               `token_ids` (N, T) int32 and `token_ids_2` for a second text encoder;
                               and `unconditional.*`, one row
    captions-00000.jsonl       key and caption of each row of the shard, for people
All latents of a shard have one shape. With aspect buckets the manifest lists the `buckets` (height and width in
pixels), and each shard says which one it is of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field, ValidationError, field_serializer, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcmlora import config
from lcmlora.bases import families
from lcmlora.bases.families import Conditioning
from lcmlora.data.latents.remote_shards import CacheFile, RemoteShards, ShardFile
from lcmlora.data.latents.sampling_plan import SamplingPlan
from lcmlora.errors import UserError
from lcmlora.io.documents import Document
from lcmlora.io.files import sha256_file
from lcmlora.io.parsing import JsonObject, Malformed, parse_json
from lcmlora.io.remote import Files

VERSION = 1
MANIFEST = "manifest.json"
TEXT = "text.safetensors"
ROWS = "rows.safetensors"
UNCONDITIONAL = "unconditional."  # prefix of the names of unconditional embeddings
TOKEN_IDS = "token_ids"  # token_ids_2 and so on for further text encoders

Tensors = dict[str, Tensor]
Size = Annotated[tuple[config.Positive, config.Positive], Field(strict=False)]  # height and width; a list in JSON


def fault(folder: Path, file: CacheFile, *, contents: bool) -> str | None:
    """Returns what is wrong with a file of a cache, or None; `contents` compares its SHA-256, too."""
    path = folder / file.name
    if not path.is_file():
        return f"{path}: is missing"
    if path.stat().st_size != file.bytes:
        return f"{path}: has {path.stat().st_size} bytes and the manifest says {file.bytes}"
    if contents and sha256_file(path) != file.sha256:
        return f"{path}: is damaged, its SHA-256 is not the manifest's"
    return None


class TextFile(CacheFile):
    """text.safetensors, as the manifest lists it.

    captions: how many it has.
    cut: how many of them have more tokens than the text encoder reads.
    """

    captions: int | None = None
    cut: int | None = None


class Manifest(Document):
    """The content of manifest.json.

    kind: the base's family.
    captions: distinct ones.
    fingerprint: SHA-256 of what made the latents: weights, precision, scaling.
    at: s3://bucket/prefix of the shards, if they are not in the folder; `rows` then lists rows.safetensors.
    buckets: height and width in pixels of each aspect bucket; without it all pictures are squares of `resolution`.
    rollouts: how the teacher drew the latents, if there were no pictures.
    """

    version: int
    model: str = ""
    kind: str
    pictures: config.Positive
    captions: int | None = None
    resolution: config.Positive
    latent_shape: Annotated[tuple[config.Positive, config.Positive, config.Positive], Field(strict=False)]
    fingerprint: str = ""
    shards: Annotated[list[ShardFile], Field(min_length=1)]
    text: TextFile
    rows: CacheFile | None = None
    at: str | None = None
    buckets: Annotated[list[Size], Field(min_length=1)] | None = None
    rollouts: config.Rollouts | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.at and not self.rows:
            raise ValueError(f"rows: is missing, and the shards are at {self.at}")
        if max(shard.bucket for shard in self.shards) >= len(self.buckets or [()]):
            raise ValueError("shards: one is of a bucket that is not among buckets")
        return self

    @field_serializer("rollouts")
    def _with_defaults(self, rollouts: config.Rollouts | None) -> JsonObject | None:
        return None if rollouts is None else rollouts.model_dump()  # also defaults: they may be others later

    def plain(self) -> JsonObject:
        """Returns the manifest as it is in its file: without the parts that this cache does not have."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


def parse_manifest(content: bytes) -> Manifest:
    """Returns the manifest. Raises Malformed if it has another version, or is not what a manifest must be."""
    value = parse_json(content)
    version = value.get("version") if isinstance(value, dict) else "none"
    if version != VERSION:
        raise Malformed(f"version {version}, expected {VERSION}")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Malformed(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}") from None


def token_ids_name(encoder: int) -> str:
    """Returns the name of the tensor with the token ids for a text encoder; encoders count from 0."""
    return f"{TOKEN_IDS}_{encoder + 1}" if encoder else TOKEN_IDS


class LatentCache:
    """A cache opened for training. Rows are numbered through all shards.

    Attributes:
        manifest: the content of manifest.json.
        digest: SHA-256 of that file.
        latent_shape: (C, h, w) of the base's square.
        rollouts: how the teacher drew the latents; None if they are of pictures.
        buckets: height and width in pixels of each aspect bucket.
        embed: makes conditioning from the token ids (B, T) int64 of each text encoder. A cache that is `tokenized`
            needs it; whoever opens the cache sets it.
    """

    def __init__(
        self, folder: Path, *, ram_bytes: int = 4 << 30, shards: Path | None = None, budget: int = 50 << 30
    ) -> None:
        """Opens the cache in `folder`; latents of up to `ram_bytes` are read into memory, larger ones are mapped.

        Args:
            shards: a folder for shards that are downloaded from a bucket; by default beside the cache.
            budget: bytes that this folder may hold.

        Raises:
            UserError: there is no manifest, or a file that it lists is missing, unreadable or of the wrong size.
        """
        self._folder = folder
        self.manifest, self.digest = self._read_manifest()
        manifest = self.manifest
        self.latent_shape = manifest.latent_shape
        self.rollouts = manifest.rollouts
        self.buckets = manifest.buckets or [(manifest.resolution, manifest.resolution)]
        self._bucket_of_shard = torch.tensor([shard.bucket for shard in manifest.shards])
        self._latents: dict[str, list[Tensor]] = {}  # one tensor for each shard, or one for all of them
        self._remote: RemoteShards | None = None
        if manifest.at and manifest.rows:
            beside = folder.with_name(f".{folder.name}.shards")
            self._remote = RemoteShards(Files(manifest.at, "encode.shards"), manifest.shards, shards or beside, budget)
            self._rows = self._open(manifest.rows)
            lengths = torch.tensor([shard.pictures for shard in manifest.shards])
        else:
            tensors = [self._open(shard) for shard in manifest.shards]
            self._rows = {name: torch.cat([s[name] for s in tensors]) for name in ("orig_size", "crop_tl", "text_row")}
            large = ("latent_mean", "latent_logvar", *(["states"] if self.rollouts and self.rollouts.states else []))
            self._latents = {name: [s[name] for s in tensors] for name in large}
            lengths = torch.tensor([len(part) for part in self._latents["latent_mean"]])
        self._stops = lengths.cumsum(0)
        self._starts = self._stops - lengths
        if self._latents and len(self.buckets) == 1 and sum(shard.bytes for shard in manifest.shards) <= ram_bytes:
            self._latents = {name: [torch.cat(parts)] for name, parts in self._latents.items()}
        self._family = families.by_name(manifest.kind)
        text = self._open(manifest.text)
        self._unconditional = {n.removeprefix(UNCONDITIONAL): v for n, v in text.items() if n.startswith(UNCONDITIONAL)}
        self._embeddings = {n: v for n, v in text.items() if not n.startswith((UNCONDITIONAL, TOKEN_IDS))}
        self._token_ids = [text[name] for name in map(token_ids_name, range(len(text))) if name in text]
        self.embed: Callable[[list[Tensor]], Conditioning] | None = None
        if len(self) != manifest.pictures or len(self) != len(self._rows["text_row"]):
            raise self._unusable(f"{folder}: has {len(self)} pictures and the manifest says {manifest.pictures}")

    def _read_manifest(self) -> tuple[Manifest, str]:
        """Returns the manifest and the SHA-256 of its file."""
        path = self._folder / MANIFEST
        try:
            content = path.read_bytes()
            return parse_manifest(content), hashlib.sha256(content).hexdigest()
        except OSError as error:
            raise self._unusable(f"{path}: cannot be read ({error.strerror})") from None
        except Malformed as error:
            raise self._unusable(f"{path}: {error}") from None

    def __len__(self) -> int:
        return int(self._stops[-1])

    @property
    def tokenized(self) -> bool:
        """Whether the captions are kept as token ids, from which `embed` makes the conditioning."""
        return bool(self._token_ids)

    def follow_plan(self, plan: SamplingPlan, batch: int, window: int) -> None:
        """Prepares for a run by this plan. If the shards are in a bucket, raises as RemoteShards.follow_plan does."""
        if self._remote:
            self._remote.follow_plan(plan, batch, window)

    def advance_to(self, step: int) -> None:
        """Makes the shards of this step of the plan readable. Raises as RemoteShards.advance_to does."""
        if self._remote:
            self._remote.advance_to(step)

    def bucket(self, rows: Tensor) -> Tensor:
        """Returns the number of each row's aspect bucket, (B,) int64."""
        return self._bucket_of_shard[self.shards(rows)]

    def bucket_of_shard(self, number: int) -> int:
        """Returns the number of a shard's aspect bucket."""
        return int(self._bucket_of_shard[number])

    def latents(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance (B, C, h, w) fp32 of the rows (B,) int64, which are of one aspect bucket."""
        return self._gather("latent_mean", rows), self._gather("latent_logvar", rows)

    def states(self, rows: Tensor, index: Tensor) -> Tensor:
        """Returns two neighbouring states of the teacher rollouts in the rows (B,) int64, as (2, B, C, h, w) fp32: the
        state at the solver timestep with number `index` (B,) int64, and the one after the teacher's step from there."""
        numbers = torch.stack([index + 1, index])
        pairs = torch.empty(2, len(rows), *self.latent_shape)
        for selected, states, indices in self._parts("states", rows):
            pairs[:, selected] = states[indices, numbers[:, selected]].float()
        return pairs

    def conditioning(self, rows: Tensor) -> Conditioning:
        """Returns the network's conditioning for the rows (B,) int64, fp32: the captions' embeddings, and the
        micro-conditioning of families that have one."""
        text_rows = self._rows["text_row"][rows]
        conditioning = {name: value.index_select(0, text_rows).float() for name, value in self._embeddings.items()}
        if self._token_ids:
            assert self.embed, "a cache of token ids needs text encoders"
            conditioning = self.embed([ids.index_select(0, text_rows).long() for ids in self._token_ids])
        targets = torch.tensor(self.buckets)[self.bucket(rows)]
        return conditioning | self._family.micro_conditioning(
            self._rows["orig_size"][rows], self._rows["crop_tl"][rows], targets
        )

    def unconditional(self) -> Conditioning:
        """Returns the unconditional embedding as one row, fp32, without micro-conditioning."""
        return {name: value.float() for name, value in self._unconditional.items()}

    def captions(self) -> Tensor:
        """Returns the number of each picture's caption, (N,) int64: pictures with equal captions have equal ones."""
        return self._rows["text_row"].long()

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
        """Reads every file of the folder. Raises UserError with the first whose SHA-256 is not the manifest's."""
        manifest = self.manifest
        rows_or_shards: list[CacheFile] = [manifest.rows] if manifest.at and manifest.rows else [*manifest.shards]
        for file in [*rows_or_shards, manifest.text]:
            if reason := fault(self._folder, file, contents=True):
                raise self._unusable(reason)

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        parts = [(selected, tensor.index_select(0, i).float()) for selected, tensor, i in self._parts(name, rows)]
        if len(parts) == 1:
            return parts[0][1]
        gathered = torch.empty(len(rows), *parts[0][1].shape[1:])
        for selected, values in parts:
            gathered[selected] = values
        return gathered

    def _parts(self, name: str, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields, for each tensor that has some of the rows (B,): their indices in `rows`, the tensor, and their
        indices in the tensor."""
        tensors = self._latents.get(name, ())
        if len(tensors) == 1:
            yield torch.arange(len(rows)), tensors[0], rows
            return
        shard_of_row = self.shards(rows)
        for shard in shard_of_row.unique().tolist():
            selected = torch.nonzero(shard_of_row == shard).flatten()
            indices = rows[selected] - self._starts[shard]
            yield selected, *(self._remote.find(shard, name, indices) if self._remote else (tensors[shard], indices))

    def _open(self, file: CacheFile) -> Tensors:
        if reason := fault(self._folder, file, contents=False):
            raise self._unusable(reason)
        try:
            tensors: Tensors = load_file(self._folder / file.name)  # mapped, not read
            return tensors
        except SafetensorError as error:
            raise self._unusable(f"{self._folder / file.name}: cannot be read ({error})") from None

    def _unusable(self, reason: str) -> UserError:
        return UserError(f"{reason}; make the cache again with `lcmlora encode {self._folder.name}`")
