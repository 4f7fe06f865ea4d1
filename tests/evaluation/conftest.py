"""Features small enough for few pictures, and what the stages before an evaluation leave of a miniature base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.bases import folders
from lcmlora.config import Base, Data, Evaluation
from lcmlora.data.prepare import prepare_pictures
from lcmlora.evaluation.reference import draw_reference
from lcmlora.plugins import FEATURES
from tests.support.miniature import RESOLUTION

WORDS = ["red apple", "green tree", "tree", "fruit", "red fruit", "green apple", "apple tree", "food"]
CPU = torch.device("cpu")


class Quarters:
    """The mean colour of each quarter of a picture."""

    distance = "frechet"
    name = "quarters/12"
    dimensions = 12

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        del device, source

    def __call__(self, pictures: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1) * 10


class Halves(Quarters):
    """The mean colour of a picture's upper and lower half."""

    name = "halves/6"
    dimensions = 6

    def __call__(self, pictures: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures, (2, 1)).flatten(1) * 10


@pytest.fixture(scope="module")
def small_features() -> None:
    FEATURES.register("quarters", Quarters)
    FEATURES.register("halves", Halves)


FIXED = {"solver": "ddim", "guidance_scale": 4.0}


def settings(**changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "seed": 1000, "pictures": 20, "batch": 8, "features": "quarters", "check_features": "halves",
        "guidance_scale": 4.0, "teacher_steps": 6, "solvers": (FIXED, FIXED | {"solver": "dpm++"}),
        "solver_evaluations": (2, 4),
        "student_steps": (1, 2, 4), "grid_rows": 3, "resamples": 20, "worst_captions": 2,
        "latency_repeats": 2, "device": "cpu",
    }  # fmt: skip
    return Evaluation(**values | changes)


def made_of(base_folder: Path) -> Base:
    return Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Ninety-six pictures under eight captions."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for i in range(96):
        pixels = torch.randint(0, 256, (3, 3, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((20, 24), Image.Resampling.NEAREST).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(WORDS[i % len(WORDS)])
    return Data(source="folder", path=folder, min_side=8, max_aspect=2.0, validation=0.2, test=0.4)


@pytest.fixture(scope="module")
def pictures(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "pictures"
    prepare_pictures(data, 1, out)
    return out


@pytest.fixture(scope="module")
def reference(
    small_features: None, base_folder: Path, data: Data, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    base = bases.load("mini", made_of(base_folder), base_folder, device=CPU)
    draw_reference(base, data, settings(), pictures, root / "scratch", root / "reference", root / "timings")
    return root / "reference"


def write_adapter(base_folder: Path, folder: Path, *, seed: int = 0, strength: float = 0.1) -> Path:
    """Writes what an evaluation reads of an adapter's folder; returns the folder."""
    folder.mkdir(parents=True)
    unet = bases.load("mini", made_of(base_folder), base_folder, device=CPU, parts=("network",)).network
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.inject(unet, 4, 4.0, seed).items():
        if "lora_B" in name:
            parameter.data.normal_(std=strength, generator=generator)
    metadata = lora.adapter_metadata(4)
    lora.save_file(lora.state_dict(unet), folder / lora.WEIGHTS, dtype=torch.float32, metadata=metadata)
    identity = folders.identity(made_of(base_folder), base_folder)
    sampler = {"scheduler": "LCMScheduler", "gamma": None, "grid": 50}
    (folder / "config.json").write_text(json.dumps({"base": identity, "sampler": sampler}))
    return folder


@pytest.fixture
def adapter(base_folder: Path, tmp_path: Path) -> Path:
    return write_adapter(base_folder, tmp_path / "adapter")
