"""Latent caches of miniature bases for tests: made, looked at, and made by a process that dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Data, Encode
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.sources.source import Record, read_records

SETTINGS = Encode(batch=5, shard_mb=1, device="cpu")
LARGE = 128  # pixels; the latent is 4 x 64 x 64, and 1 MB holds 15 of them
Load = Callable[..., LoadedBase]


def run(base: LoadedBase, data: Data, tmp_path: Path, settings: Encode = SETTINGS, out: str = "latents/mini") -> Path:
    """Encodes the list of pictures in `tmp_path`/pictures into a cache and returns its folder."""
    encode_latents(base, data, settings, tmp_path / "pictures", tmp_path / "scratch", tmp_path / out)
    return tmp_path / out


def records(tmp_path: Path) -> list[Record]:
    return read_records(tmp_path / "pictures" / "train.jsonl")


def count_batches(base: LoadedBase, fail_after: int | None = None) -> list[int]:
    """Notes the size of every batch that the VAE is given; the process "dies" after `fail_after` of them."""
    sizes: list[int] = []
    real = base.encode_pictures

    def counted(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(sizes) == fail_after:
            raise KeyboardInterrupt
        sizes.append(len(pictures))
        return real(pictures)

    base.encode_pictures = counted  # type: ignore[method-assign]
    return sizes


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
