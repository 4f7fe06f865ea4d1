"""Image sets, drawn with one method each and kept as features: what every figure of an evaluation is made of.

Picture i of a set shows `prompts[i % len(prompts)]` and starts from noise (seed, i), whatever batch it is drawn in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmlora.adapters.metadata import LATENT_CONSISTENCY, Sampler
from lcmlora.bases.base import LoadedBase
from lcmlora.config import Data, digest
from lcmlora.data.sources.source import Record, fit, open_picture
from lcmlora.diffusion import sampling
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import REAL, Key, Latency, Quantiles
from lcmlora.evaluation.measures.features import Features
from lcmlora.evaluation.measures.scores import Scorer
from lcmlora.io.files import atomic_write
from lcmlora.parallel.workers import Pool
from lcmlora.progress import track
from lcmlora.stages import VERSIONS

_SCORE = "score/"
FEATURES, CHECK = "features.safetensors", "check.safetensors"  # of a folder with image sets


class NotFinite(UserError):
    """A picture has values that are not finite.

    Converted to bytes it would be a black picture and be counted in the figures.
    """


@dataclass(frozen=True)
class StudentSettings:
    """How a student is drawn with, as SolverSettings are for a solver; see `sampling.sample_student`."""

    steps: int
    sampler: Sampler = LATENT_CONSISTENCY
    guidance_scale: float = 1.0  # the pipelines' convention; 1 is unguided

    @property
    def evaluations(self) -> int:
        """Network evaluations for one picture: a guided step costs two, whatever the batching."""
        return self.steps * (1 if self.guidance_scale == 1 else 2)

    @property
    def text(self) -> str:
        """How a message calls it."""
        return f"the student, {self.steps} step{'' if self.steps == 1 else 's'}"


Settings = StudentSettings | SolverSettings


@dataclass(frozen=True)
class ImageSet:
    """Pictures drawn with the same settings."""

    features: Tensor  # (N, D) fp16
    check: Tensor | None  # (N, E) fp16, by the second features
    thumbnails: Tensor  # (R, 3, H, W) uint8, the first pictures themselves
    seconds: float  # of sampling latents, for one picture of a full batch
    scores: dict[str, Tensor]  # (N,) fp32 by scorer


@dataclass(frozen=True)
class Batch:
    """Pictures of an image set that are drawn at once.

    indices: of the pictures in the set.
    captions: of these pictures.
    rows: number of pictures of the set whose pixels are kept.
    adapter: a digest of what is active in the network besides the base.
    scores: names of the scorers.
    checked: whether there are second features.
    """

    indices: range
    captions: tuple[str, ...]
    settings: Settings
    seed: int
    rows: int
    adapter: str
    scores: tuple[str, ...]
    checked: bool

    def __str__(self) -> str:
        return f"pictures {self.indices.start} to {self.indices.stop - 1} of {self.settings.text}, seed {self.seed}"


Drawers = Pool[Batch, dict[str, Tensor]]  # workers that draw with one base: see sets/drawing.py


@dataclass(frozen=True)
class ImageSets:
    """Draws image sets of one size with one base.

    Args:
        rows: number of pictures whose pixels are kept.
        scratch: folder with the batches of a run that was killed; a digest of what made a batch is in its name.
        identity: what else made them: the base.
        check: second features of the same pictures, where there are any.
        drawers: workers that draw with the same base, features and scorers; None where this process draws.
    """

    base: LoadedBase
    features: Features
    prompts: Sequence[str]
    pictures: int
    batch: int
    rows: int
    scratch: Path | None = None
    identity: str = ""
    scorers: Sequence[Scorer] = ()
    check: Features | None = None
    drawers: Drawers | None = None

    @property
    def shown(self) -> list[str]:
        """The prompt of every picture."""
        return [self.prompts[i % len(self.prompts)] for i in range(self.pictures)]

    def draw(self, label: str, settings: Settings, seed: int, adapter: str = "", *, quiet: bool = False) -> ImageSet:
        """Returns an image set. A batch that is in `scratch` is not drawn again.

        Args:
            label: of the progress bar.
            adapter: a digest of what is active in the network besides the base.
            quiet: show no progress.

        Raises:
            NotFinite: pictures that are not finite.
        """
        if isinstance(settings, StudentSettings):
            plain = asdict(settings) | {"evaluate": VERSIONS["evaluate"]}
        else:
            plain = settings.plain()
        seen_by = [features.name for features in (self.features, self.check) if features]
        made_by = (self.identity, adapter, {"settings": plain, "seed": seed, "rows": self.rows, "features": seen_by})
        scored = [scorer.name for scorer in self.scorers]
        key = digest(*made_by, {"prompts": list(self.prompts), "batch": self.batch, "scores": scored})[:20]
        every, shown = range(self.pictures), self.shown
        batches = [
            Batch(
                indices=every[start : start + self.batch],
                captions=tuple(shown[start : start + self.batch]),
                settings=settings,
                seed=seed,
                rows=self.rows,
                adapter=adapter,
                scores=tuple(scored),
                checked=self.check is not None,
            )
            for start in every[:: self.batch]
        ]
        drawn = track(self._drawn(key, batches), label, total=len(batches), unit=self.batch, quiet=quiet)
        parts = [part for _, part in sorted(drawn, key=lambda each: each[0].indices.start)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        scores = {name.removeprefix(_SCORE): value for name, value in whole.items() if name.startswith(_SCORE)}
        seconds = whole["seconds"].sum().item() / self.pictures
        return ImageSet(whole["features"], whole.get("check"), whole["thumbnails"], seconds, scores)

    def _drawn(self, key: str, batches: Sequence[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Yields every batch with what was drawn, those in `scratch` first.

        Args:
            key: a digest of what makes the set.
        """
        missing = []
        for batch in batches:
            stored = self._stored(key, batch)
            if stored and stored.exists():
                yield batch, load_file(stored)
            else:
                missing.append(batch)
        results = self.drawers.results(missing) if self.drawers else ((batch, self._draw(batch)) for batch in missing)
        for batch, part in results:
            if stored := self._stored(key, batch):
                atomic_write(stored, lambda path, part=part: save_file(part, path))  # type: ignore[misc]
            yield batch, part

    def _stored(self, key: str, batch: Batch) -> Path | None:
        name = f"{key}-{batch.indices.start:06d}-{batch.indices.stop:06d}.safetensors"
        return self.scratch / name if self.scratch else None

    def _draw(self, batch: Batch) -> dict[str, Tensor]:
        return draw_batch(self.base, self.features, self.check, self.scorers, batch)

    def vectors(self, pictures: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> `features` (B, D) and, with second features, `check` (B, E), fp16 on the CPU."""
        return _vectors(pictures, self.features, self.check)

    def real(self, label: str, records: Sequence[Record], data: Data) -> dict[str, Tensor]:
        """Returns the `vectors` of real pictures, as training sees them."""
        vectors = []
        for start in track(range(0, len(records), self.batch), label, unit=self.batch):
            rows = records[start : start + self.batch]
            pixels = np.stack([np.asarray(square_picture(data, row, self.base.resolution)) for row in rows])
            vectors.append(self.vectors(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
        return {name: torch.cat([part[name] for part in vectors]) for name in vectors[0]}

    def keep(
        self,
        folder: Path,
        drawn: Mapping[Key, ImageSet],
        features: dict[str, Tensor],
        check: dict[str, Tensor],
        data: Data,
        records: Sequence[Record],
    ) -> None:
        """Writes the features and the first pictures of every set, and of the real pictures if any, to the folder.

        Args:
            check: by the second features; empty where there are none.
        """
        save_file(features, folder / FEATURES)
        if check:
            save_file(check, folder / CHECK)
        for key, image_set in drawn.items():
            save_thumbnails(image_set.thumbnails, thumbnails_path(folder, key))
        if REAL not in features:
            return
        shown = self.shown[: self.rows]
        save_thumbnails(first_pictures(data, records, shown, self.base.resolution), thumbnails_path(folder, REAL))


def draw_batch(
    base: LoadedBase, features: Features, check: Features | None, scorers: Sequence[Scorer], batch: Batch
) -> dict[str, Tensor]:
    """Draws a batch with what is active in the network, and returns its part of an image set: tensors by name.

    Raises:
        NotFinite: pictures that are not finite.
    """
    captions = list(batch.captions)
    pictures, seconds = draw(base, captions, batch.settings, batch.seed, batch.indices)
    scored = {_SCORE + scorer.name: scorer(pictures.float() / 255, captions).cpu() for scorer in scorers}
    return scored | {
        **_vectors(pictures, features, check),
        "thumbnails": pictures[: max(batch.rows - batch.indices.start, 0)].cpu().contiguous(),
        "seconds": torch.tensor([seconds], dtype=torch.float64),
    }


def _vectors(pictures: Tensor, features: Features, check: Features | None) -> dict[str, Tensor]:
    seen_by = {"features": features} | ({"check": check} if check else {})
    return {name: each(pictures.float() / 255).half().cpu() for name, each in seen_by.items()}


def draw(
    base: LoadedBase, captions: Sequence[str], settings: Settings, seed: int, indices: Sequence[int]
) -> tuple[Tensor, float]:
    """Returns pictures (B, 3, H, W) uint8 on the base's device, and the seconds that sampling their latents took.

    Raises:
        NotFinite: pictures that are not finite.
    """
    conditioning = sampling.text_conditioning(base, captions)
    unconditional = sampling.unconditional(base) if settings.guidance_scale != 1 else None
    noise = sampling.initial_noise(base.latent_shape, seed, indices)
    began = now(base.device)
    if isinstance(settings, SolverSettings):
        latents = sampling.sample_solver(base, conditioning, noise, settings, unconditional=unconditional)
    else:
        latents = sampling.sample_student(
            base,
            conditioning,
            noise,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            unconditional=unconditional,
            seed=seed,
            indices=indices,
            sampler=settings.sampler,
        )
    seconds = now(base.device) - began
    decoded = base.decode(latents)
    if not decoded.isfinite().all():
        method = f"{settings.solver}, {settings.text}" if isinstance(settings, SolverSettings) else settings.text
        raise NotFinite(f"{base.name}: {method}: drew pictures that are not finite ({base.dtype})")
    return decoded.mul(255).round().byte(), seconds  # what a file would hold, as the real ones do


def now(device: torch.device) -> float:
    """Returns a time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def latency(base: LoadedBase, prompts: Sequence[str], settings: Mapping[Key, Settings], repeats: int) -> Latency:
    """Returns how long one picture takes alone, from its caption to its pixels: seconds, as p50 and p95.

    The settings take turns, so that other work of the machine slows all of them; the first turn is not counted.
    """
    taken: dict[Key, list[float]] = {key: [] for key in settings}
    for turn in track(range(repeats + 1), "latency"):
        for key, each in settings.items():
            began = now(base.device)
            draw(base, [prompts[turn % len(prompts)]], each, 0, range(turn, turn + 1))
            taken[key].append(now(base.device) - began)
    quantiles = {key: np.quantile(seconds[1:], (0.5, 0.95)).tolist() for key, seconds in taken.items()}
    return Latency(
        seconds={key: Quantiles(p50=p50, p95=p95) for key, (p50, p95) in quantiles.items()},
        repeats=repeats,
        batch=1,
        device=torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
        threads=torch.get_num_threads(),
    )


def square_picture(data: Data, record: Record, resolution: int) -> Image.Image:
    """Returns the picture as training sees it: cropped and resized to `resolution`, RGB."""
    return fit(open_picture(data, record, size=resolution), resolution)[0]


def first_pictures(data: Data, records: Sequence[Record], captions: Sequence[str], resolution: int) -> Tensor:
    """Returns the first real picture of each caption, (R, 3, H, W) uint8."""
    first = {record.caption: record for record in reversed(records)}
    pixels = [np.asarray(square_picture(data, first[caption], resolution)) for caption in captions]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def thumbnails_path(folder: Path, key: str, group: str = "") -> Path:
    """Returns where a folder keeps the pictures of a set: `pictures/dpm++@4.png`, or `pictures/GROUP/dpm++@4.png`."""
    return folder / "pictures" / group / f"{key.replace('/', '-')}.png"


def save_thumbnails(thumbnails: Tensor, path: Path) -> None:
    """Writes pictures (R, 3, H, W) uint8 below each other into one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(thumbnails.permute(0, 2, 3, 1).flatten(0, 1).numpy()).save(path)


def read_thumbnails(path: Path) -> list[Image.Image]:
    """Returns the square pictures that stand below each other in such a PNG."""
    with Image.open(path) as opened:
        column = opened.convert("RGB")
    side = column.width
    return [column.crop((0, top, side, top + side)) for top in range(0, column.height, side)]
