"""Hiding the progress bars of transformers and diffusers for work of a moment, such as loading a text encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Shows no bars of these libraries within the block ("Loading weights", "Writing model shards")."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    shown = [each for each in (diffusers, transformers) if each.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
