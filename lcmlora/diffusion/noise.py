"""Random numbers that depend on a key alone, not on the process that draws them."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """Returns a generator on the CPU whose numbers depend on the key alone, on every machine."""
    # Hashed, since generators with neighbouring seeds could have numbers in common.
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
