"""Where captioned pictures come from, and how a picture is read safely: sources `emoji` and `folder`.

A picture is decoded as what its bytes are, whatever its name says, and only as JPEG, PNG or WebP. What cannot be used
becomes a `Rejection` with a reason; what is a mistake of layout (no pictures, no captions) is an error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import unicodedata
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lcmlora.config import Data
from lcmlora.data import emoji
from lcmlora.errors import UserError
from lcmlora.files import atomic_write
from lcmlora.progress import track

EMOJI_SIDE = 128  # pixels of a drawing that nobody asked for in another size
RESIZE_FILTER = "lanczos"

_FORMATS = ("JPEG", "PNG", "WEBP")  # every further decoder of Pillow is a further way in for hostile files
# What a person would call a picture. The ones that are not in _FORMATS are reported instead of overlooked.
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2"}
_METADATA = ("metadata.jsonl", "metadata.csv")
_MAX_BYTES = 1 << 28  # of a file; uncompressed, the largest picture that Pillow opens has as many

NOT_A_PICTURE = "not a JPEG, PNG or WebP picture, or its header is broken"
DAMAGED = "damaged or truncated"
TOO_LARGE = "too many pixels or bytes (decompression bomb)"
EMPTY = "file of zero bytes"
MISSING = "no such file"
UNREADABLE = "file cannot be read"
TWICE = "named twice in the metadata; the first caption counts"
OUTSIDE = "leads out of the folder"
NOT_UTF8 = "file name or caption is not UTF-8"


@dataclass(frozen=True)
class Record:
    """One captioned picture that can be used.

    key: unique and stable; a path below `data.path`, or style/code/copy of an emoji.
    sha256: of the file's bytes; for emoji of drawing and placement.
    width, height: pixels, upright (after EXIF rotation).
    """

    key: str
    caption: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Rejection:
    """A picture that cannot be used, and why."""

    name: str
    reason: str


class _Unusable(Exception):
    """The reason why the picture at hand is rejected."""


def find(data: Data) -> tuple[list[Record], list[Rejection]]:
    """Returns the usable pictures of `data.path`, in a stable order, and the others with reasons. Reads each once.

    Raises:
        UserError: no such folder, no pictures in it, pictures without captions, or metadata that cannot be understood.
    """
    return (_find_emoji(data), []) if data.source == "emoji" else _find_in_folder(data.path)


def open_picture(data: Data, record: Record, *, size: int | None = None) -> Image.Image:
    """Returns the picture in RGB, upright, alpha over white; of an animation the first frame.

    Args:
        size: side in pixels at which an emoji is drawn, by default `record.width`. Pictures in files have their own.

    Raises:
        UserError: the file is gone or is not the one that `prepare` saw.
    """
    if data.source == "emoji":
        style, code, _ = record.key.split("/")
        art = emoji.artwork(_modules(data), style)
        return emoji.render(art, code, size or record.width, emoji.Placement.draw(record.key))
    path = data.path / record.key
    try:
        content = _read(path)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise _Unusable("it has changed")
        return _decode(content)
    except _Unusable as reason:
        raise UserError(f"{path}: {reason}, but it was good when the list was made; run `lcmlora prepare`") from None


def fit(picture: Image.Image, resolution: int) -> tuple[Image.Image, tuple[int, int]]:
    """Returns the centre of the picture as resolution x resolution pixels, and (top, left) of that crop.

    The shorter side is resized to `resolution` (RESIZE_FILTER) and the longer one is cropped.
    """
    factor = resolution / min(picture.size)
    width, height = (max(resolution, round(side * factor)) for side in picture.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    resized = picture.resize((width, height), Image.Resampling[RESIZE_FILTER.upper()])
    return resized.crop((left, top, left + resolution, top + resolution)), (top, left)


def read_records(path: Path) -> list[Record]:
    """Returns the records of a list that `write_records` wrote. Raises UserError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Record(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        raise UserError(f"{path}: no such list of pictures; run `lcmlora prepare`") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a list of pictures ({error}); run `lcmlora prepare`") from None


def write_records(path: Path, records: list[Record]) -> None:
    """Writes one JSON object a line, with the fields of `Record`."""
    # ASCII, because str.splitlines also breaks at characters that JSON leaves bare (U+2028, U+0085).
    text = "".join(json.dumps(asdict(record), sort_keys=True) + "\n" for record in records)
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


def clean_caption(text: str) -> str:
    """Returns the caption in NFKC without control characters and surplus white space."""
    plain = (" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in unicodedata.normalize("NFKC", text))
    return " ".join("".join(plain).split())


# --- emoji ------------------------------------------------------------------------------------------------------


def _modules(data: Data) -> Path:
    return data.path.parent / "node_modules"


def _find_emoji(data: Data) -> list[Record]:
    side = max(EMOJI_SIDE, data.min_side)  # drawings have no size of their own, so min_side drops none
    records = []
    for style in data.styles:
        art = emoji.artwork(_modules(data), style)
        for subject in emoji.subjects(_modules(data), data.groups):
            for copy in range(data.copies if subject.code in art.icons else 0):
                key = f"{style}/{subject.code}/{copy}"
                drawing = f"{art.digest(subject.code)} {emoji.Placement.draw(key)}"
                digest = hashlib.sha256(drawing.encode()).hexdigest()
                records.append(Record(key, clean_caption(subject.label), digest, side, side))
    if not records:
        raise UserError("data: source emoji needs data.styles and data.groups; with these there is not one picture")
    return records


# --- folder -----------------------------------------------------------------------------------------------------


def _find_in_folder(folder: Path) -> tuple[list[Record], list[Rejection]]:
    if not folder.is_dir():
        raise UserError(f"data.path: {folder} is not a folder; source folder needs one with pictures and captions")
    root = folder.resolve()
    files = [p for p in root.rglob("*") if not p.is_dir() and not _hidden(root, p)]
    captions, rejections = _metadata_captions(root, [p for p in files if p.name in _METADATA])
    pictures = {p for p in files if p.suffix.lower() in _SUFFIXES} | set(captions)
    if not pictures:
        raise UserError(f"{folder}: no pictures (JPEG, PNG or WebP) in this folder or below it")
    candidates, bare = [], []
    for path in sorted(pictures):
        key = path.relative_to(root).as_posix()
        try:
            _check(root, path)
            caption = captions.get(path) or _caption_beside(root, path)
        except _Unusable as reason:
            rejections.append(Rejection(_printable(key), str(reason)))
            continue
        if caption:
            candidates.append((root, key, caption))
        else:
            bare.append(key)
    if bare:
        names = ", ".join(bare[:3]) + (", ..." if len(bare) > 3 else "")
        raise UserError(
            f"{folder}: {len(bare)} of {len(bare) + len(candidates)} pictures have no caption ({names}); put it into a "
            ".txt file of the same name, or into metadata.jsonl or metadata.csv with file_name and text"
        )
    # Pillow warns about what is over its limit and refuses only what is over it twice; here the limit counts.
    with warnings.catch_warnings(), ThreadPoolExecutor(workers()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        results = list(track(pool.map(_examine, candidates), "read pictures", total=len(candidates)))
    rejections += [r for r in results if isinstance(r, Rejection)]
    return [r for r in results if isinstance(r, Record)], rejections


def workers() -> int:
    """How many threads decode pictures: Pillow leaves the interpreter's lock, and a large picture takes 0.4 GB."""
    return min(8, os.cpu_count() or 1)


def _hidden(root: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _check(root: Path, path: Path) -> None:
    try:
        if not path.is_file():
            raise _Unusable(MISSING)
    except OSError:  # a name too long
        raise _Unusable(MISSING) from None
    if not path.resolve().is_relative_to(root):
        raise _Unusable(OUTSIDE)
    if _printable(str(path)) != str(path):
        raise _Unusable(NOT_UTF8)


def _caption_beside(root: Path, path: Path) -> str:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return ""
    _check(root, beside)
    try:
        return clean_caption(beside.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise _Unusable(NOT_UTF8) from None
    except OSError:
        raise _Unusable(UNREADABLE) from None


def _metadata_captions(root: Path, tables: list[Path]) -> tuple[dict[Path, str], list[Rejection]]:
    """Returns the caption of every picture that a metadata file names, whether there is such a file or not."""
    captions: dict[Path, str] = {}
    rejections = []
    for table in sorted(tables):
        if not table.resolve().is_relative_to(root):
            raise UserError(f"{table}: is a link out of the folder; put the file itself there")
        for name, text in _rows(table):
            path = Path(os.path.normpath(table.parent / name))
            if not path.is_relative_to(root):
                rejections.append(Rejection(_printable(name), OUTSIDE))
            elif path in captions:
                rejections.append(Rejection(_printable(name), TWICE))
            else:
                captions[path] = clean_caption(text)
    return captions, rejections


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """Yields (file_name, text) of every row of a metadata file."""
    number = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = (
                csv.DictReader(file) if table.suffix == ".csv" else (json.loads(line) for line in file if line.strip())
            )
            for number, row in enumerate(rows, start=1):
                name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
                if not isinstance(name, str) or not isinstance(text, str):
                    raise UserError(f"{table}: row {number}: expected texts file_name and text, got {str(row)[:200]}")
                yield name, text
    except (ValueError, RecursionError, csv.Error, OSError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{table}: cannot be read after row {number}: {error}") from None


# --- decoding ---------------------------------------------------------------------------------------------------


def _examine(candidate: tuple[Path, str, str]) -> Record | Rejection:
    root, key, caption = candidate
    try:
        content = _read(root / key)
        picture = _decode(content)
    except _Unusable as reason:
        return Rejection(key, str(reason))
    return Record(key, caption, hashlib.sha256(content).hexdigest(), *picture.size)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not 0 < size <= _MAX_BYTES:
            raise _Unusable(TOO_LARGE if size else EMPTY)
        return path.read_bytes()
    except OSError:
        raise _Unusable(UNREADABLE) from None


def _decode(content: bytes) -> Image.Image:
    try:
        with Image.open(
            io.BytesIO(content), formats=_FORMATS
        ) as opened:  # reads the size, refuses bombs, no pixels yet
            return _to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise _Unusable(NOT_A_PICTURE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _Unusable(TOO_LARGE) from None
    except Exception:  # decoders raise whatever broken bytes lead them to
        raise _Unusable(DAMAGED) from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255 instead of scaling
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
