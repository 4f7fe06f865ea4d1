"""Distillation of a LoRA: a run from the latent cache to the adapter's folder.

It reads pictures from the latent cache alone. A text encoder is in memory only if the cache holds token ids instead of
embeddings, a VAE only if validation pictures are wanted (`decode`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from lcmlora import stages
from lcmlora.adapters import lora
from lcmlora.adapters.metadata import Distilled, DistillSettings, SamplerFacts, Validated
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.folders import Identity
from lcmlora.config import Distill, check_trajectory, digest
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion.teacher_cache import TeacherCache
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.distillation.outcome import file_dtype, probe_inputs, versions, write_adapter
from lcmlora.distillation.validation import Validation
from lcmlora.errors import UserError
from lcmlora.parallel.ranks import Ranks
from lcmlora.training.batches import Batches, split_rows
from lcmlora.training.execution import AdapterCheck
from lcmlora.training.loop import Logger, TrainingState, train


def distill_adapter(
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    scratch: Path,
    out: Path,
    *,
    identity: Identity,
    logger: Logger,
    ranks: Ranks | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    teacher_cache: tuple[Path, int] | None = None,
) -> Distilled | None:
    """Trains the adapter, writes the folder `out` and returns its config.json.

    All processes of a run call this with the same arguments. The first one validates, logs and writes; the others
    return None.

    Args:
        base: with its network, without an adapter; afterwards it has the adapter, switched on.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        identity: of the base, for config.json.
        decode: latents (B, C, h, w) to pictures (B, 3, H, W) in [0, 1]; without it there are no validation pictures.
        teacher_cache: a folder, which many runs may share, and the bytes that this run's teacher outputs may take
            there.

    Raises:
        UserError: the cache was made for another base or holds less than a batch, the loss is not finite ten times in a
            row, the adapter has no effect, or the processes have different files.
    """
    ranks = ranks or Ranks()
    rows, validation_rows = training_rows(base, cache, settings)
    batches = sample_stream(cache, rows, settings, base.device, ranks)
    teacher_outputs = _teacher_cache(teacher_cache, base, cache, settings, batches, identity)
    probe = probe_inputs(base, batches.at(range(-2, 0), rows[:1].expand(2)))
    check = AdapterCheck(base, *probe)
    optimization = add_adapter(base, settings, ranks)
    distillation = Distillation(base, cache.unconditional(), settings, teacher_outputs)

    if settings.compile:
        check.compiled(batches.size, 2 * batches.size)
    else:
        check.teacher()
    state = train(
        "distill",
        distillation,
        optimization,
        batches,
        lambda: Validation(distillation, cache, validation_rows, settings, batches.size, decode),
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
        optimization.load_weights(state.best["weights"], file_dtype(base))
        validated = Validated(pictures=len(validation_rows), loss=state.history, best_step=state.best["step"])
        made = _facts(distillation, cache, settings, identity, len(rows), state, validated)
        write_adapter(distillation, settings, out, made, probe)
    ranks.wait()
    return made


def training_rows(base: LoadedBase, cache: LatentCache, settings: Distill) -> tuple[Tensor, Tensor]:
    """Returns the rows of the cache to train on and those to validate with.

    Raises:
        UserError: the cache was made for another base or for other settings, or holds less than a batch.
    """
    check_trajectory(settings, cache.rollouts)
    if cache.latent_shape != base.latent_shape:
        raise UserError(
            f"the latent cache holds {cache.latent_shape}, {base.name} needs {base.latent_shape}: encode again"
        )
    rows, validation_rows = split_rows(cache, settings)
    if len(rows) < settings.batch or not len(validation_rows):
        raise UserError(
            f"distill.batch: {settings.batch} is more than the {len(rows)} pictures of the cache that are left beside "
            f"{len(validation_rows)} for validation"
        )
    return rows, validation_rows


def _teacher_cache(
    place: tuple[Path, int] | None,
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    batches: Batches,
    identity: Identity,
) -> TeacherCache | None:
    """Returns the cache that is shared by all runs whose teacher has the same outputs, to the bit, for each sample."""
    if place is None:
        return None
    if len(cache.buckets) > 1:
        raise UserError("teacher_cache_gb: outputs of one shape are kept, and the pictures have several; set it to 0")
    decisive = ("seed", "batch", "grid", "empty_prompts", "validation_pictures", "compile")
    key = digest(
        settings.model_dump(include=set(decisive)),
        identity,
        cache.digest,
        # What else decides how a forward is rounded.
        {"dtype": str(base.dtype), "device": base.device.type, "rows": batches.size} | versions(),
        stages.algorithms("distill"),
    )
    folder, max_bytes = place
    path = folder / f"{base.name}-{key[:12]}"
    return TeacherCache(path, base.latent_shape, base.dtype, settings.steps * settings.batch, max_bytes)


def _facts(
    distillation: Distillation,
    cache: LatentCache,
    settings: Distill,
    identity: Identity,
    pictures: int,
    state: TrainingState,
    validated: Validated,
) -> Distilled:
    base = distillation.base
    return Distilled(
        model=base.name,
        base=identity,
        prediction_type=base.schedule.prediction_type,
        data_digest=cache.digest,
        pictures=pictures,
        distill=DistillSettings.model_validate(settings.model_dump(mode="json")),
        steps=settings.steps,
        final_loss=state.loss,
        sampler=SamplerFacts(**asdict(distillation.objective.sampler)),
        seed=settings.seed,
        adapted_layers=lora.adapted_layers(base.network),
        lora_parameters=lora.parameters(base.network),
        # Neither Python's nor torch's build (`+cpu`): these are the machine's, and the adapter is the same with others.
        versions={name: number.partition("+")[0] for name, number in versions().items() if name != "python"},
        validation=validated,
    )
