"""Where captioned pictures come from (`emoji`, `folder`, `parquet`, `webdataset`), and how a picture is read safely.
From `prompts` come captions alone.

A picture is decoded as what its bytes are, whatever its name says, and only as JPEG, PNG or WebP. What cannot be used
becomes a `Rejection` with a reason; what is a mistake of layout (no pictures, no captions) is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lcmlora.config import Data
from lcmlora.data import emoji, prompts
from lcmlora.data.candidates import (
    DAMAGED,
    NOT_A_PICTURE,
    TOO_LARGE,
    Candidate,
    Rejection,
    Source,
    Unusable,
    clean_caption,
)
from lcmlora.data.duplicates import perceptual_hash
from lcmlora.data.folder import Folder
from lcmlora.data.isolation import isolated
from lcmlora.data.parquet import Parquet
from lcmlora.data.tars import Tars
from lcmlora.errors import UserError
from lcmlora.files import atomic_write
from lcmlora.progress import track

EMOJI_SIDE = 128  # pixels of a drawing that nobody asked for in another size
RESIZE_FILTER = "lanczos"

_FORMATS = ("JPEG", "PNG", "WEBP")  # every further decoder of Pillow is a further way in for hostile files


@dataclass(frozen=True)
class Record:
    """One captioned picture that can be used.

    key: unique and stable; a path below `data.path`, with the place in the file it lies in, or style/code/copy of an
        emoji.
    sha256: of the picture's bytes; for emoji of drawing and placement; of prompt and copy where there is no picture.
    width, height: pixels, upright (after EXIF rotation); 0 where there is no picture.
    place: by which the source reads it, where that is not the key.
    raw_caption: as it was written, where cleaning took words from it.
    look: 64 bits of what it looks like, where near duplicates are asked for; 16 hexadecimal digits.
    """

    key: str
    caption: str
    sha256: str
    width: int
    height: int
    place: str | None = None
    raw_caption: str | None = None
    look: str | None = None


def find(data: Data) -> tuple[list[Record], list[Rejection]]:
    """Returns the usable pictures of `data.path`, in a stable order, and the others with reasons. Reads each once.

    Raises:
        UserError: no such folder or file, no pictures in it, pictures without captions, or metadata that cannot be
            understood.
    """
    if data.source == "emoji":
        return _find_emoji(data), []
    if data.source == "prompts":
        candidates, rejections = prompts.find(data.path)
        return [_unpictured(c, copy) for copy in range(data.copies) for c in candidates], rejections
    candidates, rejections = _source(data.source, data.path).candidates(data.scores)
    wanted = []
    for candidate in candidates:
        if reason := _low(candidate, data):
            rejections.append(Rejection(candidate.key, reason, candidate.place))
        else:
            wanted.append(candidate)
    examine = partial(_examine, data)
    found = isolated(examine, wanted, lambda c, reason: Rejection(c.key, reason), workers(), preload=__name__)
    results = list(track(found, "read pictures", total=len(wanted)))
    rejections += [r for r in results if isinstance(r, Rejection)]
    return [r for r in results if isinstance(r, Record)], rejections


def _unpictured(prompt: Candidate, copy: int) -> Record:
    text, raw = prompt.caption
    digest = hashlib.sha256(f"{copy}/{text}".encode()).hexdigest()
    return Record(f"{prompt.key}/{copy}", text, digest, 0, 0, raw_caption=raw)


def _low(candidate: Candidate, data: Data) -> str:
    """Returns which score is out of its range, as a reason; empty where all are within."""
    for name, (low, high) in ((name, (wanted.min, wanted.max)) for name, wanted in data.scores.items()):
        value = candidate.scores.get(name)
        if value is None:
            return f"no {name} (data.scores)"
        if low is not None and value < low:
            return f"{name} under {low:g} (data.scores)"
        if high is not None and value > high:
            return f"{name} over {high:g} (data.scores)"
    return ""


def _source(kind: str, path: str) -> Source:
    if kind == "parquet":
        return Parquet(path)
    return Tars(path) if kind == "webdataset" else Folder(path)


# With what it has read already: files that were opened, groups of rows.
_again = lru_cache(1)(_source)


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
    try:
        content = _again(data.source, data.path).read(record.place or record.key)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise Unusable("it has changed")
        return _decode(content)
    except Unusable as reason:
        raise UserError(
            f"{data.path}: {record.key}: {reason}, but it was good when the list was made; run `lcmlora prepare`"
        ) from None


def glimpse(data: Data, side: int, place: str) -> bytes | None:
    """Returns a picture as a JPEG of at most `side` pixels; None where it cannot be decoded."""
    try:
        picture = _decode(_again(data.source, data.path).read(place))
    except Unusable:
        return None
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()


def fit(picture: Image.Image, height: int, width: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Returns the centre of the picture in this size, by default a square, and (top, left) of that crop.

    It is resized (RESIZE_FILTER) until it just covers the size, and what stands over is cropped.
    """
    width = width or height
    factor = max(width / picture.width, height / picture.height)
    whole = max(width, round(picture.width * factor)), max(height, round(picture.height * factor))
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    resized = picture.resize(whole, Image.Resampling[RESIZE_FILTER.upper()])
    return resized.crop((left, top, left + width, top + height)), (top, left)


def read_records(path: Path) -> list[Record]:
    """Returns the records of a list that `write_records` wrote. Raises UserError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Record(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        raise UserError(f"{path}: no such list of pictures; run `lcmlora prepare`") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a list of pictures ({error}); run `lcmlora prepare`") from None


def write_records(path: Path, records: list[Record]) -> None:
    """Writes one JSON object a line, with the fields of `Record`."""
    # ASCII, because str.splitlines also breaks at characters that JSON leaves bare (U+2028, U+0085).
    plain = ({name: value for name, value in asdict(record).items() if value is not None} for record in records)
    text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in plain)
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


# --- emoji ------------------------------------------------------------------------------------------------------


def _modules(data: Data) -> Path:
    return Path(data.path).parent / "node_modules"


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
                records.append(Record(key, clean_caption(subject.label).text, digest, side, side))
    if not records:
        raise UserError("data: source emoji needs data.styles and data.groups; with these there is not one picture")
    return records


def workers() -> int:
    """How many threads or processes decode pictures: a large one takes 0.4 GB, and more while it is made RGB."""
    return min(8, os.cpu_count() or 1)


# --- decoding ---------------------------------------------------------------------------------------------------


def _examine(data: Data, candidate: Candidate) -> Record | Rejection:
    try:
        content = _again(data.source, data.path).read(candidate.place)
        # Pillow warns about what is over its limit and refuses only what is over it twice; here the limit counts.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = _decode(content)
    except Unusable as reason:
        return Rejection(candidate.key, str(reason))
    return Record(
        candidate.key,
        candidate.caption.text,
        hashlib.sha256(content).hexdigest(),
        *picture.size,
        place=None if candidate.place == candidate.key else candidate.place,
        raw_caption=candidate.caption.raw,
        look=None if data.near_duplicates is None else f"{perceptual_hash(picture):016x}",
    )


def _decode(content: bytes) -> Image.Image:
    try:
        with Image.open(
            io.BytesIO(content), formats=_FORMATS
        ) as opened:  # reads the size, refuses bombs, no pixels yet
            return _to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise Unusable(NOT_A_PICTURE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise Unusable(TOO_LARGE) from None
    except Exception:  # decoders raise whatever broken bytes lead them to
        raise Unusable(DAMAGED) from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255 instead of scaling
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
