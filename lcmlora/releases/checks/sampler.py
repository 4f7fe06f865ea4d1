"""Drawing with a release in plain diffusers, as its model card says, compared with the adapter's own sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcmlora.adapters.metadata import SCHEDULER, WEIGHTS, Sampler
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.config import Base
from lcmlora.diffusion import solver
from lcmlora.errors import UserError
from lcmlora.releases.bundle import SamplerCheck
from lcmlora.releases.checks.reload import load_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Both draw in fp32 and differ by rounding, which after 8 steps of the miniature is some 1e-6 of the largest value. The
# smallest of the known mistakes, other noise levels at the same timesteps, is 4.5e-3.
_TOLERANCE = 1e-3
_CAPTION = "a caption"  # as in the card
_SIDE = 16  # of the latents, at most: a sampler treats every position alike, and large latents take minutes
_SEED = 0


def timesteps_by_steps(scheduler: Path, sampler: Sampler, steps: Sequence[int]) -> dict[str, list[int]]:
    """Returns the timesteps at which the network is evaluated, by the number of steps.

    Args:
        scheduler: scheduler_config.json of the adapter.
    """
    train_timesteps = LibraryConfig.read(scheduler).integer("num_train_timesteps", 1000)
    return {str(n): solver.student_timesteps(train_timesteps, sampler.grid, n) for n in steps}


def check_sampler(
    release: Path, trained: Path, base: Base, base_folder: Path, sampler: Sampler, steps: Sequence[int]
) -> SamplerCheck:
    """Draws one picture's latents for each number of steps, by the card's lines and by the adapter's own sampler.

    Both start from the same noise and add the same noise between their steps. They draw in fp32, whatever the precision
    of the distillation was, so that they can differ by nothing but rounding.

    Args:
        release: a folder with the released weights and scheduler_config.json.
        trained: the file of the adapter as it was trained.

    Raises:
        UserError: for a number of steps they differ by more than rounding, or diffusers has other timesteps.
    """
    from lcmlora.bases import architecture

    expected = timesteps_by_steps(release / SCHEDULER, sampler, steps)
    side = None if architecture.of_folder(base_folder).resolution == base.resolution else base.resolution
    noise, own = _by_own_sampler(trained, base, base_folder, sampler, steps)
    plain = _by_diffusers(release, base, base_folder, sampler, noise, steps, side)
    errors = {}
    for n in steps:
        latents, timesteps = plain[n]
        if timesteps != expected[str(n)]:
            raise UserError(
                f"{release / SCHEDULER}: in {n} steps plain diffusers evaluates the network at {timesteps}, and the "
                f"adapter's own sampler at {expected[str(n)]}; not released"
            )
        error = ((latents - own[n]).abs().max() / own[n].abs().max()).item()
        if not error < _TOLERANCE:
            raise UserError(
                f"{release}: in {n} steps plain diffusers, used as the card says, draws {error:.1e} of the largest "
                f"value away from the adapter's own sampler, expected less than {_TOLERANCE:g}; not released"
            )
        errors[str(n)] = error
    return SamplerCheck(
        scheduler_config=dict(LibraryConfig.read(release / SCHEDULER)),
        gamma=sampler.gamma,
        guidance_scale=1,
        side=side,
        timesteps=expected,
        error=errors,
    )


def _by_own_sampler(
    trained: Path, base: Base, base_folder: Path, sampler: Sampler, steps: Sequence[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Returns the noise (1, C, h, w) at the start, and the latents (1, C, h, w) by the number of steps."""
    from lcmlora import bases
    from lcmlora.adapters import formats, lora
    from lcmlora.bases import architecture
    from lcmlora.diffusion import sampling

    device = bases.pick_device("auto")
    loaded = bases.load(base_folder.name, base, base_folder, device=device, parts=("network", "text"))
    layers = formats.read(trained, architecture.of_folder(base_folder)).layers
    # Beside the base's weights, as diffusers has them: their sum would be rounded in another way.
    lora.attach(loaded.network, {name: (part.down, part.folded.up) for name, part in layers.items()}, str(trained))
    channels, *sides = loaded.latent_shape
    noise = sampling.initial_noise((channels, *(min(side, _SIDE) for side in sides)), _SEED, [0])
    drawn = {}
    for n in steps:
        drawn[n] = sampling.sample_student(
            loaded,
            sampling.text_conditioning(loaded, [_CAPTION]),
            noise,
            steps=n,
            sampler=sampler,
            fresh=_noise_between_steps(noise, device),
        ).cpu()
    return noise, drawn


def _by_diffusers(
    release: Path,
    base: Base,
    base_folder: Path,
    sampler: Sampler,
    noise: Tensor,
    steps: Sequence[int],
    side: int | None,
) -> dict[int, tuple[Tensor, list[int]]]:
    """Returns the latents (1, C, h, w) and the timesteps of plain diffusers, by the number of steps.

    Args:
        side: of the pictures, in pixels; None for the base's own.
    """
    import diffusers
    import torch

    from lcmlora.bases import diffusers_pipeline, pick_device

    pipeline = diffusers_pipeline.assemble_pipeline(base_folder, release / SCHEDULER, base.variant, torch.float32)
    pipeline = pipeline.to(pick_device("auto"))
    load_weights(pipeline, release / WEIGHTS, base_folder)
    pipeline.scheduler = getattr(diffusers, sampler.scheduler).from_pretrained(release)
    drawn = {}
    for n in steps:
        latents = pipeline(
            _CAPTION,
            num_inference_steps=n,
            guidance_scale=1.0,
            **({"eta": sampler.gamma} if sampler.gamma else {}),
            **({"height": side, "width": side} if side else {}),
            latents=noise,
            generator=_generator(),
            output_type="latent",
        ).images
        drawn[n] = (latents.cpu(), pipeline.scheduler.timesteps.tolist())
    return drawn


def _noise_between_steps(like: Tensor, device: torch.device) -> Callable[[int], Tensor]:
    """Returns the function that gives the noise which diffusers' schedulers draw from `_generator` step by step."""
    import torch

    generator = _generator()
    return lambda _: torch.randn(like.shape, generator=generator).to(device)


def _generator() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(_SEED)
