"""Folders of captioned pictures, and settings for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcmlora import bases
from lcmlora.config import Base, Data
from lcmlora.data.sources.source import survey, write_records
from tests.support.miniature import save_base

NODE_MODULES = Path(__file__).parents[2] / "node_modules"


def data_in(folder: Path, **changes: Any) -> Data:
    plain = {"source": "folder", "path": folder, "min_side": 16, "max_aspect": 2.0, "seed": 0}
    return Data.model_validate(plain | changes)


def picture(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A gradient whose colours say which one it is."""
    red = Image.linear_gradient("L").resize(size)
    if number >= 256:
        red = red.point([(value + number // 256) % 256 for value in range(256)])
    return Image.merge("RGB", (red, red.rotate(180), Image.new("L", size, number * 7 % 256)))


def add(folder: Path, name: str, caption: str | None, image: Image.Image | bytes, **options: Any) -> Path:
    """Puts a picture, or any bytes, into the folder, with its caption beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight good pictures with captions of their own."""
    for number in range(8):
        add(tmp_path / "in", f"{number}.png", f"subject {number}", picture(number))
    return tmp_path / "in"


@pytest.fixture
def listed(folder: Path, tmp_path: Path) -> Data:
    """Forty pictures of various shapes under eight captions, all of them for training."""
    for number in range(8, 40):
        add(folder, f"{number:02d}.png", f"subject {number % 8}", picture(number, (40 + number % 7, 40 + number % 5)))
    data = data_in(folder)
    write_records(tmp_path / "pictures" / "train.jsonl", survey(data).records)
    return data


@pytest.fixture
def emoji_data() -> Data:
    if not (NODE_MODULES / "@iconify-json").is_dir():
        pytest.skip("the artwork is not installed")
    styles, groups = ("noto", "fluent-emoji-flat"), ("food-drink",)
    path = NODE_MODULES.parent / "package-lock.json"
    return data_in(path, source="emoji", styles=styles, groups=groups, copies=2)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("sdxl") / "mini", "sdxl")


def load_encoders(folder: Path, resolution: int) -> bases.LoadedBase:
    settings = Base(source=str(folder), resolution=resolution, license="apache-2.0")
    return bases.load("mini", settings, folder, device=torch.device("cpu"), parts=("vae", "text"))


@pytest.fixture
def load_base(base_folder: Path, sdxl_folder: Path) -> Callable[..., bases.LoadedBase]:
    """Loads the encoders of a miniature at any resolution."""

    def load(resolution: int, *, sdxl: bool = False) -> bases.LoadedBase:
        return load_encoders(sdxl_folder if sdxl else base_folder, resolution)

    return load
