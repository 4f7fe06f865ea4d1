import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def mini(base_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base_folder, tmp_path / "mini")


@pytest.fixture
def sdxl(miniatures: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(miniatures("sdxl"), tmp_path / "sdxl")
