"""Captions in files beside the pictures of a folder: finds the files of each picture, and reads them.

The caption file has the picture's name: `cat.png` has `cat.txt` or `cat.png.txt`, in any case of letters. If several
files have a caption, the first one that is not empty counts: .txt, then .caption, then .text, then the `caption`,
`text` or `prompt` of a .json. Several lines are one caption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from lcmlora.data.reading.candidates import (
    AMBIGUOUS,
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
from lcmlora.data.reading.file_names import FileNames
from lcmlora.data.reading.picture_folders import PictureFolder
from lcmlora.io.parsing import JsonObject, Malformed, parse_json

JSON = ".json"
BAD_JSON = "the JSON beside it cannot be read"
_MAX_JSON = 1 << 20  # bytes; it may hold more than a caption


class Description(NamedTuple):
    """A picture's caption, and its numbers for `data.scores`."""

    caption: Caption
    scores: dict[str, float]


class ReadDescription(NamedTuple):
    """A picture's description, or why the picture is refused; and the files that were read for it."""

    description: Description | Unusable
    files: list[str]


class CaptionFiles:
    """The caption files of a folder, by picture."""

    def __init__(self, names: Iterable[str]) -> None:
        self._files: dict[str, list[str]] = {}  # by name without ending; the file that counts first comes first
        for name in sorted(names, key=_order):
            if _ending(name) in (*TEXTS, JSON):
                self._files.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
        self._stems = FileNames(self._files)

    def of(self, picture: str) -> list[str]:
        """Returns the caption files of a picture, the one that counts first. Raises Unusable if they are ambiguous."""
        files: list[str] = []
        for stem in _stems(picture):
            matches = self._stems.matches(stem)
            if len(matches) > 1:
                possible = " or ".join(self._files[match][0] for match in matches[:3])
                raise Unusable(AMBIGUOUS, f"its caption could be {possible}")
            files += [name for match in matches for name in self._files[match] if name not in files]
        return files

    def possible(self, picture: str) -> list[str]:
        """Returns the files that may have this picture's caption, also if they are ambiguous."""
        stems = {match for stem in _stems(picture) for match in self._stems.matches(stem)}
        return [name for stem in stems for name in self._files[stem]]


def read_captions(
    folder: PictureFolder, files: dict[str, list[str]], scores: tuple[str, ...]
) -> dict[str, ReadDescription]:
    """Returns the descriptions of pictures from the files beside them; leaves out pictures whose files are all empty.

    Args:
        files: of each picture, the one that counts first.
        scores: names of the numbers that are wanted; a .json has them, whichever file has the caption.
    """
    found: dict[str, ReadDescription] = {}
    texts = {picture: [name for name in names if _ending(name) != JSON] for picture, names in files.items()}
    while next_files := {picture: names.pop(0) for picture, names in texts.items() if names and picture not in found}:
        for picture, content in _contents(folder, next_files, MAX_CAPTION):
            try:
                if isinstance(content, Unusable):
                    raise content
                if (caption := decoded_caption(content)).text:
                    found[picture] = ReadDescription(Description(caption, {}), [next_files[picture]])
            except Unusable as reason:
                found[picture] = ReadDescription(reason, [next_files[picture]])
    jsons = {picture: names[-1] for picture, names in files.items() if names and _ending(names[-1]) == JSON}
    jsons = {picture: name for picture, name in jsons.items() if scores or picture not in found}
    for picture, content in _contents(folder, jsons, _MAX_JSON):
        known, read = found.get(picture, (None, []))
        try:
            fields = _json(content)
            caption = known.caption if isinstance(known, Description) else caption_in(fields)
            if isinstance(known, Unusable) or not caption.text:
                continue
            description = Description(caption, scores_in(fields, scores))
            found[picture] = ReadDescription(description, [*read, jsons[picture]])
        except Unusable as reason:
            found[picture] = ReadDescription(reason, [*read, jsons[picture]])
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


def _contents(folder: PictureFolder, files: dict[str, str], limit: int) -> Iterable[tuple[str, bytes | Unusable]]:
    """Yields the content of each picture's file, or the reason why it cannot be used."""
    all_refused = folder.listing.refused
    refused = {picture: all_refused[name] for picture, name in files.items() if name in all_refused}
    yield from ((picture, Unusable(reason)) for picture, reason in refused.items())
    readable = [picture for picture in files if picture not in refused]
    yield from zip(readable, folder.read_small_files([files[picture] for picture in readable], limit), strict=True)


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


def _stems(picture: str) -> tuple[str, str]:
    return str(PurePosixPath(picture).with_suffix("")), picture


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _order(name: str) -> tuple[int, bool, str]:
    """Sorts by the ending that counts first; an ending in lower case comes before the same one in capitals."""
    ending = PurePosixPath(name).suffix
    rank = (*TEXTS, JSON).index(ending.lower()) if ending.lower() in (*TEXTS, JSON) else 9
    return rank, ending != ending.lower(), name
