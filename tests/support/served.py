"""Releases of a miniature base that can be drawn with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch

from lcmlora.adapters import lora
from lcmlora.bases import folders
from lcmlora.config import Base
from lcmlora.io.files import sha256_file
from lcmlora.project import Project
from lcmlora.releases import package as release
from lcmlora.releases.bundle import PROVENANCE, SCHEDULER, WEIGHTS
from tests.support import adapters, releases
from tests.support.miniature import RESOLUTION

NEEDED = (WEIGHTS, SCHEDULER, PROVENANCE)  # of a release, by who draws with it


def make(base_folder: Path, folder: Path, *, gamma: float | None = None, grid: int = 50) -> Path:
    """Writes what drawing needs of a release and nothing else; with `gamma` it is one for TCDScheduler."""
    folder.mkdir(parents=True)
    base = adapters.load(base_folder)
    adapters.train(base)
    metadata = lora.adapter_metadata(4)
    lora.save_file(lora.state_dict(base.network), folder / WEIGHTS, dtype=torch.float32, metadata=metadata)
    sampler = {"scheduler": "LCMScheduler" if gamma is None else "TCDScheduler", "gamma": gamma, "grid": grid}
    scheduler = getattr(diffusers, sampler["scheduler"]).from_config(base.scheduler_config)
    settings = dict(scheduler.config) | {"_class_name": sampler["scheduler"], "original_inference_steps": grid}
    (folder / SCHEDULER).write_text(json.dumps(settings))
    provenance = releases.provenance("mini", sha256_file(folder / WEIGHTS)) | {
        "base": identity(base_folder),
        "resolution": RESOLUTION,
        "sampler": sampler,
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance))
    return folder


def package(base_folder: Path, root: Path) -> Path:
    """Makes a whole release in `root`, as any other is made, and returns its folder."""
    releases.write_stages(adapters.load(base_folder, "network", "vae", "text"), root)
    facts = root / "adapters/mini/config.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"base": identity(base_folder)}))
    release.package_release("mini", releases.load_settings(base_folder), Project(root), base_folder)
    return root / "release/mini"


def copy(made: Path, folder: Path, **changes: Any) -> Path:
    """Returns `folder` with what drawing needs of the release; `changes` are of its provenance."""
    folder.mkdir(parents=True)
    for name in NEEDED:
        shutil.copyfile(made / name, folder / name)
    provenance = folder / PROVENANCE
    provenance.write_text(json.dumps(json.loads(provenance.read_text()) | changes))
    return folder


def identity(base_folder: Path) -> dict[str, str | None]:
    """Returns `base` of the provenance of a release for this base."""
    settings = Base(source=str(base_folder), resolution=RESOLUTION, license="mit")
    return folders.identity(settings, base_folder)


def environment(**changes: str) -> dict[str, str]:
    """Returns this process's environment for one that must reach neither the hub nor a tracking server."""
    found = Path(__file__).parents[2]
    quiet = {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | quiet | {"PYTHONPATH": str(found)} | changes
