"""One sample of a tar file: which of its members are pictures to train on, and which caption belongs to which.

WebDataset takes members that follow each other and have one name up to the first dot for one sample. Where all files
are named by dates or versions (2021.05.png, 2021.06.png) such a sample has several pictures, so a caption first belongs
to the picture with its own name up to the last dot, and else to the only picture of its sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lcmlora.data.reading.candidates import (
    CAPTIONS,
    LONG_CAPTION,
    MAX_CAPTION,
    SUFFIXES,
    Caption,
    Unusable,
    clean_caption,
    decoded_caption,
)
from lcmlora.data.reading.tar_members import Member
from lcmlora.io.parsing import Malformed, parse_json

ENDINGS = (".txt", ".text", ".caption")  # of captions, the first counts first; and all before .json
JSON = ".json"
MAX_JSON = 1 << 20  # bytes; it may have more than a caption

BAD_JSON = "its JSON cannot be read"
AUXILIARY = "a map of another picture (depth, mask, ...), not one to train on"
SHARED = "one of several pictures in a sample whose captions are not named after one of them"

# What ControlNet's and WebDataset's samples have beside a picture, as `000.depth.png`.
_MAPS = {
    "depth", "disparity", "mask", "masks", "matte", "trimap", "alpha", "seg", "segm", "segmentation", "semantic",
    "panoptic", "instance", "canny", "edge", "edges", "hed", "pidi", "softedge", "scribble", "sketch", "lineart",
    "mlsd", "pose", "openpose", "densepose", "keypoints", "skeleton", "landmarks", "normal", "normals", "flow",
    "albedo", "label", "labels", "annotation", "control", "conditioning", "condition", "hint", "heatmap", "saliency",
    "thumb", "thumbnail", "preview", "masklabel", "condlabel",
}  # fmt: skip
_OF_PICTURES = {"image", "img", "picture", "photo", "rgb", "color", "colour", "original", "orig", "input", "output"}
_OF_TEXTS = {"caption", "captions", "text", "txt", "prompt", "alt", "description", "title", "tags", "blip", "llava"}
_TRIED = 16  # captions of other names, for the only picture of a sample
_WORD = re.compile(r"[a-z]+")


class Captioned(NamedTuple):
    """A picture with its caption, and what its JSON says."""

    member: Member
    caption: Caption
    told: dict[str, Any]


class Refused(NamedTuple):
    """A picture that is not used, and why; None where no caption was found for it."""

    member: Member
    reason: str | None


@dataclass
class Sample:
    """Members with one name up to the first dot.

    captioned, refused: its pictures.
    unused: names, up to the last dot, of captions that belong to no picture here.
    """

    key: str
    captioned: list[Captioned] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def sample_key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def stem(name: str) -> str:
    """Returns a name up to its last dot."""
    return name[: len(name) - len(ending(name))]


def ending(name: str) -> str:
    """Returns what `PurePosixPath.suffix` does; that takes most of the time of reading a tar file."""
    dot = name.rfind(".")
    return name[dot:] if name.rfind("/") + 1 < dot < len(name) - 1 else ""


def sort_out(key: str, members: Sequence[Member], read: Callable[[Member], bytes], *, scores: bool) -> Sample:
    """Returns what there is in a sample.

    Args:
        read: returns the content of a member.
        scores: whether numbers are wanted of a picture, which its JSON has.
    """
    sample = Sample(key)
    texts: dict[str, dict[str, Member]] = {}
    pictures = []
    for member in members:
        kind = ending(member.name).lower()
        if kind in SUFFIXES:
            pictures.append(member)
        elif kind in (*ENDINGS, JSON) and member.plain:
            texts.setdefault(stem(member.name), {}).setdefault(kind, member)
    maps = {picture for picture in pictures if _is_map(picture, key, texts)}
    if maps:
        sample.refused += [Refused(picture, AUXILIARY) for picture in pictures if picture in maps]
        pictures = [picture for picture in pictures if picture not in maps]
    stems = {stem(picture.name) for picture in pictures}
    used = stems | {picture.name for picture in pictures}  # 1.jpg may have 1.txt, and 1.jpg.txt
    loose = [_Other(each, key) for each in texts if each not in used]
    # The first that may belong to any picture, and the first that may belong to some: there can be 100,000 of both.
    likely = [*[o for o in loose if o.for_any][:1], *[o for o in loose if o.for_some][:1]]
    related = sorted((o for o in loose if len(stems) == 1 and o.belongs_to(*stems)), key=_Other.order)
    used |= {other.name for other in related}
    for picture in pictures:
        own = stem(picture.name)
        names = [own, picture.name, *(other.name for other in related[:_TRIED])]
        try:
            sources = [texts[name] for name in names if name in texts]
            caption, told = _told(sources, read, scores)
        except Unusable as reason:
            sample.refused.append(Refused(picture, str(reason)))
            continue
        if caption.text:
            sample.captioned.append(Captioned(picture, caption, told))
        elif len(stems) > 1 and (shared := [other for other in likely if other.belongs_to(own)]):
            used.add(shared[0].name)
            sample.refused.append(Refused(picture, SHARED))
        else:
            sample.refused.append(Refused(picture, None))
    sample.unused = [each for each in texts if each not in used]
    return sample


def _is_map(picture: Member, key: str, texts: dict[str, dict[str, Member]]) -> bool:
    """Whether a picture says by its name that it is one of another: `x.depth.png`, without a caption of its own."""
    name = stem(picture.name)
    part = name.removeprefix(key).lower()
    if "." not in part or " " in part or {*ENDINGS} & {*texts.get(name, {})}:
        return False
    words = _WORD.findall(part.rpartition(".")[2])
    if not words:
        return False
    return words[0] in _MAPS or words[-1] in _MAPS


def maps_beside(bare: Iterable[str], pictures: Iterable[str]) -> set[str]:
    """Returns those pictures without a caption that are maps of another in their folder by name: `cat-mask.png` beside
    `cat.png`, as trainers keep them."""
    stems = {stem(name) for name in pictures}
    found = set()
    for name in bare:
        parts = max((stem(name).rpartition(mark) for mark in "-_."), key=lambda each: len(each[0]))
        if parts[0] in stems and parts[2].lower() in _MAPS:
            found.add(name)
    return found


class _Other:
    """A caption whose name, up to the last dot, no picture of the sample has."""

    def __init__(self, name: str, key: str) -> None:
        words = _words(name, key)
        self.name = name
        self._key = key
        self.for_any = name == key or bool(words & _OF_TEXTS)
        self.for_some = bool(words)

    def belongs_to(self, picture: str) -> bool:
        """Returns whether the caption may belong to this picture if the sample has no other.

        One of the two names must have nothing, or a kind of file, after its first dot. A caption that has only a number
        there, such as 2021.05.txt, belongs to one of several pictures."""
        bare = picture == self._key or bool(_words(picture, self._key) & _OF_PICTURES)
        return self.for_any or (self.for_some and bare)

    def order(self) -> tuple[bool, bool]:
        return self.name != self._key, not self.for_any


def _words(name: str, key: str) -> set[str]:
    return {*_WORD.findall(name.removeprefix(key).lower())}


def _told(
    sources: list[dict[str, Member]], read: Callable[[Member], bytes], scores: bool
) -> tuple[Caption, dict[str, Any]]:
    """Returns the first caption that says something, and what the first JSON says. Raises Unusable."""
    caption, told = Caption(""), dict[str, Any]()
    for source in sources:
        for ending in ENDINGS:
            if not caption.text and (member := source.get(ending)) is not None:
                if member.size > MAX_CAPTION:
                    raise Unusable(LONG_CAPTION)
                caption = decoded_caption(read(member))
    for source in sources:
        if (member := source.get(JSON)) is not None and not (caption.text and (told or not scores)):
            if member.size > MAX_JSON:
                raise Unusable(BAD_JSON)
            found = _json(read(member))
            told = told or found
            caption = caption if caption.text else _named(found)
    return caption, told


def _named(told: dict[str, Any]) -> Caption:
    texts = (told[name] for name in CAPTIONS if isinstance(told.get(name), str))
    for text in texts:
        if len(text) > MAX_CAPTION:
            raise Unusable(LONG_CAPTION)
        if (caption := clean_caption(text)).text:
            return caption
    return Caption("")


def _json(content: bytes) -> dict[str, Any]:
    try:
        told = parse_json(content, nan_is_null=True)
    except Malformed:
        raise Unusable(BAD_JSON) from None
    return told if isinstance(told, dict) else {}
