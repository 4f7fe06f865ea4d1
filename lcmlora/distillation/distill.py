"""Distillation of a LoRA: a run from the latent cache to the adapter's folder.

It reads the latent cache only: there is a text encoder in memory only for a cache of token ids,
behind its `embed`, and a VAE only where pictures are asked for, behind the `decode` that is passed in.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmlora import stages
from lcmlora.adapters import lora
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families import Conditioning
from lcmlora.config import Distill, check_trajectory, digest
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion import samplers
from lcmlora.diffusion.teacher_cache import TeacherCache
from lcmlora.distillation.loss import Distillation, equip, samples
from lcmlora.distillation.validation import Validation
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, write_json
from lcmlora.parallel.ranks import Ranks
from lcmlora.training.batches import Batch, Batches, split
from lcmlora.training.execution import AdapterCheck, eager
from lcmlora.training.loop import Logger, train


def distill(
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    scratch: Path,
    out: Path,
    *,
    identity: dict[str, Any],
    logger: Logger,
    ranks: Ranks | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    teacher_cache: tuple[Path, int] | None = None,
) -> dict[str, Any]:
    """Trains the adapter and writes the folder `out`; returns its config.json.

    Of many processes all call this with the same arguments; the first one writes, validates and logs.

    Args:
        base: with its UNet loaded, bare; it carries the adapter, active, when this returns.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        identity: what config.json says of the base.
        decode: latents to pictures in [0, 1], for the validation pictures; without it there are none.
        teacher_cache: a folder, the same for many runs, and the bytes that it may hold of what the teacher says of
            the samples of this one.

    Raises:
        UserError: the cache was made for other latents or holds less than a batch, the loss is not finite ten times in
            a row, the adapter does not do what it should, or the processes have different files.
    """
    ranks = ranks or Ranks()
    rows, held = _rows(base, cache, settings)
    if teacher_cache and len(cache.buckets) > 1:
        raise UserError("teacher_cache_gb: keeps what is said of one shape, and the pictures have several; set it to 0")
    batches = samples(cache, rows, settings, base.device, ranks)
    probe = _probe(base, batches.at(range(-2, 0), rows[:1].expand(2)))
    check = AdapterCheck(base, *probe)
    optimization = equip(base, settings, ranks)
    remembered = teacher_cache and _teacher_cache(*teacher_cache, base, cache, settings, batches, identity)
    distillation = Distillation(base, cache.unconditional(), settings, remembered or None)

    if settings.compile:
        check.compiled(batches.size, 2 * batches.size)
    else:
        check.teacher()
    state = train(
        "distill",
        distillation,
        optimization,
        batches,
        lambda: Validation(distillation, cache, held, settings, batches.size, decode),
        settings,
        scratch,
        check=check.student,
        agree={"base": identity, "latent_cache": cache.digest},
        logger=logger,
        ranks=ranks,
    )
    facts = {
        "model": base.name,
        "base": identity,
        "prediction_type": base.schedule.prediction_type,
        "data_digest": cache.digest,
        "pictures": len(rows),
        "distill": settings.model_dump(mode="json"),
        "steps": settings.steps,
        "final_loss": state["loss"],
        "sampler": asdict(distillation.objective.sampler),
        "seed": settings.seed,
        "adapted_layers": lora.adapted_layers(base.network),
        "lora_parameters": lora.parameters(base.network),
        # Not Python's, nor torch's build (`+cpu`): the machine's, and the adapter is the same with others.
        "versions": {name: number.partition("+")[0] for name, number in versions().items() if name != "python"},
    }
    if ranks.first:
        best = state["best"]
        facts["validation"] = {"pictures": len(held), "loss": state["history"], "best_step": best["step"]}
        optimization.use(best["weights"], _file_dtype(base))
        _write(base, settings, out, facts, probe)
    ranks.wait()
    return facts


def _rows(base: LoadedBase, cache: LatentCache, settings: Distill) -> tuple[Tensor, Tensor]:
    """Returns the rows of the cache to train on and those to validate with, once it is what this base needs."""
    check_trajectory(settings, cache.rollouts)
    if cache.latent_shape != base.latent_shape:
        raise UserError(
            f"the latent cache holds {cache.latent_shape}, {base.name} needs {base.latent_shape}: encode again"
        )
    rows, held = split(cache, settings)
    if len(rows) < settings.batch or not len(held):
        raise UserError(
            f"distill.batch: {settings.batch} is more than the {len(rows)} pictures of the cache that are left beside "
            f"{len(held)} for validation"
        )
    return rows, held


def _write(base: LoadedBase, settings: Distill, out: Path, facts: dict[str, Any], probe: Probe) -> None:
    """Writes the adapter that the base carries, how to sample with it, and what is known of it."""
    with atomic_folder(out) as folder:
        placement = base.family.placement
        tensors, metadata = lora.state_dict(base.network, placement), lora.adapter_metadata(settings.rank, placement)
        lora.save_file(tensors, folder / lora.WEIGHTS, dtype=_file_dtype(base), metadata=metadata)
        scheduler = samplers.scheduler_config(base.scheduler_config, Sampler(**facts["sampler"]))
        write_json(folder / "scheduler_config.json", scheduler)
        write_json(folder / "config.json", facts)
        _save_probe(base, probe, folder / "probe.safetensors")


def _teacher_cache(
    folder: Path,
    limit: int,
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    batches: Batches,
    identity: dict[str, Any],
) -> TeacherCache:
    """Returns the cache of all runs to which the teacher says the same, to the bit, of the same samples."""
    decisive = ("seed", "batch", "grid", "empty_prompts", "validation_pictures", "compile")
    key = digest(
        settings.model_dump(include=set(decisive)),
        identity,
        cache.digest,
        # What else decides how a pass is rounded.
        {"dtype": str(base.dtype), "device": base.device.type, "rows": batches.size} | versions(),
        stages.algorithms("distill"),
    )
    places = settings.steps * settings.batch
    return TeacherCache(folder / f"{base.name}-{key[:12]}", base.latent_shape, base.dtype, places, limit)


def _file_dtype(base: LoadedBase) -> torch.dtype:
    """Weights of a half-precision base are released in fp16, as the published adapters are."""
    return torch.float32 if base.dtype == torch.float32 else torch.float16


def versions() -> dict[str, str]:
    """Returns the versions that may decide how a run is rounded, down to the build: `2.13.0+cpu`."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers", "peft")}


Probe = tuple[Tensor, Tensor, Conditioning]


def _probe(base: LoadedBase, batch: Batch) -> Probe:
    """Returns latents, timesteps and conditioning of one fixed forward."""
    timesteps = len(base.schedule)
    t = torch.tensor([timesteps - 1, timesteps // 2], device=base.device)
    return batch.noise, t, {name: value.contiguous() for name, value in batch.conditioning.items()}


@torch.no_grad()
def _save_probe(base: LoadedBase, probe: Probe, path: Path) -> None:
    """Writes one forward of the live student and of the base alone, for whoever reloads the file to compare with."""
    latents, timesteps, conditioning = probe
    with eager():
        student = base.predict(*probe)
        with lora.disabled(base.network):
            alone = base.predict(*probe)
    tensors = {"latents": latents, "timesteps": timesteps, "student": student, "base": alone} | conditioning
    from safetensors.torch import save_file

    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path)
