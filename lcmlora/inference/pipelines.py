"""Loading a release as a diffusers pipeline that is ready to draw: base checked by digest, scheduler, adapter."""

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
from lcmlora.adapters import formats, tensorfile
from lcmlora.adapters.metadata import LATENT_CONSISTENCY, USUAL_STEPS, Sampler
from lcmlora.bases import architecture, diffusers_pipeline, families, fetching, folders, singlefile
from lcmlora.bases.schedule import Schedule
from lcmlora.config import Base
from lcmlora.diffusion import noise, samplers, sampling, solver
from lcmlora.diffusion.editing import SourceLatents, check_steps
from lcmlora.errors import UserError
from lcmlora.evaluation.image_sets import NotFinite
from lcmlora.inference.source_picture import STRENGTH, SourcePicture, fit
from lcmlora.io import faults
from lcmlora.io.files import temporary_folder, write_json
from lcmlora.io.terminal import note
from lcmlora.releases import bundle
from lcmlora.releases.bundle import Provenance

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BATCH = 4  # pictures in one pass of the network, which bounds the memory for requests of any length
_SIZE_UNIT = 8  # pixels; diffusers' pipelines accept only multiples of it
_WARM_UNITS = 8  # side of the warm-up picture, in size units


class Abandoned(Exception):
    """Drawing stopped, because nobody waits for the pictures any more."""


