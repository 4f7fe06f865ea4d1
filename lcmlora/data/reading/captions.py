"""Which files of a folder have the captions of which pictures, and what they say.

A caption lies beside its picture under the same name: `cat.png` has `cat.txt` or `cat.png.txt`, in any case of letters.
Where several files have one, the first that says something counts: .txt, then .caption, then .text, then the `caption`,
`text` or `prompt` of a .json. Several lines are one caption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import Any, NamedTuple

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
from lcmlora.data.reading.file_names import Names
from lcmlora.data.reading.picture_folders import Place
from lcmlora.io.parsing import Malformed, parse_json

JSON = ".json"
BAD_JSON = "the JSON beside it cannot be read"
_MAX_JSON = 1 << 20  # bytes; it may have more than a caption

Told = tuple[Caption, dict[str, float]]


class Found(NamedTuple):
    """What the files beside a picture say of it, or why it is refused; and which files that were."""

    told: Told | Unusable
    files: list[str]


class Beside:
    """The files of captions in a folder, and those of each picture."""

    def __init__(self, names: Iterable[str]) -> None:
        self._files: dict[str, list[str]] = {}  # by their names without the ending, the first that counts first
        for name in sorted(names, key=_order):
            if _ending(name) in (*TEXTS, JSON):
                self._files.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
        self._stems = Names(self._files)

    def of(self, picture: str) -> list[str]:
        """Returns the files with captions of a picture, the one that counts first. Raises Unusable: it is ambiguous."""
        found: list[str] = []
        for stem in _stems(picture):
            stems = self._stems.alike(stem)
            if len(stems) > 1:
                files = " or ".join(self._files[each][0] for each in stems[:3])
                raise Unusable(AMBIGUOUS, f"its caption could be {files}")
            found += [name for each in stems for name in self._files[each] if name not in found]
        return found

    def all_of(self, picture: str) -> list[str]:
        """Returns the files that may have a caption of this picture, however ambiguous."""
        stems = {each for stem in _stems(picture) for each in self._stems.alike(stem)}
        return [name for each in stems for name in self._files[each]]


def read(place: Place, files: dict[str, list[str]], scores: tuple[str, ...]) -> dict[str, Found]:
    """Returns what the files beside pictures say of each; nothing of those whose files say nothing.

    Args:
        files: of each picture, the one that counts first.
        scores: numbers that are wanted of each; a .json has them, whichever file has the caption.
    """
    found: dict[str, Found] = {}
    texts = {picture: [name for name in names if _ending(name) != JSON] for picture, names in files.items()}
    while left := {picture: names.pop(0) for picture, names in texts.items() if names and picture not in found}:
        for picture, content in _contents(place, left, MAX_CAPTION):
            try:
                if isinstance(content, Unusable):
                    raise content
                if (caption := decoded_caption(content)).text:
                    found[picture] = Found((caption, {}), [left[picture]])
            except Unusable as reason:
                found[picture] = Found(reason, [left[picture]])
    jsons = {picture: names[-1] for picture, names in files.items() if names and _ending(names[-1]) == JSON}
    jsons = {picture: name for picture, name in jsons.items() if scores or picture not in found}
    for picture, content in _contents(place, jsons, _MAX_JSON):
        known, read = found.get(picture, (None, []))
        try:
            fields = _json(content)
            caption = known[0] if isinstance(known, tuple) else caption_in(fields)
            if isinstance(known, Unusable) or not caption.text:
                continue
            found[picture] = Found((caption, scores_in(fields, scores)), [*read, jsons[picture]])
        except Unusable as reason:
            found[picture] = Found(reason, [*read, jsons[picture]])
    return found


def caption_in(fields: dict[str, Any], names: Collection[str] = CAPTIONS) -> Caption:
    """Returns the caption that a row or a JSON object has; an empty one where it has none. Raises Unusable."""
    text = next((fields[name] for name in names if isinstance(fields.get(name), str) and fields[name].strip()), "")
    if len(text) > MAX_CAPTION:
        raise Unusable(LONG_CAPTION)
    return clean_caption(text)


def _contents(place: Place, files: dict[str, str], limit: int) -> Iterable[tuple[str, bytes | Unusable]]:
    """Yields the content of each picture's file, or why there is none."""
    refused = {picture: place.tree.refused[name] for picture, name in files.items() if name in place.tree.refused}
    yield from ((picture, Unusable(reason)) for picture, reason in refused.items())
    wanted = [picture for picture in files if picture not in refused]
    yield from zip(wanted, place.texts([files[picture] for picture in wanted], limit), strict=True)


def _json(content: bytes | Unusable) -> dict[str, Any]:
    if isinstance(content, Unusable):
        raise content
    if len(content) > _MAX_JSON:
        raise Unusable(BAD_JSON)
    try:
        told = parse_json(content, nan_is_null=True)
    except Malformed:
        raise Unusable(BAD_JSON) from None
    return told if isinstance(told, dict) else {}


def _stems(picture: str) -> tuple[str, str]:
    return str(PurePosixPath(picture).with_suffix("")), picture


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _order(name: str) -> tuple[int, bool, str]:
    """Sorts by which ending counts first; the one that is spelled as people mostly do goes before one in capitals."""
    ending = PurePosixPath(name).suffix
    rank = (*TEXTS, JSON).index(ending.lower()) if ending.lower() in (*TEXTS, JSON) else 9
    return rank, ending != ending.lower(), name
