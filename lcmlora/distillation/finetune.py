"""Styles: a LoRA or a whole checkpoint trained on other pictures by the ordinary diffusion loss.

What an acceleration adapter is to be added to. Cache, loop and checkpoints are those of the distillation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase, write
from lcmlora.config import Tuning
from lcmlora.data.latents.cache import LatentCache
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, write_json
from lcmlora.parallel.ranks import Ranks
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.training.batches import Batch, Batches, chunks, split
from lcmlora.training.execution import AdapterCheck, compiled, recompute
from lcmlora.training.loop import Logger, train
from lcmlora.training.optimization import Optimization

_LOOKS = 4  # noise levels at which each held-out picture is validated


class Denoising:
    """The ordinary diffusion loss (arXiv 2006.11239, eq. 14), uniform in t, in the base's own prediction type."""

    def __init__(self, base: LoadedBase) -> None:
        self.base = base

    def losses(self, batch: Batch, optimization: Optimization | None = None) -> Tensor:
        """Returns the squared error of each sample, (B,); `batch.index` is the timestep."""
        del optimization
        t = batch.index
        schedule = self.base.schedule
        output = self.base.predict(schedule.state(batch.z, batch.noise, t), t, batch.conditioning)
        wanted = schedule.target(batch.z, batch.noise, t)
        return (output - wanted).square().flatten(1).mean(1)


class _Held:
    """The same loss on pictures kept from training, at fixed noise and timesteps."""

    def __init__(self, lesson: Denoising, cache: LatentCache, batches: Batches, rows: Tensor, size: int) -> None:
        self._lesson = lesson
        self._batches: list[Batch] = []
        place = -_LOOKS * len(rows)  # before the stream's beginning: none of these places is trained on
        for part in chunks(cache, rows.repeat(_LOOKS), size):
            self._batches.append(batches.at(range(place, place + len(part)), part))
            place += len(part)

    @torch.no_grad()
    def look(self, step: int, logger: Logger) -> float:
        loss = torch.cat([self._lesson.losses(batch) for batch in self._batches]).mean().item()
        logger.log({"validation_loss": loss}, step)
        return loss


def tune(
    base: LoadedBase,
    cache: LatentCache,
    settings: Tuning,
    scratch: Path,
    out: Path,
    *,
    identity: dict[str, Any],
    logger: Logger,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Trains on the cache's pictures and writes the folder `out`; returns its config.json.

    With a rank in the settings `out` is an adapter in diffusers' format, without one a whole base in diffusers' layout
    whose UNet was trained.

    Args:
        base: with its UNet loaded, bare.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.

    Raises:
        UserError: too few pictures, or a loss that is not finite ten times in a row.
    """
    ranks = ranks or Ranks()
    rows, held = split(cache, settings)
    if len(rows) < settings.batch or not len(held):
        raise UserError(
            f"{base.name}: {len(rows)} pictures to train on are less than a batch of {settings.batch}, or the "
            f"{len(held)} to validate with are none"
        )
    timesteps = len(base.schedule)
    batches = Batches(cache, rows, settings, base.device, ranks, grid=timesteps)
    probe = batches.at(range(-2, 0), rows[:1].expand(2))
    ends = torch.tensor([timesteps - 1, timesteps // 2], device=base.device)
    check = AdapterCheck(base, probe.noise, ends, probe.conditioning)
    parameters = _parameters(base, settings)
    recompute(base.network, settings.checkpointing)
    if settings.compile:
        compiled(base.network)
        check.compiled(batches.size)
    optimization = Optimization(parameters, settings, ranks=ranks, scaled=base.dtype == torch.float16)
    lesson = Denoising(base)
    plain = settings.model_copy(update={"empty_prompts": 0.0})
    state = train(
        "tune",
        lesson,
        optimization,
        batches,
        lambda: _Held(lesson, cache, Batches(cache, held, plain, base.device, grid=timesteps), held, batches.size),
        settings,
        scratch,
        check=check.student,
        agree={"base": identity, "latent_cache": cache.digest},
        logger=logger,
        ranks=ranks,
    )
    facts: dict[str, Any] = {
        "model": base.name,
        "base": identity,
        "data_digest": cache.digest,
        "pictures": len(rows),
        "training": settings.model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "final_loss": state["loss"],
    }
    if ranks.first:
        best = state["best"]
        facts["validation"] = {"pictures": len(held), "loss": state["history"], "best_step": best["step"]}
        optimization.use(best["weights"], torch.float32)
        with atomic_folder(out) as folder:
            if settings.rank is None:
                write(base, folder)
            else:
                tensors, metadata = (
                    lora.state_dict(base.network, base.family.placement),
                    lora.adapter_metadata(settings.rank, base.family.placement),
                )
                lora.save_file(tensors, folder / lora.WEIGHTS, dtype=torch.float32, metadata=metadata)
            write_json(folder / "config.json", facts)
    ranks.wait()
    return facts


def _parameters(base: LoadedBase, settings: Tuning) -> dict[str, nn.Parameter]:
    if settings.rank is not None:
        alpha = settings.alpha or settings.rank
        parameters = lora.inject(base.network, settings.rank, alpha, settings.seed, base.family.placement)
        LoraForwards().install(base.network)
        return parameters
    if base.dtype != torch.float32:
        raise UserError(f"{base.name}: a whole checkpoint is trained in fp32; set precision: fp32")
    base.network.requires_grad_(True)
    return dict(base.network.named_parameters())
