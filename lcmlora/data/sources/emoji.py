"""Source `emoji`: emoji as captioned pictures, in several artists' styles, placed at random on a random background.

The artwork and its names come from npm packages (see package.json). Every style is keyed by code point, so one caption
belongs to the same subject in every style: the embedded base has several pictures to draw for it.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from lcmlora import extras
from lcmlora.config import Data
from lcmlora.data.reading.candidates import clean_caption
from lcmlora.data.sources.source import Record, Source, Survey
from lcmlora.errors import UserError

SIDE = 128  # pixels of a drawing if no other size is asked for

# Iconify ships no code points for these two sets; their icons carry the names of a set that has them.
_NAMED_LIKE = {"noto-v1": "noto", "fluent-emoji": "fluent-emoji-flat"}
STYLES = ("noto", "twemoji", "fluent-emoji-flat", "noto-v1", "fluent-emoji", "fluent-emoji-high-contrast")


@dataclass(frozen=True)
class Subject:
    """One emoji: its Unicode code points, its label ("red apple") and its keywords."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str


def _normal(code: str) -> str:
    # FE0F only asks for the coloured presentation; some sets write it and some do not.
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _read_json(modules: Path, name: str) -> Any:
    path = modules / name
    if not path.is_file():
        raise UserError(
            f"{path}: the emoji artwork is not installed; run `npm ci --ignore-scripts` in {modules.parent}"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); run `npm ci --ignore-scripts` in {modules.parent}") from None


@cache
def subjects(modules: Path, groups: tuple[str, ...]) -> tuple[Subject, ...]:
    """Returns the subjects of the named emojibase groups in Unicode order, without skin tone variants.

    Raises:
        UserError: the packages are not installed, or a group does not exist.
    """
    names = {g["order"]: g["key"] for g in _read_json(modules, "emojibase-data/en/messages.json")["groups"]}
    unknown = set(groups) - set(names.values())
    if unknown:
        raise UserError(f"data.groups: no emoji group {sorted(unknown)}; there are {sorted(names.values())}")
    entries = _read_json(modules, "emojibase-data/en/data.json")
    return tuple(
        Subject(_normal(e["hexcode"]), e["label"], tuple(e.get("tags", ())), names[e["group"]])
        for e in sorted(entries, key=lambda e: e.get("order", 0))
        if names.get(e.get("group", -1)) in groups
    )


@dataclass(frozen=True)
class Artwork:
    """One style's drawings by code point; `svg` holds the inner markup and the side of its square view box."""

    style: str
    icons: dict[str, tuple[str, float, float]]

    def digest(self, code: str) -> str:
        body, width, height = self.icons[code]
        return hashlib.sha256(f"{width}x{height}:{body}".encode()).hexdigest()


@cache
def artwork(modules: Path, style: str) -> Artwork:
    """Returns the drawings of one style. Raises UserError if the style is not known or not installed."""
    if style not in STYLES:
        raise UserError(f"data.styles: no emoji style {style!r}; there are {', '.join(STYLES)}")
    names = _read_json(modules, f"@iconify-json/{_NAMED_LIKE.get(style, style)}/chars.json")
    pack = _read_json(modules, f"@iconify-json/{style}/icons.json")
    icons = {}
    for code, name in names.items():
        icon = pack["icons"].get(name)
        if icon:
            size = (icon.get("width", pack["width"]), icon.get("height", pack["height"]))
            icons[_normal(code)] = (icon["body"], *size)
    return Artwork(style, icons)


@dataclass(frozen=True)
class Placement:
    """The placement of an emoji in its square picture: lengths are shares of the side, `turn` is in degrees."""

    scale: float
    x: float
    y: float
    turn: float
    mirrored: bool
    ground: str

    @classmethod
    def draw(cls, key: str) -> Placement:
        """Returns the placement for this key, always the same one."""
        rng = random.Random(key)
        scale = rng.uniform(0.72, 0.98)
        room = (1 - scale) / 2
        if rng.random() < 0.25:
            ground = "#ffffff"
        else:
            rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.6), rng.uniform(0.75, 1.0))
            ground = "#" + "".join(f"{round(255 * c):02x}" for c in rgb)
        return cls(
            scale,
            0.5 + rng.uniform(-room, room),
            0.5 + rng.uniform(-room, room),
            rng.gauss(0, 6),
            rng.random() < 0.5,
            ground,
        )


def render(art: Artwork, code: str, size: int, placement: Placement) -> Image.Image:
    """Returns the drawing as an RGB picture of size x size pixels.

    Raises:
        MissingExtra: resvg is not installed.
    """
    extras.require("resvg_py", extra="emoji", needed_by="data.source: emoji")
    import resvg_py

    body, width, height = art.icons[code]
    p = placement
    factor = p.scale / max(width, height)
    flip = -factor if p.mirrored else factor
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 1 1">'
        f'<g transform="translate({p.x:.5f} {p.y:.5f}) rotate({p.turn:.3f}) scale({flip:.6f} {factor:.6f}) '
        f'translate({-width / 2} {-height / 2})">{body}</g></svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background=p.ground, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


class Emoji(Source):
    """Every subject of `data.groups` in every style of `data.styles`; `data.path` is the package-lock.json beside the
    node_modules that have them. A key is style/code/copy."""

    has_sizes = False

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._modules = Path(data.path).parent / "node_modules"

    def survey(self) -> Survey:
        data = self.data
        side = max(SIDE, data.min_side)  # drawings have no size of their own, so min_side drops none
        records = []
        for style in data.styles:
            art = artwork(self._modules, style)
            for subject in subjects(self._modules, data.groups):
                for copy in range(data.copies if subject.code in art.icons else 0):
                    key = f"{style}/{subject.code}/{copy}"
                    drawing = f"{art.digest(subject.code)} {Placement.draw(key)}"
                    digest = hashlib.sha256(drawing.encode()).hexdigest()
                    records.append(Record(key, clean_caption(subject.label).text, digest, side, side))
        if not records:
            raise UserError("data: source emoji needs data.styles and data.groups; with these there is not one picture")
        return Survey(records, [])

    def picture(self, record: Record, size: int | None = None) -> Image.Image:
        style, code, _ = record.key.split("/")
        art = artwork(self._modules, style)
        return render(art, code, size or record.width, Placement.draw(record.key))

    def readers(self) -> int:
        return 1  # drawing holds Python's global lock, so a second thread would only wait
