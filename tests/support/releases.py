"""Adapters of the miniature base, and the files around them that the stages before `package` write."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from lcmlora import bases, config
from lcmlora.adapters import lora
from lcmlora.diffusion import sampling
from lcmlora.evaluation import timings
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.io.files import sha256_file, write_json
from tests.support import params
from tests.support.miniature import RESOLUTION

METRICS: dict[str, Any] = {
    "features": {"name": "efficientnet-lite0", "dimensions": 320, "distance": "frechet"},
    "pictures": 512,
    "seed": 1000,
    "reference_digest": "f" * 64,
    "floor": 78.0,
    "distance_teacher": {"teacher": 78.0, "student@2": 88.0, "student@4": 82.5, "ddim@1": 363.0, "dpm++@2": 171.0},
    "excess": {"teacher": 0.0, "student@2": 10.0, "student@4": 4.5, "ddim@1": 285.0, "dpm++@2": 93.0},
    "distance_real": None,
    "distance_real_missing": "24 real test pictures are too few for 320 dimensions",
    "retrieval": {"teacher@50": 0.9, "student@2": 0.7, "student@4": 0.85, "ddim@1": 0.1, "dpm++@2": 0.5},
    "seconds_per_picture": {"teacher@50": 0.2, "student@2": 0.01, "student@4": 0.02, "ddim@1": 0.01, "dpm++@2": 0.02},
    "network_evaluations": {"teacher@50": 100, "student@2": 2, "student@4": 4, "ddim@1": 2, "dpm++@2": 4},
}

# The figures of an adapter that was tried with additions: some failed, one was not tried.
ADDITIONS = Compatibility.model_validate(
    {
        "adapter": "a" * 64,
        "base": "b" * 64,
        "features": {"name": "efficientnet-lite0", "dimensions": 320, "distance": "frechet"},
        "pictures": 352,
        "prompts": 32,
        "seeds": {"teacher": 1000, "compared": 1001},
        "teacher_steps": 50,
        "guidance_scale": 5.0,
        "resamples": 1000,
        "level": 0.95,
        "limit": 2.0,
        "tried": {
            "nothing": {
                "kind": "nothing",
                "title": "nothing added",
                "added": {},
                "floor": 170.0,
                "cells": {"student@2": {"excess": 186.0, "interval": [150.0, 220.0]}, "student@4": {"excess": 88.0}},
            },
            "lora ink 1": {
                "kind": "lora",
                "title": "style LoRA ink, weight 1",
                "added": {"weight": 1.0, "sha256": "c" * 64},
                "floor": 160.0,
                "cells": {
                    "student@2": {"excess": 200.0},
                    "student@4": {
                        "excess": 300.0,
                        "interval": [250.0, 350.0],
                        "failed": "excess 300 is more than 2 times the 88",
                    },
                },
            },
            "fp16-vae": {
                "kind": "fp16 VAE",
                "title": "VAE in fp16",
                "added": {},
                "cells": {f"student@{steps}": {"failed": "the teacher draws nothing finite"} for steps in (2, 4)},
            },
        },
        "left_out": {"img2img 0.4": "the data are prompts, without real pictures"},
    }
)


def settings(base_folder: Path, *, models: tuple[str, ...] = ("mini",), **changes: dict[str, Any]) -> dict[str, Any]:
    """The project's own params.yaml with the miniature as base of every model, and these changes of its sections."""
    raw = params.raw()
    base = {"source": str(base_folder), "resolution": RESOLUTION, "license": "apache-2.0"}
    raw |= {"models": list(models), "bases": dict.fromkeys(models, base)}
    for section, values in changes.items():
        raw[section] |= values
    return raw


def load_settings(base_folder: Path, **changes: Any) -> config.Config:
    return config.Config.model_validate(settings(base_folder, **changes))