@dataclass(frozen=True)
class _Request:
    """What all pictures of one call have in common."""

    steps: int
    guidance: float
    seed: int
    width: int
    height: int
    source: SourcePicture | None
    control: Image.Image | None  # for the ControlNet, in this size
    control_scale: float
    reference: Image.Image | None  # for the IP-Adapter, in this size
    abandoned: Callable[[], bool] | None


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """Draws with an adapter in a pipeline of diffusers. Several threads may call it; they wait for each other."""

    name: str  # of the model, for messages
    pipeline: Any  # a DiffusionPipeline with the adapter and its scheduler, ready
    sampler: Sampler
    resolution: int  # pixels
    usual_steps: int = USUAL_STEPS  # of a call that does not say how many
    schedule: Schedule  # the base's, on the pipeline's device
    has_controlnet: bool = False
    has_ip_adapter: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def size_unit(self) -> int:
        """Width and height of a picture must be multiples of it, in pixels."""
        return max(_SIZE_UNIT, int(self.pipeline.vae_scale_factor))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int | None = 0,
        width: int | None = None,
        height: int | None = None,
        image: Image.Image | None = None,
        strength: float | None = None,
        mask: Image.Image | None = None,
        control: Image.Image | None = None,
        control_scale: float = 1.0,
        reference: Image.Image | None = None,
        abandoned: Callable[[], bool] | None = None,
    ) -> list[Image.Image]:
        """Returns one RGB picture for each prompt.

        The i-th picture uses the noise of (seed, i) at the start and between the steps, so it does not depend on the
        other pictures. `lcmlora generate` draws the same picture up to rounding; in half precision, this includes the
        rounding of the noise.

        Args:
            prompt: one text or several.
            steps: 1 to the number of timesteps that the adapter was trained on. A step is one network evaluation,
                whatever the strength. None is `usual_steps`: the fewest within the release's gate.
            guidance: `guidance_scale` of diffusers. 1 is no guidance and costs one network pass a step; more costs two.
            seed: None draws with a new random seed each time.
            width, height: in pixels, multiples of `size_unit`; None is the release's resolution.
            image: a picture to draw anew for each prompt, of any size; see SourcePicture.
            strength: of the noise that `image` is given, more than 0 and at most 1; 0.8 by default. It leaves the
                adapter fewer timesteps, which limits `steps`.
            mask: of the size of `image`, white where it is drawn anew.
            control: the picture for the ControlNet, such as edges, of any size. A pipeline with a ControlNet needs one.
            control_scale: `controlnet_conditioning_scale` of diffusers.
            reference: the picture for the IP-Adapter, of any size. A pipeline with an IP-Adapter needs one.
            abandoned: called before every step; drawing stops when it returns True.

        Raises:
            Abandoned: `abandoned` returned True.
            UserError: a prompt is no text, a number is out of its range, the strength leaves no step, pictures do not
                go together, or the drawn ones are not finite.
        """
        steps = self.usual_steps if steps is None else steps
        width, height = (self.resolution if side is None else side for side in (width, height))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        source = _source(image, strength, mask)
        effective = None if source is None else source.strength
        self.check(prompts, steps=steps, guidance=guidance, width=width, height=height, strength=effective)
        _check_given("control", control, "a ControlNet", self.has_controlnet)
        _check_given("reference", reference, "an IP-Adapter", self.has_ip_adapter)
        seed = secrets.randbits(32) if seed is None else seed
        control, reference = (
            None if picture is None else fit(picture.convert("RGB"), height, width) for picture in (control, reference)
        )
        request = _Request(steps, guidance, seed, width, height, source, control, control_scale, reference, abandoned)
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), _BATCH):
            batch = dict(enumerate(prompts[start : start + _BATCH], start))
            with self._lock:  # the scheduler object counts the steps
                if abandoned is not None and abandoned():
                    raise Abandoned
                pixels = self._draw(batch, request)
            pictures += [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        return pictures

    def check(
        self,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        strength: float | None = None,
    ) -> None:
        """Raises UserError where a prompt is no text, or a number is out of its range, as `__call__` does."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(f"prompt: expected text, got {prompt!r}")
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UserError(f"prompt: expected text, got half a surrogate pair in {ascii(prompt)[:100]}")
        check_steps(self.sampler, steps, strength)
        if not (guidance >= 1 and math.isfinite(guidance)):
            raise UserError(f"guidance: expected 1 (none) or more, got {guidance:g}")
        for name, side in (("width", width), ("height", height)):
            if side <= 0 or side % self.size_unit:
                raise UserError(f"{name}: expected a positive multiple of {self.size_unit} pixels, got {side}")

    def _draw(self, prompts: dict[int, str], request: _Request) -> Tensor:
        """Returns pixels, (B, 3, height, width) uint8, of the prompts by their sample index."""
        network = diffusers_pipeline.network_of(self.pipeline)
        factor = self.pipeline.vae_scale_factor
        shape = (network.config.in_channels, request.height // factor, request.width // factor)
        initial = sampling.initial_noise(shape, request.seed, list(prompts)).to(self.pipeline.device)
        latents, source, timesteps = initial, None, None
        if request.source is not None:
            source = self._encoded(request.source, request.height, request.width)
            grid, train_timesteps = self.sampler.grid, len(self.schedule)
            timesteps = solver.student_timesteps(train_timesteps, grid, request.steps, source.strength)
            latents = source.noisy(initial, self.schedule, timesteps[0], most=timesteps[0] == train_timesteps - 1)
        generators = [noise.generator(request.seed, index, 1) for index in prompts]

        def after_step(_: Any, done: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if request.abandoned is not None and request.abandoned():
                raise Abandoned
            # As in sampling.sample_student: each step has its own key for the noise.
            for index, generator in zip(prompts, generators, strict=True):
                generator.manual_seed(noise.generator(request.seed, index, done + 2).initial_seed())
            if source is None or timesteps is None:
                return {}
            following = timesteps[done + 1] if done + 1 < request.steps else None
            drawn = tensors["latents"]
            return {"latents": source.keep(drawn.float(), initial, self.schedule, following).to(drawn.dtype)}

        control: dict[str, Any] = {}
        if request.control is not None:
            control = {"image": request.control, "controlnet_conditioning_scale": request.control_scale}
        if request.reference is not None:
            control["ip_adapter_image"] = [[request.reference] * len(prompts)]
        # A list of timesteps takes the place of a number of steps: diffusers' own pipelines for img2img and inpainting
        # would drop some of the steps.
        pictures = self.pipeline(
            list(prompts.values()),
            num_inference_steps=request.steps,
            timesteps=timesteps,
            guidance_scale=float(request.guidance),
            eta=self.sampler.gamma or 0.0,  # dropped by the pipelines where the scheduler is not TCDScheduler
            latents=latents.to(network.dtype),
            generator=generators,
            width=request.width,
            height=request.height,
            output_type="pt",
            callback_on_step_end=after_step,
            **control,
        ).images
        if not pictures.isfinite().all():
            raise NotFinite(f"{self.name}: drew pictures that are not finite in {pictures.dtype}")
        return pictures.float().mul(255).round().byte()

    def _encoded(self, source: SourcePicture, height: int, width: int) -> SourceLatents:
        """Returns the picture as latents, on the pipeline's device. Raises UserError if they are not finite."""
        import torch

        vae, family = self.pipeline.vae, diffusers_pipeline.family_of(self.pipeline)
        precision = vae.dtype
        # As diffusers does: SDXL's VAE gives numbers that fp16 does not hold.
        upcast = precision == torch.float16 and bool(vae.config.get("force_upcast"))
        if upcast:
            vae.to(torch.float32)
        with torch.no_grad():
            latents, _ = family.encode_pictures(vae, source.pixels(height, width))
        if upcast:
            vae.to(precision)
        if not latents.isfinite().all():
            raise UserError(f"image: the VAE of {self.name} encodes it as numbers that are not finite")
        mask = source.mask_of_latents(height, width, self.pipeline.vae_scale_factor)
        device = self.pipeline.device
        return SourceLatents(latents.to(device), source.strength, None if mask is None else mask.to(device))


@dataclass(frozen=True, kw_only=True)
class Pipeline(Drawer):
    """Draws with a release. Made by `load`."""

    provenance: Provenance


def _check_given(name: str, picture: Image.Image | None, part: str, has_part: bool) -> None:
    """Raises UserError where a picture is given for a part that the pipeline lacks, or is missing for one it has."""
    if picture is not None and not has_part:
        raise UserError(f"{name}: expected a pipeline that was loaded with {part}")
    if picture is None and has_part:
        raise UserError(f"{name}: expected a picture for the {part.partition(' ')[2]}")


def _source(image: Image.Image | None, strength: float | None, mask: Image.Image | None) -> SourcePicture | None:
    """Returns the picture to start from, None if there is none. Raises UserError if it is missing."""
    if image is None:
        for name, value in (("strength", strength), ("mask", mask)):
            if value is not None:
                raise UserError(f"{name}: expected `image`, the picture that it is for")
        return None
    return SourcePicture(image, STRENGTH if strength is None else strength, mask)


def load(
    folder: Path,
    base: Path | None = None,
    device: str = "auto",
    *,
    fuse: bool = False,
    warm: bool = True,
    sources: Path = Path(),
    controlnet: Path | None = None,
) -> Pipeline:
    """Returns the release in `folder` ready to draw.

    Args:
        folder: a release; its weights, scheduler_config.json and provenance.json are enough.
        base: the folder of its base. By default the base that the adapter was distilled with: a local folder, or a
            model of the hub at the pinned revision, which is downloaded once to $LCMLORA_CACHE or ~/.cache/lcmlora.
        device: auto, cpu or cuda. The precision is fp32 on a CPU, else bf16, or fp16 where the GPU has no bf16.
        fuse: add the adapter to the base's weights, which makes every step faster and cannot be undone.
        warm: draw a small picture, so that the first real one takes no longer than the others.
        sources: the folder that a relative path of the base is relative to.
        controlnet: the folder of a ControlNet of the same family, as diffusers saves it; its picture is `control` of
            every call.

    Raises:
        UserError: the weights are not those of the release, its base is missing or has another digest, or diffusers
            cannot load them or the ControlNet.
    """
    provenance = Provenance.read(folder / bundle.PROVENANCE)
    if (found := bundle.digest(folder)) != provenance.sha256:
        raise UserError(
            f"{folder / bundle.WEIGHTS}: expected sha256 {provenance.sha256[:12]}..., got {found[:12]}...; download "
            "the release again"
        )
    torch_device = _device(device)
    base_folder = _base_folder(folder, provenance.base, base, sources)
    variant = provenance.base.get("variant") or folders.variant(base_folder)
    pipeline = _assembled(base_folder, folder / bundle.SCHEDULER, variant, folder, torch_device, fuse, controlnet)
    resolution = provenance.resolution or architecture.of_folder(base_folder).resolution
    if resolution is None:
        raise UserError(f"{folder / bundle.PROVENANCE}: resolution: is missing, and {base_folder} has none")
    ready = Pipeline(
        name=provenance.model,
        pipeline=pipeline,
        sampler=bundle.sampler_of(folder, provenance.plain()) or LATENT_CONSISTENCY,
        provenance=provenance,
        resolution=resolution,
        usual_steps=provenance.recommended_steps or USUAL_STEPS,
        schedule=diffusers_pipeline.family_of(pipeline).schedule(base_folder, resolution)[0].to(torch_device),
        has_controlnet=controlnet is not None,
    )
    if warm:
        _warm(ready)
    return ready


def load_adapter(
    shown: str,
    weights: Path,
    base: Path | None = None,
    device: str = "auto",
    *,
    made_for: dict[str, str | None] | None = None,
    resolution: int | None = None,
    sampler: Sampler | None = None,
    warm: bool = True,
    sources: Path = Path(),
    controlnet: Path | None = None,
) -> Drawer:
    """Returns an adapter that is no release ready to draw: what `distill` wrote, or another program's LoRA.

    Args:
        shown: the adapter's name, for messages.
        weights: a .safetensors file in any spelling, perhaps with its scheduler_config.json beside it.
        base: the folder of the base; needed where `made_for` does not name it.
        made_for: the identity of the base that the adapter was made for, by whose digest the base is checked.
        resolution: of the pictures, in pixels; the base's by default.
        sampler: that of an LCM-LoRA by default, which is noted.
        device, warm, sources, controlnet: as for `load`.

    Raises:
        UserError: the base is not named, is missing or has another digest; the adapter does not fit it; or diffusers
            cannot load them or the ControlNet.
    """
    torch_device, made_for = _device(device), made_for or {}
    if made_for.get("digest"):
        base_folder = _base_folder(weights, made_for, base, sources)
    elif base is None:
        raise UserError(f"{shown}: does not say which base it was made for; name the base's folder")
    else:
        folders.check_folder(base)
        base_folder = base
    layers = architecture.of_folder(base_folder)
    if (resolution := resolution or layers.resolution) is None:
        raise UserError(f"{shown}: says no resolution, and {base_folder} has none")
    schedule, base_scheduler = families.of_folder(base_folder).schedule(base_folder, resolution)
    if sampler is None:
        note(f"note: {shown} has no sampler settings; it is drawn with as an LCM-LoRA")
        sampler = LATENT_CONSISTENCY
    with temporary_folder() as work:
        folder = Path(work)
        formats.convert(weights, folder / bundle.WEIGHTS, formats.DIFFUSERS, layers)
        write_json(folder / bundle.SCHEDULER, samplers.scheduler_config(base_scheduler, sampler))
        variant = made_for.get("variant") or folders.variant(base_folder)
        pipeline = _assembled(base_folder, folder / bundle.SCHEDULER, variant, folder, torch_device, False, controlnet)
    ready = Drawer(
        name=shown,
        pipeline=pipeline,
        sampler=sampler,
        resolution=resolution,
        schedule=schedule.to(torch_device),
        has_controlnet=controlnet is not None,
    )
    if warm:
        _warm(ready)
    return ready


def _device(name: str) -> torch.device:
    """Returns torch's device. Raises UserError for another name, or where there is no GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda, got {name!r}")
    return bases.pick_device(name)


def _assembled(
    base: Path,
    scheduler: Path,
    variant: str | None,
    adapter: Path,
    device: torch.device,
    fuse: bool,
    controlnet: Path | None,
) -> Any:
    """Returns the base on the device as a pipeline of diffusers, with its adapter, scheduler and ControlNet."""
    pipeline = diffusers_pipeline.assemble_pipeline(base, scheduler, variant, bases.pick_dtype("auto", device))
    pipeline = pipeline.to(device)
    _load_adapter(pipeline, adapter, fuse)
    if controlnet is not None:
        pipeline = diffusers_pipeline.with_controlnet(pipeline, controlnet).to(device)
    pipeline.watermark = None  # of SDXL, which is drawn only where a certain package is installed
    return pipeline


def _warm(ready: Drawer) -> None:
    """Draws a small picture."""
    side = _WARM_UNITS * ready.size_unit
    control = Image.new("RGB", (side, side)) if ready.has_controlnet else None
    ready("", steps=1, width=side, height=side, control=control)


def _load_adapter(pipeline: Any, folder: Path, fuse: bool) -> None:
    """Loads the adapter into the pipeline. With `fuse`, its effect is added to the base's weights."""
    tensorfile.check_harmless(folder / bundle.WEIGHTS)
    try:
        pipeline.load_lora_weights(folder, weight_name=bundle.WEIGHTS, adapter_name="lcm", use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder / bundle.WEIGHTS}: plain diffusers cannot load it: {faults.chain(error)}") from error
    if fuse:
        pipeline.fuse_lora(components=[diffusers_pipeline.family_of(pipeline).network.folder])
        pipeline.unload_lora_weights()


def _base_folder(folder: Path, made_for: dict[str, str | None], given: Path | None, sources: Path) -> Path:
    """Returns the folder of the release's base, which is downloaded if necessary and checked by its digest.

    Args:
        made_for: `base` of the release's provenance.
        given: the folder that the caller names.
    """
    source, revision, digest = (made_for.get(key) for key in ("source", "revision", "digest"))
    if not source or not digest:
        raise UserError(f"{folder / bundle.PROVENANCE}: base: expected a source and a digest, got {made_for}")
    if given is not None:
        base_folder = given
    elif style := made_for.get("style"):
        raise UserError(
            f"{folder}: was made for {source} with the style {style} added to it; name the folder of that base, which "
            "`lcmlora fetch` makes"
        )
    elif (sources / source).is_dir():
        base_folder = sources / source
    elif revision is None or singlefile.names_a_file(source):
        raise UserError(
            f"{folder}: was made for the local base {source} (digest {digest[:12]}...), which is not here; name the "
            "base's folder"
        )
    else:
        base_folder = fetching.fetch_pinned(source, revision, made_for.get("variant"))
    folders.check_folder(base_folder)
    variant = made_for.get("variant") or folders.variant(base_folder)
    # Resolution and licence are no part of a base's identity.
    base = Base(source=str(base_folder), variant=variant, resolution=1, license="unknown")
    found = folders.identity(base, base_folder)
    expected_digest, found_digest = folders.comparable_digests(made_for, found)
    if expected_digest != found_digest:
        raise UserError(
            f"{folder}: was made for {source} (digest {str(expected_digest)[:12]}...), and the base in {base_folder} "
            f"has digest {str(found_digest)[:12]}...{folders.difference(made_for, found)}; expected the very files "
            "that the adapter was distilled with"
        )
    return base_folder
