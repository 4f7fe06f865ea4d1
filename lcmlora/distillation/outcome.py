"""The folder of a trained adapter: its weights, its scheduler's configuration, its facts and a probe."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lcmlora.adapters import lora
from lcmlora.adapters.metadata import FACTS, SCHEDULER, Distilled
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families import Conditioning
from lcmlora.config import Distill
from lcmlora.diffusion import samplers
from lcmlora.distillation.loss import Distillation
from lcmlora.io.files import atomic_folder, write_json
from lcmlora.training.batches import Batch
from lcmlora.training.execution import eager


class Probe(NamedTuple):
    """The inputs of one fixed forward."""

    latents: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int64
    conditioning: Conditioning


def write_adapter(distillation: Distillation, settings: Distill, out: Path, made: Distilled, probe: Probe) -> None:
    """Writes the adapter that the base has now, its scheduler's configuration, its facts and the probe."""
    base = distillation.base
    with atomic_folder(out) as folder:
        placement = base.family.placement
        tensors, metadata = lora.state_dict(base.network, placement), lora.adapter_metadata(settings.rank, placement)
        lora.save_file(tensors, folder / lora.WEIGHTS, dtype=file_dtype(base), metadata=metadata)
        scheduler = samplers.scheduler_config(base.scheduler_config, distillation.objective.sampler)
        write_json(folder / SCHEDULER, scheduler)
        made.write(folder / FACTS)
        _save_probe(base, probe, folder / "probe.safetensors")


def file_dtype(base: LoadedBase) -> torch.dtype:
    """Returns the precision of the adapter's file: of a half-precision base fp16, as the published adapters have it."""
    return torch.float32 if base.dtype == torch.float32 else torch.float16


def versions() -> dict[str, str]:
    """Returns the versions that may decide how a run is rounded, down to the build: `2.13.0+cpu`."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers", "peft")}


def probe_inputs(base: LoadedBase, batch: Batch) -> Probe:
    """Returns the noise and conditioning of a batch of two, with two timesteps."""
    timesteps = len(base.schedule)
    t = torch.tensor([timesteps - 1, timesteps // 2], device=base.device)
    return Probe(batch.noise, t, {name: value.contiguous() for name, value in batch.conditioning.items()})


@torch.no_grad()
def _save_probe(base: LoadedBase, probe: Probe, path: Path) -> None:
    """Writes the probe with the student's and the base's outputs, with which packaging compares a reloaded adapter."""
    from safetensors.torch import save_file

    with eager():
        student = base.predict(*probe)
        with lora.disabled(base.network):
            alone = base.predict(*probe)
    inputs = {"latents": probe.latents, "timesteps": probe.timesteps} | probe.conditioning
    tensors = {"student": student, "base": alone} | inputs
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