def write_stages(
    base: bases.LoadedBase, root: Path, *, model: str = "mini", seed: int = 0, strength: float = 0.1
) -> None:
    """Writes what distill and evaluate leave for `model` below `root`; `strength` 0 is an adapter without effect."""
    parameters = lora.inject(base.network, rank=4, alpha=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            parameter.data = strength * torch.randn(parameter.shape, generator=generator)
    adapter = root / "adapters" / model
    adapter.mkdir(parents=True)
    metadata = lora.adapter_metadata(4)
    lora.save_file(lora.state_dict(base.network), adapter / lora.WEIGHTS, dtype=torch.float32, metadata=metadata)
    _save_probe(base, adapter / "probe.safetensors", generator)
    from diffusers import LCMScheduler

    scheduler = dict(LCMScheduler.from_config(base.scheduler_config).config) | {"_class_name": "LCMScheduler"}
    (adapter / "scheduler_config.json").write_text(json.dumps(scheduler))
    facts = {
        "model": model,
        "base": {"source": str(base.folder), "revision": None, "digest": "b" * 64},
        "data_digest": "d" * 64,
        "pictures": 100,
        "distill": load_settings(base.folder).distill_for("mini").model_dump(mode="json"),
        "steps": 600,
        "sampler": {"scheduler": "LCMScheduler", "gamma": None, "grid": 50},
        "validation": {"pictures": 24, "loss": {"300": 0.25, "600": 0.2}, "best_step": 600},
        "final_loss": 0.0123,
        "seed": 0,
        "adapted_layers": lora.adapted_layers(base.network),
        "lora_parameters": sum(p.numel() for p in parameters.values()),
        "versions": {"torch": torch.__version__},
    }
    (adapter / "config.json").write_text(json.dumps(facts))
    figures = METRICS | {"adapter": sha256_file(adapter / lora.WEIGHTS)}
    of = {key: figures[key] for key in ("adapter", "reference_digest")}
    measured = {"seconds_per_picture": figures.pop("seconds_per_picture")}
    write_json(root / "timings" / model / timings.EVALUATION, of | {"measured": measured})
    write_json(root / "metrics" / f"{model}.json", figures)
    evaluation = root / "evaluation" / model
    (evaluation / "pictures").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(evaluation / "grid.png")
    for key in ("real", *METRICS["network_evaluations"]):
        Image.new("RGB", (16, 32), "green").save(evaluation / "pictures" / f"{key}.png")
    (evaluation / "pictures" / "prompts.json").write_text(json.dumps({"prompts": ["owl", "fox"], "side": 16}))


@torch.no_grad()
def _save_probe(base: bases.LoadedBase, path: Path, generator: torch.Generator) -> None:
    latents = torch.randn((2, *base.latent_shape), generator=generator)
    timesteps = torch.tensor([999, 499])
    conditioning = sampling.text_conditioning(base, ["red apple", ""])
    student = base.predict(latents, timesteps, conditioning)
    with lora.disabled(base.network):
        alone = base.predict(latents, timesteps, conditioning)
    tensors = {"latents": latents, "timesteps": timesteps, "student": student, "base": alone} | conditioning
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(content, "PNG")
    return content.getvalue()


def provenance(model: str, sha256: str) -> dict[str, Any]:
    """Returns what every provenance.json has, of a release of the first version."""
    return {
        "model": model,
        "packaged": "2026-11-28T00:00:00Z",
        "sha256": sha256,
        "base": {"source": "bases/mini", "revision": None, "digest": "b" * 64},
        "data_digest": "d" * 64,
        "git": {"commit": "c" * 40, "dirty": False},
        "params": {"distill": {"objective": "lcm", "steps": 600}, "gate": {"steps": 4, "min_retrieval": 0.8}},
    }


def write_sealed(
    folder: Path,
    *,
    weights: bytes = b"weights",
    card: str = "card\n",
    metrics: dict[str, Any] | None = None,
    model: str = "mini",
    adapter: str | None = None,
) -> Path:
    """Writes a bundle that passes `release.verify`, with bytes that only look like weights; returns the folder.

    Args:
        metrics: what differs in metrics.json; figures of one group are added to those that stand there.
        adapter: SHA-256 of the weights as they were trained; None as in releases until 2026-11-28.
    """
    figures = dict(METRICS)
    for key, value in (metrics or {}).items():
        figures[key] = METRICS[key] | value if isinstance(METRICS.get(key), dict) else value
    folder.mkdir(parents=True)
    facts = provenance(model, hashlib.sha256(weights).hexdigest()) | ({"adapter": adapter} if adapter else {})
    contents = {
        "pytorch_lora_weights.safetensors": weights,
        "scheduler_config.json": b"{}\n",
        "README.md": card.encode(),
        "provenance.json": json.dumps(facts).encode(),
        "metrics.json": json.dumps(figures).encode(),
        "grid.png": _png(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(contents.items())]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder
