"""What many tests share: a miniature base on disk, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcmlora import bases
from lcmlora.config import Base
from tests.miniature import RESOLUTION, save_base

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "mini")


@pytest.fixture
def base(base_folder: Path) -> bases.LoadedBase:
    """The miniature in memory, bare, anew for each test: adapters are injected into it."""
    settings = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    return bases.load("mini", settings, base_folder, device=torch.device("cpu"))
