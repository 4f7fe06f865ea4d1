"""Random numbers that belong to a thing, not to the process that draws them."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """Returns the CPU generator of this key, the same one on every machine and in whatever order keys are asked for."""
    # Hashed, or neighbouring keys could share their numbers.
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
