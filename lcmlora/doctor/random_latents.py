"""A latent cache of random numbers, for measuring training before any picture is encoded: no cost depends on values."""

from __future__ import annotations

from pathlib import Path

import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Encode
from lcmlora.data.latents import texts
from lcmlora.data.latents.cache import MANIFEST, VERSION, LatentCache, Manifest
from lcmlora.data.latents.store import UnfinishedCache

_SHARD = "shard-00000.safetensors"


def random_cache(base: LoadedBase, pictures: int, folder: Path) -> LatentCache:
    """Returns a cache of so many random latents, each with a caption of its own, in an empty folder.

    Args:
        base: with its text encoders.
    """
    captions = [f"picture {number}" for number in range(pictures)]
    limit = Encode(batch=1).text_cache_mb
    store = UnfinishedCache(folder, "random latents")
    tensors, cut = texts.encode_captions(base, captions, 16, texts.plan_text(base, pictures, limit))
    store.save_text(tensors, captions=pictures, cut=cut)
    generator = torch.Generator().manual_seed(0)
    side = base.resolution
    shard = {
        "latent_mean": torch.randn(pictures, *base.latent_shape, generator=generator).half(),
        "latent_logvar": torch.full((pictures, *base.latent_shape), -10.0).half(),  # a deviation of 0.007
        "orig_size": torch.full((pictures, 2), side, dtype=torch.int32),
        "crop_tl": torch.zeros(pictures, 2, dtype=torch.int32),
        "text_row": torch.arange(pictures, dtype=torch.int32),
        "key": torch.randint(0, 256, (pictures, 16), generator=generator).to(torch.uint8),
    }
    store.save_shard(_SHARD, shard, "random latents")
    assert store.text is not None
    manifest = Manifest(
        version=VERSION,
        model=base.name,
        kind=base.family.name,
        pictures=pictures,
        captions=pictures,
        latent_shape=base.latent_shape,
        resolution=side,
        fingerprint=store.fingerprint,
        shards=list(store.shards.values()),
        text=store.text,
    )
    manifest.write(store.files / MANIFEST)
    return LatentCache(store.files)
