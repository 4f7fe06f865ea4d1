"""The pictures that a report page embeds, cut out of the thumbnails of an evaluation."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lcmlora.errors import UserError
from lcmlora.io.documents import Document

_SIDE, _SMALLER_SIDE = 256, 192  # pixels of an embedded picture; the smaller one if there are more than _MANY
_MANY = 400  # pictures
SMALL = 128  # pixels up to which a picture is kept as it is and enlarged without smoothing
_QUALITY = 80  # of lossy WebP: some 10 kB for a photograph at 256 pixels, so 400 of them are below 6 MB


class PictureCaptions(Document):
    """prompts.json in a folder of thumbnails: the captions of the pictures, in their order."""

    prompts: list[str]


class PictureFacts(PictureCaptions):
    """prompts.json of the base's thumbnails, which also has their side in pixels."""

    side: int


class Picture(NamedTuple):
    """One embedded picture: a data: URI, and its description for people who cannot see it."""

    source: str
    alt: str


class Album:
    """The pictures in the folders of an evaluation, cut out of their rows of thumbnails."""

    def __init__(self, folders: Sequence[Path], count: int) -> None:
        """Reads pictures/prompts.json.

        Args:
            count: how many rows of thumbnails the page shows, which decides the size of each picture.
        """
        self._folders = [folder / "pictures" for folder in folders]
        facts = PictureFacts.read(self._find("prompts.json"))
        self.prompts = facts.prompts
        self.side = facts.side
        self._limit = _SIDE if count * len(self.prompts) <= _MANY else _SMALLER_SIDE

    def prompts_of(self, group: str) -> list[str]:
        """Returns the captions of a variation's pictures: its own where it has some, else the base's."""
        own = any((folder / group / "prompts.json").is_file() for folder in self._folders)
        return PictureCaptions.read(self._find(f"{group}/prompts.json")).prompts if own else self.prompts

    def thumbnails(self, name: str, text: str, group: str = "") -> list[Picture]:
        """Returns a picture for each prompt. Raises UserError if their file is missing or has another size."""
        prompts = self.prompts_of(group) if group else self.prompts
        cells = self._cells(f"{group}/{_file(name)}" if group else _file(name), len(prompts), 1)
        return [self._embed(cell, f"{text}: {prompt}") for cell, prompt in zip(cells, prompts, strict=True)]

    def first(self, name: str) -> Image.Image:
        """Returns a set's picture of the first prompt, as it was drawn. Raises UserError as `thumbnails`."""
        return next(self._cells(_file(name), len(self.prompts), 1))

    def sheet(self, name: str, texts: list[list[str]]) -> list[list[Picture]]:
        """Returns a sheet's pictures in rows, each with its text for those who cannot see it."""
        cells = self._cells(_file(name), len(texts), len(texts[0]))
        return [[self._embed(next(cells), text) for text in row] for row in texts]

    def _find(self, name: str) -> Path:
        for folder in self._folders:
            if (folder / name).is_file():
                return folder / name
        places = " or ".join(str(folder / name) for folder in self._folders)
        raise UserError(f"{places}: no such file, and the report shows it; evaluate again")

    def _cells(self, name: str, rows: int, columns: int) -> Iterator[Image.Image]:
        path, side = self._find(name), self.side
        with Image.open(path) as opened:
            sheet = opened.convert("RGB")
        if sheet.size != (columns * side, rows * side):
            raise UserError(
                f"{path}: is {sheet.width} x {sheet.height} pixels, expected {columns} x {rows} pictures of {side}; "
                "evaluate again"
            )
        return (
            sheet.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
            for y in range(rows)
            for x in range(columns)
        )

    def _embed(self, cell: Image.Image, alt: str) -> Picture:
        out = io.BytesIO()
        if self.side <= SMALL:
            cell.save(out, "WEBP", lossless=True, quality=100, method=4)
        else:
            size = min(self._limit, cell.width)
            cell.resize((size, size), Image.Resampling.LANCZOS).save(out, "WEBP", quality=_QUALITY, method=4)
        return Picture("data:image/webp;base64," + base64.b64encode(out.getvalue()).decode(), alt)


def _file(name: str) -> str:
    return f"{name.replace('/', '-')}.png"
