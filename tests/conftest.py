"""What many tests share: a miniature base on disk, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from lcmlora import bases
from lcmlora.config import Base, Encode
from lcmlora.data.cache import LatentCache, encode
from lcmlora.data.prepare import prepare
from tests.data.conftest import add, data_in, picture
from tests.distillation import load_parts
from tests.miniature import RESOLUTION, save_base

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "mini")


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a miniature by its architecture (tests.miniature.ARCHITECTURES), each made once."""

    @cache
    def make(architecture: str) -> Path:
        return save_base(tmp_path_factory.mktemp("miniatures") / architecture, architecture)

    return make


@pytest.fixture
def base(base_folder: Path) -> bases.LoadedBase:
    """The miniature in memory, bare, anew for each test: adapters are injected into it."""
    settings = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    return bases.load("mini", settings, base_folder, device=torch.device("cpu"))


def make_latents(base_folder: Path, work: Path) -> LatentCache:
    """Returns a cache of nine pictures with a caption each, encoded by the base."""
    for number in range(10):
        add(work / "in", f"{number}.png", f"subject {number}", picture(number))
    data = data_in(work / "in", min_side=16, validation=0.2)
    prepare(data, 4, work / "pictures")
    base = load_parts(base_folder, "vae", "text")
    encode(base, data, Encode(batch=4), work / "pictures", work / "scratch", work / "latents")
    return LatentCache(work / "latents")


@pytest.fixture(scope="session", name="cache")
def latents(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return make_latents(base_folder, tmp_path_factory.mktemp("latents"))
