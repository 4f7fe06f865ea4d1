"""What a source finds before anything is decoded: pictures with captions, where they lie, and why one is refused."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Protocol

# What a person would call a picture. Those that are not decoded are reported instead of overlooked.
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2"}
MAX_BYTES = 1 << 28  # of a file; uncompressed, the largest picture that Pillow opens has as many
MAX_CAPTION = 1 << 16  # bytes; text encoders read 77 tokens of it

NOT_A_PICTURE = "not a JPEG, PNG or WebP picture, or its header is broken"
DAMAGED = "damaged or truncated"
TOO_LARGE = "too many pixels or bytes (decompression bomb)"
EMPTY = "file of zero bytes"
MISSING = "no such file"
UNREADABLE = "file cannot be read"
TWICE = "named twice in the metadata; the first caption counts"
OUTSIDE = "leads out of the folder"
NOT_UTF8 = "file name or caption is not UTF-8"
NO_CAPTION = "no caption"
LONG_CAPTION = f"caption of more than {MAX_CAPTION} bytes"


@dataclass(frozen=True)
class Candidate:
    """A picture that is named with a caption.

    key: unique and stable, told to people.
    caption: cleaned, not empty.
    place: by which its source reads it.
    """

    key: str
    caption: str
    place: str


@dataclass(frozen=True)
class Rejection:
    """A picture that cannot be used, and why."""

    name: str
    reason: str


class Unusable(Exception):
    """The reason why the picture at hand is rejected."""


class Source(Protocol):
    """Where captioned pictures lie."""

    def candidates(self) -> tuple[list[Candidate], list[Rejection]]:
        """Returns what there is, in a stable order to which later names are added at the end, and what is refused.

        Raises:
            UserError: there is nothing, or it is no such source.
        """

    def read(self, place: str) -> bytes:
        """Returns the bytes of a candidate's picture, from any thread. Raises Unusable."""


def clean_caption(text: str) -> str:
    """Returns the caption in NFKC without control characters and surplus white space."""
    plain = (" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in unicodedata.normalize("NFKC", text))
    return " ".join("".join(plain).split())


def printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def decoded_caption(content: bytes) -> str:
    """Returns a caption's bytes as a cleaned text, empty where it says nothing. Raises Unusable."""
    if len(content) > MAX_CAPTION:
        raise Unusable(LONG_CAPTION)
    try:
        return clean_caption(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unusable(NOT_UTF8) from None
