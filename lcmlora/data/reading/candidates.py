"""Candidates, which are pictures with captions that are not decoded yet, and rejections with their reasons."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lcmlora.io import terminal

# Endings of pictures. Pictures in formats that are not decoded are rejected with a reason, not overlooked.
SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2",
}  # fmt: skip
TEXTS = (".txt", ".caption", ".text")  # endings of caption files, in the order in which they count
MAX_BYTES = 1 << 28  # of a file; uncompressed, the largest picture that Pillow opens has as many
MAX_CAPTION = 1 << 16  # bytes; text encoders read 77 tokens of it

CAPTIONS = ("caption", "text", "TEXT", "prompt")  # names of the caption in tables, JSON and metadata

_MAX_NAME = 200  # characters of a displayed name

NOT_A_PICTURE = "not a JPEG, PNG or WebP picture, or its header is broken"
LFS_POINTER = "a pointer of Git LFS instead of a picture"
DAMAGED = "damaged or truncated"
TOO_LARGE = "too many pixels or bytes (decompression bomb)"
EMPTY = "file of zero bytes"
MISSING = "no such file"
UNREADABLE = "file cannot be read"
AMBIGUOUS = "several files have this name but for upper case, accents or slashes"
NO_FILE = "no file but a pipe, a socket or a device"
LINKED = "link that leads out of the folder (data.links)"
NAMED_TWICE = "named twice in the metadata; the first caption counts"
OUTSIDE = "leads out of the folder"
NOT_UTF8 = "file name or caption is not UTF-8"
NO_CAPTION = "no caption"
NO_NAME = "row of metadata without texts file_name and text"
DUPLICATE = "same bytes as another picture"
SAME_PROMPT = "same prompt as another"
LONG_CAPTION = f"caption of more than {MAX_CAPTION} bytes"


# Elements of HTML, present and former, and no other word in angle brackets: trigger words like <cat-toy> or <s0> stay.
_ELEMENTS = (
    "a abbr acronym address area article aside audio b base basefont bdi bdo big blink blockquote body br button "
    "canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em embed "
    "fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i "
    "iframe img input ins kbd label legend li link main map mark marquee menu meta meter nav nobr noframes "
    "noscript object ol optgroup option output p param picture pre progress q rp rt ruby s samp script search "
    "section select slot small source span strike strong style sub summary sup svg table tbody td template "
    "textarea tfoot th thead time title tr track tt u ul var video wbr"
)
# What follows an element's name are attributes, of which one at least has a value: "a <b and c> d" stays. Nothing here
# can run on for long.
_MARKUP = re.compile(
    rf"<!--[^<]*?-->|</(?:{_ELEMENTS.replace(' ', '|')})\s*>"
    rf"|<(?:{_ELEMENTS.replace(' ', '|')})(?:\s[^<>=]*=[^<>]*)?\s?/?>",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")  # "R&notes" has none
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+")


class Caption(NamedTuple):
    """A caption.

    text: cleaned; may be empty.
    raw: as it was written, if cleaning took words from it.
    """

    text: str
    raw: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A picture with a caption, not decoded yet.

    key: unique and stable; people see it.
    caption: not empty.
    place: where its source reads it.
    scores: its numbers for `data.scores`.
    """

    key: str
    caption: Caption
    place: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """A picture that cannot be used, and why.

    reason: one of a few texts; rejections are counted by it.
    place: where its source reads it, if it can be read.
    detail: about this picture only; an error that stops a run shows it.
    rank: where it comes in lists: those of lower ranks first, and within a rank in the order of the source.
    """

    name: str
    reason: str
    place: str | None = None
    detail: str = ""
    rank: int = field(default=0, compare=False)


class Unusable(Exception):
    """A picture or row cannot be used: the reason, and a detail about this one only."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def clean_caption(text: str) -> Caption:
    """Returns the caption in NFKC without control characters, HTML, addresses and surplus white space."""
    plain = _plain(text)
    unescaped = _ENTITY.sub(lambda entity: html.unescape(entity[0]), plain)
    bare = _plain(_ADDRESS.sub(" ", _MARKUP.sub(" ", unescaped)))
    return Caption(bare, plain if plain != bare else None)


def _plain(text: str) -> str:
    if text.isascii() and text.isprintable():  # most are, and are in NFKC and without control characters then
        return " ".join(text.split())
    kept = (" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in unicodedata.normalize("NFKC", text))
    return " ".join("".join(kept).split())


def scores_in(fields: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Returns the numbers with these names; leaves out what is missing or no number."""
    scores = {}
    for name in names:
        try:
            value = float(fields[name])
        except (KeyError, TypeError, ValueError):
            continue
        if not math.isnan(value):
            scores[name] = value
    return scores


def printable(name: str) -> str:
    """Returns a file's name as valid text: the bytes of it that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def display_name(name: str) -> str:
    """Returns a name, shortened and escaped, for a line that people read."""
    return terminal.shown(name, _MAX_NAME)


def decoded_caption(content: bytes) -> Caption:
    """Returns the caption in these bytes of UTF-8. Raises Unusable."""
    if len(content) > MAX_CAPTION:
        raise Unusable(LONG_CAPTION)
    try:
        return clean_caption(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unusable(NOT_UTF8) from None
