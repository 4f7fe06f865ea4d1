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
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from lcmlora.config import Data
from lcmlora.data import remedies
from lcmlora.data.decoding import decode
from lcmlora.data.duplicates import perceptual_hash
from lcmlora.data.reading.candidates import Candidate, Rejection, Source, Unusable, clean_caption, printable
from lcmlora.data.sources import emoji, prompts, splits
from lcmlora.data.sources.folder import Folder
from lcmlora.data.sources.inputs import Inputs
from lcmlora.data.sources.parquet import Parquet
from lcmlora.data.sources.tars import Tars
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write
from lcmlora.io.isolation import isolated
from lcmlora.progress import track

EMOJI_SIDE = 128  # pixels of a drawing that nobody asked for in another size
RESIZE_FILTER = "lanczos"


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
    note: what could not be read of the picture, though it is used.
    """

    key: str
    caption: str
    sha256: str
    width: int
    height: int
    place: str | None = None
    raw_caption: str | None = None
    look: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Found:
    """What lies at `data.path`.

    records: the usable pictures, in a stable order.
    left_out: names that belong to a split which is not wanted, by split.
    of_pictures: whether these are names of pictures; else they are of files with many.
    passed_over: files that nothing is made of, as `census.Census.report` has them.
    """

    records: list[Record]
    rejections: list[Rejection]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    passed_over: dict[str, Any] = field(default_factory=dict)
    of_pictures: bool = False


def find(data: Data) -> tuple[list[Record], list[Rejection]]:
    """Returns the usable pictures and the others of what `survey` finds."""
    found = survey(data)
    return found.records, found.rejections


def survey(data: Data) -> Found:
    """Returns what lies at `data.path`, down to the last file. Reads each picture once.

    Raises:
        UserError: no such folder or file, no pictures in it, or so many without a caption that the layout must be
            another one (data.max_rejected).
    """
    if data.source == "emoji":
        return Found(_find_emoji(data), [])
    if data.source == "folder":
        folder = Folder(data.path, data.links, data.split)
        candidates, rejections = folder.candidates(data.scores)
        passed_over, left_out = folder.census().report(), folder.left_out
        # Before hours are spent on decoding the few that have a caption.
        remedies.check_captions(data, rejections, len(candidates) + len(rejections), passed_over)
    else:
        files = Inputs(data.path, data.links, data.split)
        candidates, rejections = _in_files(data, files)
        rejections += files.rejections()
        passed_over, left_out = files.census().report(), files.left_out
    if data.source == "prompts":
        records = [_unpictured(c, copy) for copy in range(data.copies) for c in candidates]
    else:
        records = _examined(data, candidates, rejections)
    return Found(records, rejections, left_out, passed_over, data.source == "folder")


def _in_files(data: Data, files: Inputs) -> tuple[list[Candidate], list[Rejection]]:
    if data.source == "prompts":
        return prompts.find(data.path, files)
    if data.source == "parquet":
        return Parquet(data.path, files).candidates(data.scores)
    candidates, rejections = Tars(data.path, files).candidates(data.scores)
    # Of what is packed, as `tar c train test` does, unless the name of the tar file says what all of it is.
    inside = {candidate.key: _inside(candidate) for candidate in candidates}
    kept, left_out = splits.choose(data.path, inside.values(), data.split)
    wanted = {*kept}
    for split, names in left_out.items():
        files.left_out[split] = [*files.left_out.get(split, []), *names]
    rejections = [rejection for rejection in rejections if _split_in_tar(rejection.name) not in left_out]
    return [candidate for candidate in candidates if inside[candidate.key] in wanted], rejections


def _split_in_tar(name: str) -> str | None:
    tar, ending, member = name.partition(".tar/")
    return splits.of(member) if ending and not splits.of(f"{tar}.tar", container=True) else None


def _inside(candidate: Candidate) -> str:
    """Returns the name of a picture in its tar file, below a folder that says the split where the tar file does."""
    tar = candidate.place.rpartition("@")[0]
    name = candidate.key.removeprefix(f"{printable(tar)}/")
    split = splits.of(tar, container=True)
    return f"{split}/{name}" if split else name


def _examined(data: Data, candidates: list[Candidate], rejections: list[Rejection]) -> list[Record]:
    """Returns the pictures that can be decoded, and adds the others to the rejections."""
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
    return [r for r in results if isinstance(r, Record)]


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


@lru_cache(1)  # with what it has read already: files that were opened, groups of rows
def _opened(kind: str, path: str, links: str) -> Source:
    if kind == "folder":
        return Folder(path, links)
    return Parquet(path) if kind == "parquet" else Tars(path)


def _reader(data: Data) -> Source:
    return _opened(data.source, data.path, data.links)


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
        content = _reader(data).read(record.place or record.key)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise Unusable("it has changed")
        return decode(content)[0]
    except Unusable as reason:
        raise UserError(
            f"{data.path}: {record.key}: {reason}, but it was good when the list was made; run `lcmlora prepare`"
        ) from None


def glimpse(data: Data, side: int, place: str) -> bytes | None:
    """Returns a picture as a JPEG of at most `side` pixels; None where it cannot be decoded."""
    try:
        picture, _ = decode(_reader(data).read(place))
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


# --- pictures in files ------------------------------------------------------------------------------------------


def _examine(data: Data, candidate: Candidate) -> Record | Rejection:
    try:
        content = _reader(data).read(candidate.place)
        # Pillow warns about what is over its limit and refuses only what is over it twice; here the limit counts.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture, note = decode(content)
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
        note=note,
    )
