"""Drawing pictures of prompts with an adapter in few steps, and saving them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lcmlora import bases
from lcmlora.adapters import formats, lora
from lcmlora.adapters.combine import check_weights, combine_adapters
from lcmlora.adapters.layer_names import Architecture
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import folders
from lcmlora.bases.base import LoadedBase
from lcmlora.cli.adapters.base_references import BaseReference
from lcmlora.diffusion import sampling
from lcmlora.diffusion.editing import SourceLatents, check_steps
from lcmlora.errors import UserError
from lcmlora.inference.source_picture import SourcePicture
from lcmlora.io.files import atomic_write
from lcmlora.progress import track
from lcmlora.registry.references import AdapterReference

_STRONG = 2.0  # guidance above which colours saturate (the report advises 1 to 2)


@dataclass(frozen=True)
class Request:
    """The pictures to draw."""

    prompts: Sequence[str]
    steps: int = 4
    seed: int = 0
    guidance: float = 1.0  # `guidance_scale` of diffusers; 1 is no guidance
    batch: int = 4
    source: SourcePicture | None = None  # to start from; None starts from noise alone


def load(
    base: BaseReference,
    adapter: AdapterReference,
    style: AdapterReference | None = None,
    style_weight: float = 0.8,
    *,
    device: str = "auto",
    other_base: bool = False,
    unet_only: bool = False,
) -> LoadedBase:
    """Returns the base with the adapter, and the style if there is one, active in its UNet.

    Args:
        other_base: accept an adapter that was made for a base with another digest, such as the one that this base is a
            fine-tune of.
        unet_only: leave out the tensors of text encoders.

    Raises:
        UserError: the base was not fetched, or an adapter does not fit it or was made for another one.
    """
    if not base.folder.is_dir():
        raise UserError(f"{base.folder}: no such base folder; run `lcmlora fetch {base.name}`")
    references = [adapter] if style is None else [adapter, style]
    if not other_base and any(reference.base for reference in references):
        identity = folders.identity(base.settings, base.folder)
        for reference in references:
            folders.check_same_base(reference.shown, reference.base, identity, "this base is")
    layers = _layers(adapter, style, style_weight, base.architecture(), unet_only)
    torch_device = bases.pick_device(device)
    dtype = bases.pick_dtype("auto", torch_device)
    loaded = bases.load(base.name, base.settings, base.folder, device=torch_device, dtype=dtype)
    lora.apply(loaded.network, {name: (layer.down, layer.folded.up) for name, layer in layers.items()}, adapter.shown)
    return loaded


def _layers(
    adapter: AdapterReference, style: AdapterReference | None, weight: float, base: Architecture, unet_only: bool
) -> dict[str, formats.Layer]:
    student = formats.read(adapter.weights, base, unet_only=unet_only)
    if style is None:
        return student.layers
    check_weights("--style-weight", weight)
    return combine_adapters([(formats.read(style.weights, base, unet_only=unet_only), weight), (student, 1.0)]).layers


def check(sampler: Sampler, request: Request) -> None:
    """Checks a request before anything is loaded. Warns of guidance that is too strong.

    Raises:
        UserError: more steps than the adapter has timesteps at the strength, or guidance below 1.
    """
    strength = None if request.source is None else request.source.strength
    check_steps(sampler, request.steps, strength, option="--")
    if not 1 <= request.guidance < math.inf:
        raise UserError(f"--guidance: expected 1 (none) or more, got {request.guidance:g}")
    if request.guidance > _STRONG:
        print(
            f"warning: guidance {request.guidance:g}: the adapter was distilled with guidance and draws with 1 to 2; "
            "above that, colours saturate",
            file=sys.stderr,
        )


def draw(base: LoadedBase, sampler: Sampler, request: Request) -> list[Image.Image]:
    """Returns one picture for each prompt. The i-th uses the noise of (seed, i), whatever the size of a batch.

    Raises:
        UserError: pictures that are not finite.
    """
    unconditional = sampling.unconditional(base) if request.guidance != 1 else None
    source = _encoded(base, request.source) if request.source else None
    pictures: list[Image.Image] = []
    for start in track(range(0, len(request.prompts), request.batch), "draw", unit=request.batch):
        indices = range(start, min(start + request.batch, len(request.prompts)))
        latents = sampling.sample_student(
            base,
            sampling.text_conditioning(base, [request.prompts[i] for i in indices]),
            sampling.initial_noise(base.latent_shape, request.seed, indices),
            steps=request.steps,
            guidance_scale=request.guidance,
            unconditional=unconditional,
            seed=request.seed,
            indices=indices,
            sampler=sampler,
            source=source,
        )
        decoded = base.decode(latents)
        if not decoded.isfinite().all():
            raise UserError(f"{base.name}: drew pictures that are not finite in {base.dtype}")
        pixels = decoded.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures += [Image.fromarray(picture) for picture in pixels]
    return pictures


def _encoded(base: LoadedBase, source: SourcePicture) -> SourceLatents:
    """Returns the picture as latents on the base's device. Raises UserError if they are not finite."""
    side = base.resolution
    latents, _ = base.encode_pictures(source.pixels(side, side))
    if not latents.isfinite().all():
        raise UserError(f"--image: the VAE of {base.name} encodes it as numbers that are not finite")
    mask = source.mask_of_latents(side, side, side // base.latent_shape[-1])
    return SourceLatents(latents, source.strength, None if mask is None else mask.to(base.device))


def save(pictures: Sequence[Image.Image], out: Path, *, grid: bool = False) -> list[Path]:
    """Writes each picture to a file, or all of them to one contact sheet, and returns the files.

    Args:
        out: the first file; the next ones have -1, -2, ... before the ending.
        grid: write a contact sheet.

    Raises:
        UserError: the ending is not that of a picture file.
    """
    check_ending(out)
    if grid:
        pictures = [tile(pictures)]
    paths = [out, *(out.with_stem(f"{out.stem}-{number}") for number in range(1, len(pictures)))]
    for path, picture in zip(paths, pictures, strict=True):
        kind = Image.registered_extensions()[path.suffix.lower()]
        atomic_write(path, lambda p, picture=picture, kind=kind: picture.save(p, format=kind))  # type: ignore[misc]
    return paths


def check_ending(out: Path) -> None:
    """Raises UserError where the ending is not that of a picture file. To be called before anything is drawn."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out: {out}: expected a file that ends in .png, .jpg or .webp")


def tile(pictures: Sequence[Image.Image]) -> Image.Image:
    """Returns a contact sheet of pictures of the same size, nearly square."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet
