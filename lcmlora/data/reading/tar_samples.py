"""Matches the pictures of a tar file's sample with their captions, and recognises maps of another picture.

In WebDataset's layout, members that follow each other and have the same name up to the first dot are one sample. If
files are named by dates or versions (2021.05.png, 2021.06.png), a sample has several pictures. So a caption belongs to
the picture with its own name up to the last dot; if there is none, to the only picture of its sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
from lcmlora.data.reading.file_names import ending, stem
from lcmlora.data.reading.tar_members import Member
from lcmlora.io.parsing import JsonObject, Malformed, parse_json

ENDINGS = (".txt", ".text", ".caption")  # of captions, in the order in which they count; .json comes after them
JSON = ".json"
MAX_JSON = 1 << 20  # bytes; it may hold more than a caption

BAD_JSON = "its JSON cannot be read"
AUXILIARY = "a map of another picture (depth, mask, ...), not one to train on"
AMBIGUOUS_CAPTION = "one of several pictures in a sample whose captions are not named after one of them"

# Names of the maps that ControlNet's and WebDataset's samples have beside a picture, as in `000.depth.png`.
_MAPS = {
    "depth", "disparity", "mask", "masks", "matte", "trimap", "alpha", "seg", "segm", "segmentation", "semantic",
    "panoptic", "instance", "canny", "edge", "edges", "hed", "pidi", "softedge", "scribble", "sketch", "lineart",
    "mlsd", "pose", "openpose", "densepose", "keypoints", "skeleton", "landmarks", "normal", "normals", "flow",
    "albedo", "label", "labels", "annotation", "control", "conditioning", "condition", "hint", "heatmap", "saliency",
    "thumb", "thumbnail", "preview", "masklabel", "condlabel",
}  # fmt: skip
_PICTURE_WORDS = {"image", "img", "picture", "photo", "rgb", "color", "colour", "original", "orig", "input", "output"}
_TEXT_WORDS = {"caption", "captions", "text", "txt", "prompt", "alt", "description", "title", "tags", "blip", "llava"}
_MAX_LOOSE = 16  # captions with other names that are tried for the only picture of a sample
_WORD = re.compile(r"[a-z]+")


class Captioned(NamedTuple):
    """A picture with its caption, and the content of its JSON."""

    member: Member
    caption: Caption
    json: JsonObject


class Refused(NamedTuple):
    """A picture that is not used, and the reason; None if no caption was found for it."""

    member: Member
    reason: str | None


@dataclass
class Sample:
    """Members with the same name up to the first dot.

    captioned, refused: its pictures.
    bare_captions: names, up to the last dot, of captions that belong to none of its pictures.
    """

    key: str
    captioned: list[Captioned] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    bare_captions: list[str] = field(default_factory=list)


def sample_key(name: str) -> str:
    """Returns a name up to the first dot, which the members of a sample have in common."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def match_captions(key: str, members: Sequence[Member], read: Callable[[Member], bytes], *, scores: bool) -> Sample:
    """Returns the pictures of a sample with their captions.

    Args:
        read: returns the content of a member.
        scores: whether the numbers in a picture's JSON are wanted.
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
    loose = [_LooseCaption(name, key) for name in texts if name not in used]
    # The first that may belong to any picture, and the first that may belong to some: there can be 100,000 of both.
    likely = [*[o for o in loose if o.for_any][:1], *[o for o in loose if o.for_some][:1]]
    related = sorted((o for o in loose if len(stems) == 1 and o.may_belong_to(*stems)), key=_LooseCaption.order)
    used |= {caption.name for caption in related}
    for picture in pictures:
        own = stem(picture.name)
        names = [own, picture.name, *(caption.name for caption in related[:_MAX_LOOSE])]
        try:
            files = [texts[name] for name in names if name in texts]
            caption, json = _read_caption(files, read, scores)
        except Unusable as reason:
            sample.refused.append(Refused(picture, str(reason)))
            continue
        if caption.text:
            sample.captioned.append(Captioned(picture, caption, json))
        elif len(stems) > 1 and (ambiguous := [each for each in likely if each.may_belong_to(own)]):
            used.add(ambiguous[0].name)
            sample.refused.append(Refused(picture, AMBIGUOUS_CAPTION))
        else:
            sample.refused.append(Refused(picture, None))
    sample.bare_captions = [each for each in texts if each not in used]
    return sample


def _is_map(picture: Member, key: str, texts: dict[str, dict[str, Member]]) -> bool:
    """Returns whether a picture is by its name a map of another one: `x.depth.png`, without a caption of its own."""
    name = stem(picture.name)
    part = name.removeprefix(key).lower()
    if "." not in part or " " in part or {*ENDINGS} & {*texts.get(name, {})}:
        return False
    words = _WORD.findall(part.rpartition(".")[2])
    if not words:
        return False
    return words[0] in _MAPS or words[-1] in _MAPS


def picture_of_map(name: str) -> str | None:
    """Returns the name up to its ending of the picture beside which a picture is a map by its name: `cat` of
    `cat-mask.png`, as other trainers lay them out. None if it is no map."""
    picture, _, kind = max((stem(name).rpartition(mark) for mark in "-_."), key=lambda each: len(each[0]))
    return picture if kind.lower() in _MAPS else None


class _LooseCaption:
    """A caption whose name, up to the last dot, no picture of the sample has.

    for_any: its name says that it is a caption, so it may belong to any picture.
    for_some: its name has words, so it may belong to a picture whose name has none.
    """

    def __init__(self, name: str, key: str) -> None:
        words = _words(name, key)
        self.name = name
        self._key = key
        self.for_any = name == key or bool(words & _TEXT_WORDS)
        self.for_some = bool(words)

    def may_belong_to(self, picture: str) -> bool:
        """Returns whether the caption may belong to this picture if the sample has no other.

        One of the two names must have nothing, or a kind of file, after its first dot. A caption that has only a number
        there, such as 2021.05.txt, belongs to one of several pictures.
        """
        bare = picture == self._key or bool(_words(picture, self._key) & _PICTURE_WORDS)
        return self.for_any or (self.for_some and bare)

    def order(self) -> tuple[bool, bool]:
        return self.name != self._key, not self.for_any


def _words(name: str, key: str) -> set[str]:
    return {*_WORD.findall(name.removeprefix(key).lower())}


def _read_caption(
    files: list[dict[str, Member]], read: Callable[[Member], bytes], scores: bool
) -> tuple[Caption, JsonObject]:
    """Returns the first caption that is not empty, and the first JSON that is not. Raises Unusable.

    Args:
        files: for each possible name of the caption, the members by their endings.
    """
    caption, json = Caption(""), JsonObject()
    for by_ending in files:
        for each in ENDINGS:
            if not caption.text and (member := by_ending.get(each)) is not None:
                if member.size > MAX_CAPTION:
                    raise Unusable(LONG_CAPTION)
                caption = decoded_caption(read(member))
    for by_ending in files:
        if (member := by_ending.get(JSON)) is not None and not (caption.text and (json or not scores)):
            if member.size > MAX_JSON:
                raise Unusable(BAD_JSON)
            content = _parse(read(member))
            json = json or content
            caption = caption if caption.text else _caption_in(content)
    return caption, json


def _caption_in(json: JsonObject) -> Caption:
    texts = (json[name] for name in CAPTIONS if isinstance(json.get(name), str))
    for text in texts:
        if len(text) > MAX_CAPTION:
            raise Unusable(LONG_CAPTION)
        if (caption := clean_caption(text)).text:
            return caption
    return Caption("")


def _parse(content: bytes) -> JsonObject:
    try:
        value = parse_json(content, nan_is_null=True)
    except Malformed:
        raise Unusable(BAD_JSON) from None
    return value if isinstance(value, dict) else {}
