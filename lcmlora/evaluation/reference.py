"""Stage `reference`: all that no adapter changes, drawn once. Teacher, solvers, real pictures, and their features.

The teacher's pictures start from noise of seed S. Everything that is compared with them starts from seed S + 1: the
solvers, the student, and the teacher itself once more, whose distance to the first set is the floor of that comparison.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmlora import sampling
from lcmlora.bases import LoadedBase
from lcmlora.config import Data, Evaluation, digest
from lcmlora.data.sources import Record, fit, open_picture, read_records
from lcmlora.errors import UserError
from lcmlora.evaluation import features as feature_sets
from lcmlora.evaluation.features import Features
from lcmlora.files import atomic_folder, atomic_write, sha256_folder, write_json
from lcmlora.progress import track

AGAIN = "/again"  # ends the key of the teacher's second set
_GALLERY = 4  # real pictures of one caption in the gallery


@dataclass(frozen=True)
class Drawing:
    """Pictures drawn with one method."""

    features: Tensor  # (N, D) fp16
    strip: Tensor  # (R, 3, H, W) uint8, the first `grid_rows` pictures themselves
    seconds: float  # of sampling latents, for one picture


@dataclass(frozen=True)
class Artist:
    """Draws the evaluation's pictures: picture i shows `prompts[i % len(prompts)]` and starts from noise (seed, i)."""

    base: LoadedBase
    features: Features
    settings: Evaluation
    prompts: list[str]

    def draw(
        self,
        key: str,
        method: str,
        steps: int,
        seed: int,
        scratch: Path | None,
        *,
        grid: int = 50,
        gamma: float | None = None,
    ) -> Drawing:
        """Returns `settings.pictures` pictures; the batches found in `scratch` are not drawn again."""
        s = self.settings
        parts = []
        batches = track(range(0, s.pictures, s.batch), key, unit=s.batch)
        for start in batches:
            stored = scratch and scratch / f"{key.replace('/', '-')}-{start:06d}.safetensors"
            if stored and stored.exists():
                parts.append(load_file(stored))
                continue
            part = self._batch(range(start, min(start + s.batch, s.pictures)), method, steps, seed, grid, gamma)
            if stored:
                atomic_write(stored, lambda path, part=part: save_file(part, path))  # type: ignore[misc]
            parts.append(part)
        whole = {name: torch.cat([part[name] for part in parts]) for name in ("features", "strip", "seconds")}
        return Drawing(whole["features"], whole["strip"], whole["seconds"].sum().item() / s.pictures)

    def guidance(self, method: str) -> float:
        return 1.0 if method == sampling.STUDENT else self.settings.guidance_scale

    def _batch(
        self, indices: range, method: str, steps: int, seed: int, grid: int, gamma: float | None
    ) -> dict[str, Tensor]:
        base, guidance = self.base, self.guidance(method)
        conditioning = sampling.text_conditioning(base, [self.prompts[i % len(self.prompts)] for i in indices])
        unconditional = sampling.unconditional(base) if guidance != 1 else None
        noise = sampling.initial_noise(base.latent_shape, seed, indices)
        began = _now(base.device)
        latents = sampling.sample(
            base,
            conditioning,
            noise,
            method=method,
            steps=steps,
            guidance_scale=guidance,
            unconditional=unconditional,
            seed=seed,
            indices=indices,
            grid=grid,
            gamma=gamma,
        )
        seconds = _now(base.device) - began
        decoded = base.decode(latents)
        if not decoded.isfinite().all():  # as bytes they would be black pictures, and a figure
            raise UserError(f"{base.name}: {method} at {steps} steps drew pictures that are not finite ({base.dtype})")
        pictures = decoded.mul(255).round().byte()  # what a file would hold, as the real ones do
        return {
            "features": _vectors(self.features, pictures),
            "strip": pictures[: max(self.settings.grid_rows - indices.start, 0)].cpu().contiguous(),
            "seconds": torch.tensor([seconds], dtype=torch.float64),
        }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _vectors(features: Features, pictures: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, D) fp16 on the CPU."""
    return features(pictures.float() / 255).half().cpu()


def distinct_captions(records: list[Record]) -> list[str]:
    """Returns every caption once, in an order of its own: the first ones, which the grid shows, are a fair sample."""
    return sorted({r.caption for r in records}, key=lambda caption: hashlib.blake2b(caption.encode()).digest())


def square_picture(data: Data, record: Record, resolution: int) -> Image.Image:
    """Returns the picture as training sees it: cropped and resized to `resolution`, RGB."""
    return fit(open_picture(data, record, size=resolution), resolution)[0]


def draw_reference(
    base: LoadedBase, data: Data, settings: Evaluation, pictures: Path, scratch: Path, out: Path
) -> dict[str, Any]:
    """Writes features.safetensors, reference.json and pictures/*.png to the folder `out`; returns reference.json.

    Args:
        base: with all its parts and no adapter.
        pictures: the folder that `prepare` wrote.
        scratch: folder in which a run that was killed left its batches; they are found by a digest of what made them.

    Raises:
        UserError: fewer pictures asked for than the features need, or no validation pictures.
    """
    features = feature_sets.load(settings.features, base.device)
    if settings.pictures <= features.dimensions:
        raise UserError(
            f"evaluation.pictures: {settings.pictures} are too few: a Frechet distance needs more pictures than "
            f"{features.name} has dimensions; set at least {features.dimensions + 1}"
        )
    records = read_records(pictures / "validation.jsonl")
    if not records:
        raise UserError(f"{pictures / 'validation.jsonl'}: holds no pictures to compare with; raise data.validation")
    prompts = distinct_captions(records)[: settings.pictures]
    artist = Artist(base, features, settings, prompts)
    parts = sorted(part.name for part in base.folder.iterdir() if part.is_dir() and not part.name.startswith("."))
    digests = {part: sha256_folder(base.folder / part) for part in parts}
    same = settings.model_dump(include={"pictures", "batch", "guidance_scale", "grid_rows"})
    store = scratch / digest(same, {"base": digests, "dtype": str(base.dtype), "prompts": prompts}, features.name)[:16]

    jobs = _jobs(settings)
    drawn = {
        key: artist.draw(key, method, steps, seed, store / f"seed-{seed}")
        for key, (method, steps, seed) in jobs.items()
    }
    real, gallery = choose_real(records, prompts, settings.pictures)
    tensors = {key: drawing.features for key, drawing in drawn.items()}
    tensors["real"] = _features_of(real, "real pictures", artist, data)
    tensors["gallery"] = _features_of(gallery, "gallery", artist, data)
    facts = {
        "model": base.name,
        "base": {"digest": digests["unet"], "dtype": str(base.dtype).removeprefix("torch.")},
        "settings": settings.model_dump(mode="json"),
        "seeds": {"teacher": settings.seed, "compared": settings.seed + 1},
        "prompts": prompts,
        "seconds_per_picture": {key: drawing.seconds for key, drawing in drawn.items()},
        "network_evaluations": {
            key: sampling.network_evaluations(method, steps, artist.guidance(method))
            for key, (method, steps, _) in jobs.items()
        },
    } | _about_real(real, gallery, settings, features)
    with atomic_folder(out) as folder:
        save_file(tensors, folder / "features.safetensors")
        (folder / "pictures").mkdir()
        for key, drawing in drawn.items():
            _save_strip(drawing.strip, strip_path(folder, key))
        write_json(folder / "reference.json", facts)
    shutil.rmtree(store)
    return facts


def _jobs(settings: Evaluation) -> dict[str, tuple[str, int, int]]:
    """Returns (method, steps, seed) of every set that is drawn."""
    teacher, other = f"teacher@{settings.teacher_steps}", settings.seed + 1
    jobs = {teacher: ("ddim", settings.teacher_steps, settings.seed)}
    jobs[teacher + AGAIN] = ("ddim", settings.teacher_steps, other)
    return jobs | {f"{solver}@{n}": (solver, n, other) for solver in settings.solvers for n in settings.solver_steps}


def _about_real(real: list[Record], gallery: list[Record], settings: Evaluation, features: Features) -> dict[str, Any]:
    missing = None
    if len(real) <= features.dimensions:
        missing = f"{len(real)} real validation pictures are too few for {features.dimensions} dimensions"
    return {
        "features": {"name": features.name, "dimensions": features.dimensions},
        "counts": {"pictures": settings.pictures, "real": len(real), "gallery": len(gallery)},
        "frechet_real_missing": missing,
        "keys": {"real": [r.key for r in real], "gallery": [r.key for r in gallery]},
        "captions": {"real": [r.caption for r in real], "gallery": [r.caption for r in gallery]},
    }


def choose_real(records: list[Record], prompts: list[str], count: int) -> tuple[list[Record], list[Record]]:
    """Returns at most `count` real pictures, spread evenly over the captions, and the gallery of retrieval.

    The gallery holds up to four pictures of every prompt, not among the real ones where the caption has others.
    """
    by_caption: dict[str, list[Record]] = defaultdict(list)
    # By hash, or the first pictures of every caption would all be of the style that comes first in the list.
    for record in sorted(records, key=lambda r: r.sha256):
        by_caption[record.caption].append(record)
    captions = distinct_captions(records)
    rounds = range(max(len(group) for group in by_caption.values()))
    real = [by_caption[c][n] for n in rounds for c in captions if n < len(by_caption[c])][:count]
    taken = {record.key for record in real}
    gallery = []
    for caption in prompts:
        others = [record for record in by_caption[caption] if record.key not in taken]
        gallery += (others or by_caption[caption])[:_GALLERY]
    return real, gallery


def _features_of(records: list[Record], label: str, artist: Artist, data: Data) -> Tensor:
    batch, side = artist.settings.batch, artist.base.resolution
    vectors = []
    for start in track(range(0, len(records), batch), label, unit=batch):
        rows = [np.asarray(square_picture(data, r, side)) for r in records[start : start + batch]]
        vectors.append(_vectors(artist.features, torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)))
    return torch.cat(vectors)


# --- the folder, as others read it ------------------------------------------------------------------------------


def strip_path(folder: Path, key: str) -> Path:
    """Returns where the reference keeps the pictures of this method: `pictures/dpm++@4.png`."""
    return folder / "pictures" / f"{key.replace('/', '-')}.png"


def _save_strip(strip: Tensor, path: Path) -> None:
    """Writes pictures (R, 3, H, W) uint8 below each other into one PNG."""
    Image.fromarray(strip.permute(0, 2, 3, 1).flatten(0, 1).numpy()).save(path)


def read_strip(path: Path) -> list[Image.Image]:
    """Returns the square pictures that stand below each other in such a PNG."""
    with Image.open(path) as opened:
        strip = opened.convert("RGB")
    side = strip.width
    return [strip.crop((0, top, side, top + side)) for top in range(0, strip.height, side)]
