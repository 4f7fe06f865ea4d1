"""A release as a ready diffusers pipeline, for those who serve it: the base by digest, the scheduler, the adapter."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lcmlora import bases
from lcmlora.adapters import tensorfile
from lcmlora.adapters.metadata import LATENT_CONSISTENCY, Sampler
from lcmlora.bases import architecture, diffusers_pipeline, fetching, folders, singlefile
from lcmlora.config import Base
from lcmlora.diffusion import noise, sampling
from lcmlora.errors import UserError
from lcmlora.io.parsing import as_object, read_json
from lcmlora.io.private import downloads
from lcmlora.releases import bundle

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 4  # pictures in one pass of the network, whatever the length of a request: what bounds the memory
_SIZE_UNIT = 8  # diffusers' pipelines take no other multiples
_WARM_UNITS = 8  # the side of the picture that warms up, in units


class Abandoned(Exception):
    """Nobody waits for the pictures any more, so they were not drawn to their end."""


@dataclass(frozen=True)
class Pipeline:
    """Draws with a release. Made by `load`; may be called from several threads, which wait for each other."""

    pipeline: Any  # of diffusers, ready
    sampler: Sampler
    provenance: dict[str, Any]
    resolution: int  # pixels
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def size_unit(self) -> int:
        """What the sides of a picture are multiples of, in pixels."""
        return max(_SIZE_UNIT, int(self.pipeline.vae_scale_factor))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int = 4,
        guidance: float = 1.0,
        seed: int | None = 0,
        width: int | None = None,
        height: int | None = None,
        abandoned: Callable[[], bool] | None = None,
    ) -> list[Image.Image]:
        """Returns a picture of each prompt, RGB.

        The i-th starts from the noise (seed, i) and has noise of its own between the steps, so it does not depend on
        the others. It is the picture that `lcmlora generate` draws, but for the rounding of its precision; in half
        precision this includes the rounding of the noise.

        Args:
            steps: 1 to the number of timesteps that the adapter was trained on.
            guidance: the pipelines' convention; 1 is none and costs one pass a step, more costs two.
            seed: None is another one each time.
            width, height: in pixels, multiples of `size_unit`; the release's resolution where they are None.
            abandoned: asked before every step; where it says so nothing more is drawn.

        Raises:
            Abandoned: `abandoned` said so.
            UserError: no text, a number out of its range, or pictures that are not finite.
        """
        width, height = (self.resolution if side is None else side for side in (width, height))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.check(prompts, steps=steps, guidance=guidance, width=width, height=height)
        seed = secrets.randbits(32) if seed is None else seed
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), _BATCH):
            some = dict(enumerate(prompts[start : start + _BATCH], start))
            with self._lock:  # a scheduler counts its steps in itself
                if abandoned is not None and abandoned():
                    raise Abandoned("nobody waits for these pictures any more")
                pixels = self._draw(some, steps, guidance, seed, width, height, abandoned)
            pictures += [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        return pictures

    def check(self, prompts: Sequence[str], *, steps: int, guidance: float, width: int, height: int) -> None:
        """Raises UserError where `__call__` would: no text, or a number out of its range."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(f"prompt: expected text, got {prompt!r}")
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UserError(f"prompt: expected text, got half a surrogate pair in {ascii(prompt)[:100]}")
        if not 1 <= steps <= self.sampler.grid:
            raise UserError(f"steps: expected 1 to {self.sampler.grid}, the timesteps of this adapter, got {steps}")
        if not (guidance >= 1 and math.isfinite(guidance)):
            raise UserError(f"guidance: expected 1 (none) or more, got {guidance:g}")
        for name, side in (("width", width), ("height", height)):
            if side <= 0 or side % self.size_unit:
                raise UserError(f"{name}: expected a positive multiple of {self.size_unit} pixels, got {side}")

    def _draw(
        self,
        prompts: dict[int, str],
        steps: int,
        guidance: float,
        seed: int,
        width: int,
        height: int,
        abandoned: Callable[[], bool] | None,
    ) -> Tensor:
        """Returns (B, 3, height, width) uint8."""
        factor = self.pipeline.vae_scale_factor
        shape = (diffusers_pipeline.network_of(self.pipeline).config.in_channels, height // factor, width // factor)
        latents = sampling.initial_noise(shape, seed, list(prompts))
        generators = [noise.generator(seed, index, 1) for index in prompts]

        def next_noise(_: Any, done: int, *__: Any) -> dict[str, Any]:
            if abandoned is not None and abandoned():
                raise Abandoned("nobody waits for these pictures any more")
            # As sampling.sample_student does it: the noise of every step has a key of its own.
            for index, generator in zip(prompts, generators, strict=True):
                generator.manual_seed(noise.generator(seed, index, done + 2).initial_seed())
            return {}

        pictures = self.pipeline(
            list(prompts.values()),
            num_inference_steps=steps,
            guidance_scale=float(guidance),
            eta=self.sampler.gamma or 0.0,  # dropped by the pipelines where the scheduler is not TCDScheduler
            latents=latents.to(self.pipeline.device, diffusers_pipeline.network_of(self.pipeline).dtype),
            generator=generators,
            width=width,
            height=height,
            output_type="pt",
            callback_on_step_end=next_noise,
        ).images
        if not pictures.isfinite().all():
            raise UserError(f"{self.provenance['model']}: drew pictures that are not finite in {pictures.dtype}")
        return pictures.float().mul(255).round().byte()


def load(
    folder: Path,
    base: Path | None = None,
    device: str = "auto",
    *,
    fuse: bool = False,
    warm: bool = True,
    sources: Path = Path(),
) -> Pipeline:
    """Returns the release in `folder` ready to draw.

    Args:
        folder: a release; its weights, scheduler_config.json and provenance.json are enough.
        base: the folder of its base. By default the one that it was made with, where that is a folder that is here,
            else the hub's at the pinned revision, which is downloaded once, into $LCMLORA_CACHE or ~/.cache/lcmlora.
        device: auto, cpu or cuda. fp32 on a CPU, else bf16, or fp16 where there is no bf16.
        fuse: add the adapter to the base's weights, which saves time at every step and cannot be undone.
        warm: draw something small, so that the first picture takes no longer than the others.
        sources: the folder that a base which the release names by a relative path is looked for in.

    Raises:
        UserError: the weights are not those of the release, its base is not to be had or another one by digest, or
            diffusers cannot load them.
    """
    provenance = _read(folder / bundle.PROVENANCE)
    if (found := bundle.digest(folder)) != provenance["sha256"]:
        raise UserError(
            f"{folder / bundle.WEIGHTS}: expected sha256 {provenance['sha256'][:12]}..., got {found[:12]}...; get the "
            "release again"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda, got {device!r}")
    place = bases.pick_device(device)
    base_folder = _base(folder, provenance["base"], base, sources)
    variant = provenance["base"].get("variant") or folders.variant(base_folder)
    pipeline = diffusers_pipeline.assemble_pipeline(
        base_folder, folder / bundle.SCHEDULER, variant, bases.pick_dtype("auto", place)
    )
    pipeline = pipeline.to(place)
    _add(pipeline, folder, fuse)
    pipeline.watermark = None  # SDXL's, which depends on the packages that happen to be installed
    resolution = provenance.get("resolution") or architecture.of_folder(base_folder).resolution
    if resolution is None:
        raise UserError(f"{folder / bundle.PROVENANCE}: resolution: expected pixels, and {base_folder} does not tell")
    ready = Pipeline(
        pipeline=pipeline,
        sampler=bundle.sampler_of(folder, provenance) or LATENT_CONSISTENCY,
        provenance=provenance,
        resolution=resolution,
    )
    if warm:
        side = _WARM_UNITS * ready.size_unit
        ready("", steps=1, width=side, height=side)
    return ready


def _add(pipeline: Any, folder: Path, fuse: bool) -> None:
    """Loads the adapter, and makes it one with the base's weights if `fuse`."""
    tensorfile.check_harmless(folder / bundle.WEIGHTS)
    try:
        pipeline.load_lora_weights(folder, weight_name=bundle.WEIGHTS, adapter_name="lcm", use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder / bundle.WEIGHTS}: plain diffusers cannot load it: {reason}") from error
    if fuse:
        pipeline.fuse_lora(components=[diffusers_pipeline.family_of(pipeline).network.folder])
        pipeline.unload_lora_weights()


def _base(folder: Path, made_for: dict[str, str | None], wanted: Path | None, sources: Path) -> Path:
    """Returns the folder of the base that the release was made for, by its digest; downloads it if need be."""
    source, revision, digest = (made_for.get(key) for key in ("source", "revision", "digest"))
    if not source or not digest:
        raise UserError(f"{folder / bundle.PROVENANCE}: base: expected a source and a digest, got {made_for}")
    if wanted is not None:
        place = wanted
    elif style := made_for.get("style"):
        raise UserError(
            f"{folder}: was made for {source} with the style {style} summed into it; say where that base's folder is, "
            "which `lcmlora fetch` makes"
        )
    elif (sources / source).is_dir():
        place = sources / source
    elif revision is None or singlefile.names_a_file(source):
        raise UserError(
            f"{folder}: was made for the local base {source} (digest {digest[:12]}...), which is no folder here; say "
            "where the base's folder is"
        )
    else:
        place = _download(source, revision, made_for.get("variant"))
    folders.check_folder(place)
    variant = made_for.get("variant") or folders.variant(place)
    # Resolution and licence play no part in what a base is.
    found = folders.identity(Base(source=str(place), variant=variant, resolution=1, license="unknown"), place)
    mine, theirs = folders.comparable_digests(made_for, found)
    if mine != theirs:
        raise UserError(
            f"{folder}: was made for {source} (digest {str(mine)[:12]}...), and the base in {place} has digest "
            f"{str(theirs)[:12]}...{folders.difference(made_for, found)}; expected the very files that the adapter was "
            "distilled with"
        )
    return place


def _download(source: str, revision: str, variant: str | None) -> Path:
    name = f"{source.replace('/', '--')}@{revision}" + (f".{variant}" if variant else "")
    # Resolution and licence play no part in a download.
    base = Base(source=source, revision=revision, variant=variant, resolution=1, license="unknown")
    return fetching.fetch(name, base, downloads("bases"))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    return as_object(read_json(path), str(path))
