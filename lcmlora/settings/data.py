"""Settings of the data: `data` and `encode`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lcmlora.plugins import SOURCES
from lcmlora.settings.fields import Device, OneOf, PathText, Positive, Seed, Share, Strict


class Range(Strict):
    """Where a number must lie. Without a bound it may be anything."""

    min: float | None = None
    """Lowest value that is kept."""
    max: float | None = None
    """Highest value that is kept."""


def _splits(value: Any) -> Any:
    """One name may stand without brackets, and `all` is every one."""
    if value == "all":
        return ("train", "validation", "test")
    return (value,) if isinstance(value, str) else value


Split = Literal["train", "validation", "test"]
Splits = Annotated[tuple[Split, ...], BeforeValidator(_splits), Field(min_length=1)]


class Data(Strict):
    """The captioned pictures, and which of them are kept (stage `prepare`)."""

    source: Annotated[str, OneOf(SOURCES)]
    """Kind of data set. `folder`: pictures beside .txt captions, or with metadata.jsonl, .csv or .parquet. `parquet`:
    tables. `webdataset`: tar files. `prompts`: a text file with one prompt in each line, of which the teacher draws the
    pictures. `emoji`: the demonstration data of this repository."""
    path: PathText
    """Where the data set is: a folder, a file, or s3://bucket/prefix. Of `prompts`, the text file; of `emoji`, the
    package-lock.json beside node_modules."""
    groups: tuple[str, ...] = ()
    """Groups of emoji, as emojibase names them. Of `emoji` alone."""
    styles: tuple[str, ...] = ()
    """Artists of emoji, as @iconify-json names them. Of `emoji` alone."""
    copies: Positive = 1
    """Random placements of each emoji, or latents that the teacher draws of each prompt. Other sources ignore it."""
    min_side: Positive = 64
    """Shortest side in pixels. Smaller pictures are dropped."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Longest side over shortest side. Longer pictures are dropped."""
    scores: dict[str, Range] = {}
    """Limits for numbers that metadata files, tables or JSON give for a picture, such as an aesthetic score. A picture
    without the number is dropped."""
    near_duplicates: Annotated[int, Field(ge=0, le=8)] | None = None
    """Perceptual hashes (64 bits) of two pictures may differ by this many bits for the later one to be dropped. null:
    only equal files are duplicates."""
    split: Splits = ("train",)
    """Which parts are read where files or folders are named test/, val-0001.tar and the like, or `all`."""
    links: Literal["refuse", "project", "follow"] = "project"
    """Where symbolic links may lead besides the data folder and DVC's cache: nowhere, into the project folder, or
    anywhere."""
    max_rejected: Share = 0.8
    """Share of files, rows and samples that may be damaged or refused before the run stops. Missing captions stop it at
    half in any case, unless this is 1: then the data set has another layout."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.09
    """Share of the captions that are kept from training to choose by: `reference` searches the solvers' settings on
    these. 0: none, and they are searched on the test captions, to the solvers' advantage."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.16
    """Share of the captions that are kept from training and from every choice. `evaluate` reports on these."""
    seed: Seed = 0
    """Seed of the split and of random placements."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation:g} and test {self.test:g} leave no caption for training")
        return self


class Rollouts(Strict):
    """How the teacher makes latents of prompts without pictures: guided DDIM."""

    steps: Positive = 50
    """DDIM steps of a teacher rollout."""
    w: Annotated[float, Field(ge=0)] = 7.5
    """Guidance weight in the papers' convention, c + w (c - u), as in `distill`. A pipeline's guidance_scale is w + 1.
    Source of 7.5: arXiv 2311.05556."""
    states: bool = False
    """Keep all states of a rollout, which `distill.trajectory` needs. The cache grows by as many times as there are
    steps."""


class Encode(Strict):
    """The latent cache (stage `encode`)."""

    batch: Positive
    """Pictures that the VAE encodes at once, or rollouts that the teacher makes at once."""
    rollouts: Rollouts = Rollouts()
    """Teacher rollouts, of data.source `prompts`."""
    shard_mb: Positive = 256
    """Size of a shard of the cache, in megabytes."""
    shards: str | None = None
    """s3://bucket/prefix for the shards. null: they lie in the cache folder."""
    aspect_buckets: bool = False
    """Crop pictures to the nearest of several aspect buckets instead of to a square."""
    bucket_pictures: Positive = 64
    """Fewest pictures of an aspect bucket. A smaller bucket's pictures go to its neighbour."""
    text_cache_mb: Positive = 2000
    """Limit for the embeddings of distinct captions, in megabytes. Above it, text is encoded in every training step."""
    device: Device = "auto"
    """auto: the GPU where there is one."""
