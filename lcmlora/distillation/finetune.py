"""Style LoRAs and fine-tuned checkpoints: training on other pictures by the ordinary diffusion loss.

An acceleration adapter is added to them afterwards. The latent cache, the training loop and the checkpoints are those
of the distillation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lcmlora.adapters import lora
from lcmlora.adapters.metadata import FACTS, Tuned, Validated
from lcmlora.bases.base import LoadedBase, save_base
from lcmlora.bases.folders import Identity
from lcmlora.config import Tuning
from lcmlora.data.latents.cache import LatentCache
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder
from lcmlora.parallel.ranks import Ranks
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.training.batches import Batch, Batches, chunks, split_rows
from lcmlora.training.execution import AdapterCheck, compile_network, recompute
from lcmlora.training.loop import Logger, Trainable, train
from lcmlora.training.optimization import Optimization

_NOISE_LEVELS = 4  # at which each validation picture is measured


class Denoising(Trainable):
    """The ordinary diffusion loss (arXiv 2006.11239, eq. 14), uniform in t, in the base's own prediction type."""

    def __init__(self, base: LoadedBase) -> None:
        self.base = base

    def losses(self, batch: Batch, optimization: Optimization | None = None) -> Tensor:
        """Returns the squared error of each sample, (B,); `batch.index` is the timestep."""
        del optimization
        t = batch.index
        schedule = self.base.schedule
        output = self.base.predict(schedule.state(batch.z, batch.noise, t), t, batch.conditioning)
        return (output - schedule.target(batch.z, batch.noise, t)).square().flatten(1).mean(1)


class _DenoisingValidation:
    """The same loss on the validation pictures, with noise and timesteps that are the same each time."""

    def __init__(self, denoising: Denoising, cache: LatentCache, batches: Batches, rows: Tensor, size: int) -> None:
        self._denoising = denoising
        self._batches: list[Batch] = []
        first = -_NOISE_LEVELS * len(rows)  # negative sample indices: no training sample has their random numbers
        for part in chunks(cache, rows.repeat(_NOISE_LEVELS), size):
            self._batches.append(batches.at(range(first, first + len(part)), part))
            first += len(part)

    @torch.no_grad()
    def validate(self, step: int, logger: Logger) -> float:
        loss = torch.cat([self._denoising.losses(batch) for batch in self._batches]).mean().item()
        logger.log({"validation_loss": loss}, step)
        return loss


def train_variation(
    base: LoadedBase,
    cache: LatentCache,
    settings: Tuning,
    scratch: Path,
    out: Path,
    *,
    identity: Identity,
    logger: Logger,
    ranks: Ranks | None = None,
) -> Tuned | None:
    """Trains a style LoRA or a whole checkpoint, writes the folder `out` and returns its config.json.

    With settings.rank the folder holds a LoRA, without it a diffusers folder, a base of its own. All processes of a run
    call this with the same arguments. The first one validates, logs and writes; the others return None.

    Args:
        base: with its network, without an adapter; afterwards it has what was trained.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        identity: of the base, for config.json.

    Raises:
        UserError: the base is in half precision and is to be trained as a whole, there are too few pictures, or the
            loss is not finite ten times in a row.
    """
    ranks = ranks or Ranks()
    rows, validation_rows = _rows(base, cache, settings)
    timesteps = len(base.schedule)
    batches = Batches(cache, rows, settings, base.device, ranks, grid=timesteps)
    check = _check(base, batches.at(range(-2, 0), rows[:1].expand(2)))
    parameters = _parameters(base, settings)
    recompute(base.network, settings.checkpointing)
    if settings.compile:
        compile_network(base.network)
        check.compiled(batches.size)
    optimization = Optimization(parameters, settings, ranks=ranks, scaled=base.dtype == torch.float16)
    denoising = Denoising(base)
    captioned = settings.model_copy(update={"empty_prompts": 0.0})
    validation_batches = Batches(cache, validation_rows, captioned, base.device, grid=timesteps)
    state = train(
        "finetune" if settings.rank is None else "style",
        denoising,
        optimization,
        batches,
        lambda: _DenoisingValidation(denoising, cache, validation_batches, validation_rows, batches.size),
        settings,
        scratch,
        check=check.student,
        agree={"base": identity, "latent_cache": cache.digest},
        logger=logger,
        ranks=ranks,
    )
    made = None
    if ranks.first:
        assert state.best is not None  # the last step is validated
        optimization.load_weights(state.best["weights"], torch.float32)
        made = Tuned(
            model=base.name,
            base=identity,
            data_digest=cache.digest,
            pictures=len(rows),
            training=settings.model_dump(mode="json"),
            parameters=sum(parameter.numel() for parameter in parameters.values()),
            final_loss=state.loss,
            validation=Validated(pictures=len(validation_rows), loss=state.history, best_step=state.best["step"]),
        )
        _write(base, settings, out, made)
    ranks.wait()
    return made


def _rows(base: LoadedBase, cache: LatentCache, settings: Tuning) -> tuple[Tensor, Tensor]:
    """Returns the rows of the cache to train on and those to validate with. Raises UserError if they are too few."""
    rows, validation_rows = split_rows(cache, settings)
    if len(rows) < settings.batch or not len(validation_rows):
        raise UserError(
            f"{base.name}: {len(rows)} pictures to train on are less than a batch of {settings.batch}, or the "
            f"{len(validation_rows)} to validate with are none"
        )
    return rows, validation_rows


def _check(base: LoadedBase, batch: Batch) -> AdapterCheck:
    """Returns the check that training changes the network, with two timesteps of a batch of two."""
    timesteps = len(base.schedule)
    t = torch.tensor([timesteps - 1, timesteps // 2], device=base.device)
    return AdapterCheck(base, batch.noise, t, batch.conditioning)


def _parameters(base: LoadedBase, settings: Tuning) -> dict[str, nn.Parameter]:
    """Returns what is trained: the parameters of an adapter, which the base then has, or those of the network.

    Raises:
        UserError: the network is to be trained and is in half precision.
    """
    if settings.rank is not None:
        alpha = settings.alpha or settings.rank
        parameters = lora.inject(base.network, settings.rank, alpha, settings.seed, base.family.placement)
        LoraForwards().install(base.network)
        return parameters
    if base.dtype != torch.float32:
        raise UserError(f"{base.name}: a whole checkpoint is trained in fp32; set precision: fp32")
    base.network.requires_grad_(True)
    return dict(base.network.named_parameters())


def _write(base: LoadedBase, settings: Tuning, out: Path, made: Tuned) -> None:
    """Writes the adapter or the checkpoint that the base has now, with its facts."""
    with atomic_folder(out) as folder:
        if settings.rank is None:
            save_base(base, folder)
        else:
            placement = base.family.placement
            tensors = lora.state_dict(base.network, placement)
            metadata = lora.adapter_metadata(settings.rank, placement)
            lora.save_file(tensors, folder / lora.WEIGHTS, dtype=torch.float32, metadata=metadata)
        made.write(folder / FACTS)
