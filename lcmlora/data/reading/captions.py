"""Captions in files beside the pictures of a folder: finds the files of each picture, and reads them.

The caption file has the picture's name: `cat.png` has `cat.txt` or `cat.png.txt`, in any case of letters. If several
files have a caption, the first one that is not empty counts: .txt, then .caption, then .text, then the `caption`,
`text` or `prompt` of a .json. Several lines are one caption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from lcmlora.data.reading.candidates import (
    CAPTIONS,
    LONG_CAPTION,
    MAX_CAPTION,
    TEXTS,
    Caption,
    Unusable,
    clean_caption,
    decoded_caption,
    scores_in,
)
from lcmlora.data.reading.file_names import ending, stem
from lcmlora.data.reading.picture_folders import PictureFolder
from lcmlora.io.parsing import JsonObject, Malformed, parse_json

JSON = ".json"
BAD_JSON = "the JSON beside it cannot be read"
_LAST_TURN = 38
_MAX_JSON = 1 << 20  # bytes; it may hold more than a caption


class Description(NamedTuple):
    """A picture's caption, and its numbers for `data.scores`."""

    caption: Caption
    scores: dict[str, float]


class CaptionFile(NamedTuple):
    """A file that may have a picture's caption.

    size: its bytes.
    refusal: why it must not be read; empty if it may be.
    """

    name: str
    size: int
    refusal: str = ""


class ReadDescription(NamedTuple):
    """A picture's description, or why the picture is refused; and the files that were read for it.

    turn: when it was found, for the order of the refused ones.
    """

    description: Description | Unusable
    files: list[str]
    turn: int


def read_captions(
    folder: PictureFolder, files: dict[str, list[CaptionFile]], scores: tuple[str, ...]
) -> dict[str, ReadDescription]:
    """Returns the descriptions of pictures from the files beside them; leaves out pictures whose files are all empty.

    Args:
        files: of each picture, the one that counts first.
        scores: names of the numbers that are wanted; a .json has them, whichever file has the caption.
    """
    found: dict[str, ReadDescription] = {}
    texts = {picture: [file for file in all_ if ending(file.name).lower() != JSON] for picture, all_ in files.items()}
    turn = 0
    while next_files := {picture: rest.pop(0) for picture, rest in texts.items() if rest and picture not in found}:
        for picture, content in _contents(folder, next_files, MAX_CAPTION):
            file = next_files[picture]
            at = min(turn, _LAST_TURN) + (not file.refusal)
            try:
                if isinstance(content, Unusable):
                    raise content
                if (caption := decoded_caption(content)).text:
                    found[picture] = ReadDescription(Description(caption, {}), [file.name], at)
            except Unusable as reason:
                found[picture] = ReadDescription(reason, [file.name], at)
        turn += 2
    jsons = {picture: all_[-1] for picture, all_ in files.items() if all_ and ending(all_[-1].name).lower() == JSON}
    jsons = {picture: file for picture, file in jsons.items() if scores or picture not in found}
    for picture, content in _contents(folder, jsons, _MAX_JSON):
        known, file = found.get(picture), jsons[picture]
        description: Description | Unusable
        try:
            fields = _json(content)
            if known is None:
                caption = caption_in(fields)
            elif isinstance(known.description, Unusable):
                continue
            else:
                caption = known.description.caption
            if not caption.text:
                continue
            description = Description(caption, scores_in(fields, scores))
        except Unusable as reason:
            description = reason
        read = [*(known.files if known else ()), file.name]
        at = known.turn if known else _LAST_TURN + 2 + (not file.refusal)
        found[picture] = ReadDescription(description, read, at)
    return found


def caption_in(fields: Mapping[str, object], names: Collection[str] = CAPTIONS) -> Caption:
    """Returns the caption in a row or a JSON object: the first of these fields that is not empty; else an empty one.

    Raises:
        Unusable: it is too long.
    """
    texts = (text for name in names if isinstance(text := fields.get(name), str))
    text = next((text for text in texts if text.strip()), "")
    if len(text) > MAX_CAPTION:
        raise Unusable(LONG_CAPTION)
    return clean_caption(text)


def _contents(
    folder: PictureFolder, files: dict[str, CaptionFile], limit: int
) -> Iterable[tuple[str, bytes | Unusable]]:
    """Yields the content of each picture's file, or the reason why it cannot be used."""
    yield from ((picture, Unusable(file.refusal)) for picture, file in files.items() if file.refusal)
    readable = {picture: file for picture, file in files.items() if not file.refusal}
    sizes = {file.name: file.size for file in readable.values()}
    yield from zip(readable, folder.read_small_files([f.name for f in readable.values()], sizes, limit), strict=True)


def _json(content: bytes | Unusable) -> JsonObject:
    if isinstance(content, Unusable):
        raise content
    if len(content) > _MAX_JSON:
        raise Unusable(BAD_JSON)
    try:
        value = parse_json(content, nan_is_null=True)
    except Malformed:
        raise Unusable(BAD_JSON) from None
    return value if isinstance(value, dict) else {}


def stems_of(picture: str) -> tuple[str, str]:
    """Returns the names without ending that a caption file of a picture may have."""
    return stem(picture), picture


def is_caption_file(name: str) -> bool:
    return ending(name).lower() in (*TEXTS, JSON)


def order(name: str) -> tuple[int, bool]:
    """Sorts caption files of one name by their endings: the one that counts comes first, and an ending in lower case
    before the same one in capitals."""
    suffix = ending(name)
    return (*TEXTS, JSON).index(suffix.lower()), suffix != suffix.lower()
