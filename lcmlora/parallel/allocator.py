"""The C library's allocator, told to keep what a stage on a CPU frees, for that is asked for again at once."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# mallopt(3) of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 32 << 20  # bytes; glibc takes no higher threshold
_KEPT = 1 << 30  # bytes


def keep_freed_memory(device: torch.device) -> None:
    """Keeps up to a gigabyte of freed memory in this process, which computes on this device; on a GPU, nothing is done.

    By default glibc returns large blocks to the system, which clears every page again when the next step asks for the
    same: 25,000 pages for a batch of 32 of the emoji base, some 8 % of the time to draw it. Results are the same. Other
    C libraries have no such options, and are left alone.
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
