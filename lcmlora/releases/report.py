"""The report of a release: one HTML page with its pictures inside, read without a script and without a network."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lcmlora.errors import UserError
from lcmlora.evaluation.charts import NAMES
from lcmlora.evaluation.gate import unmeasured_retrieval
from lcmlora.evaluation.measures.distances import title_of
from lcmlora.io.parsing import as_object, read_json

_LARGEST, _SMALLER, _MANY = 256, 192, 400  # pixels of an embedded picture; fewer pixels for more pictures than _MANY
_SMALL = 128  # pixels up to which a picture is kept as it is and enlarged without smoothing
_QUALITY = 80  # of lossy WebP: some 10 kB for a photograph at 256 pixels, so 400 of them are below 6 MB
_PICTURED = 2  # numbers of network evaluations at which a variation shows pictures

# Figures that older evaluations and small ones do not have, or that were not measured on this machine.
_OPTIONAL = (
    *("latency", "seconds_per_picture", "diversity", "scores", "intervals", "advantage"),
    *("prompts", "real_pictures", "reference_digest"),
)
_MINUS, _NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
_PARTS = {"alone": "alone, best solver", "accelerated": "accelerated", "adapter": "adapter without the style"}


class Key(NamedTuple):
    """The name of a drawn set taken apart: `alone/dpm++@2` is part `alone`, method `dpm++`, 2 steps."""

    part: str
    method: str
    steps: int

    @classmethod
    def parse(cls, text: str) -> Key:
        """Reads a name; what has no steps, like `real`, gets 0 of them."""
        part, _, rest = text.rpartition("/")
        method, _, steps = rest.partition("@")
        return cls(part, method, int(steps or 0))

    @property
    def name(self) -> str:
        """How a reader calls the method."""
        return NAMES.get(self.method) or _PARTS.get(self.method, self.method)

    @property
    def label(self) -> str:
        """`DPM-Solver++, 2 steps`."""
        return f"{self.name}, {self.steps} step{'' if self.steps == 1 else 's'}" if self.steps else self.name


class Picture(NamedTuple):
    """One embedded picture: a data: URI, and what a person who cannot see it is told."""

    source: str
    alt: str


class Album:
    """The pictures in the folders of an evaluation, cut out of their strips."""

    def __init__(self, folders: Sequence[Path], count: int) -> None:
        """Reads pictures/prompts.json. `count`: how many strips will be shown, which decides their size."""
        self._folders = [folder / "pictures" for folder in folders]
        facts = self._facts("prompts.json", "prompts", "side")
        self.prompts: list[str] = facts["prompts"]
        self.side: int = facts["side"]
        self._limit = _LARGEST if count * len(self.prompts) <= _MANY else _SMALLER

    def prompts_of(self, group: str) -> list[str]:
        """Returns the captions of a variation's pictures, which may be other ones than the base's."""
        own = any((folder / group / "prompts.json").is_file() for folder in self._folders)
        return self._facts(f"{group}/prompts.json", "prompts")["prompts"] if own else self.prompts

    def strip(self, name: str, text: str, group: str = "") -> list[Picture]:
        """Returns a picture for each prompt. Raises UserError if the strip is missing or has another size."""
        prompts = self.prompts_of(group) if group else self.prompts
        cells = self._cells(f"{group}/{_file(name)}" if group else _file(name), len(prompts), 1)
        return [self._embed(cell, f"{text}: {prompt}") for cell, prompt in zip(cells, prompts, strict=True)]

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

    def _facts(self, name: str, *keys: str) -> dict[str, Any]:
        path = self._find(name)
        facts = as_object(read_json(path), str(path))
        for key in keys:
            if key not in facts:
                raise UserError(f"{path}: has no {key!r}; evaluate again")
        return facts

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
        if self.side <= _SMALL:
            cell.save(out, "WEBP", lossless=True, quality=100, method=4)
        else:
            size = min(self._limit, cell.width)
            cell.resize((size, size), Image.Resampling.LANCZOS).save(out, "WEBP", quality=_QUALITY, method=4)
        return Picture("data:image/webp;base64," + base64.b64encode(out.getvalue()).decode(), alt)


def render(
    model: str,
    figures: dict[str, Any],
    provenance: dict[str, Any],
    evaluation: Path | Sequence[Path],
    *,
    base_license: str,
    kohya_file: str,
) -> str:
    """Returns the page. The same inputs give the same bytes.

    Args:
        figures: metrics/MODEL.json. Sections whose figures are missing, empty or null are left out.
        provenance: provenance.json of the release.
        evaluation: the folder that `evaluate` wrote, or several that share the pictures: `study` writes its own.
        base_license: of the base, which the adapter inherits.
        kohya_file: the name of the release's file for ComfyUI and A1111.

    Raises:
        UserError: a picture that the figures speak of is missing or has another size.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    variations, guidance, weights = (figures.get(name) or {} for name in ("variations", "guidance", "weights"))
    steps = provenance["params"]["gate"]["steps"]
    shown = len(figures["network_evaluations"]) + 1 + len(guidance.get("scales", ())) + 7 * len(variations)
    album = Album([evaluation] if isinstance(evaluation, Path) else evaluation, shown)
    features = figures["features"]
    environment = Environment(
        loader=PackageLoader("lcmlora"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"fixed": fixed, "span": span, "milliseconds": milliseconds, "label": label, "over": over}
    return environment.get_template("report.html.j2").render(
        model=model,
        figures=dict.fromkeys(_OPTIONAL) | figures,
        provenance=provenance,
        base_license=base_license,
        kohya=kohya_file,
        distance=title_of(features.get("distance", "frechet")),
        places=_places(figures["excess"].values()),
        keys=_ordered(figures),
        teacher=_teacher(figures),
        headline=_headline(figures, steps),
        charts=_charts(figures),
        prompts=_prompts(figures, album),
        guidance=_guidance(guidance, album) if guidance else None,
        variations=[_variation(name, facts, steps, album) for name, facts in variations.items()],
        weights=_weights(weights, album) if weights else None,
        cells=_cell_sizes(album.side),
        pixelated=album.side <= _SMALL,
        params=json.dumps(provenance["params"], indent=2, sort_keys=True, ensure_ascii=False),
    )


def fixed(value: float | None, places: int = 3, *, signed: bool = False) -> str:
    """Returns a number with a true minus sign, `–` for none. What rounds to zero has no sign."""
    if value is None:
        return _NONE
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", _MINUS)


def span(interval: list[float] | None, places: int = 3) -> str:
    """Returns `low to high`, or nothing where there is no interval."""
    return f"{fixed(interval[0], places)} to {fixed(interval[1], places)}" if interval else ""


def milliseconds(seconds: float | None) -> str:
    """Returns seconds as milliseconds with three figures, `–` for none."""
    if seconds is None:
        return _NONE
    value = 1000 * seconds
    return fixed(value, max(0, min(3, 2 - math.floor(math.log10(value)))) if value > 0 else 0)


def over(value: float, whole: float, form: str) -> str:
    """Returns value / whole in this form, `–` where there is nothing to divide by."""
    return form % (value / whole) if whole else _NONE


def label(key: str) -> str:
    """Returns how a reader calls a drawn set: `DPM-Solver++, 2 steps`."""
    return Key.parse(key).label


def _places(values: Iterable[float]) -> int:
    """Returns how many decimals show three figures of the median of these distances, zeros apart."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return min(6, max(0, 2 - math.floor(math.log10(statistics.median(sizes))))) if sizes else 2


def _file(name: str) -> str:
    return f"{name.replace('/', '-')}.png"


def _teacher(figures: dict[str, Any]) -> str:
    return next(key for key in figures["network_evaluations"] if key.startswith("teacher@"))


def _ordered(figures: dict[str, Any]) -> list[str]:
    """Returns the keys by method, the student first and the teacher last, each by steps."""

    def place(key: str) -> tuple[int, str, int]:
        _, method, steps = Key.parse(key)
        return {"student": 0, "teacher": 2}.get(method, 1), method, steps

    return sorted(figures["network_evaluations"], key=place)


def _headline(figures: dict[str, Any], steps: int) -> dict[str, Any]:
    """Returns what is said first: of the student at the gate's steps, or at its most if it was not drawn in these."""
    drawn = [key for key in _ordered(figures) if key.startswith("student@")]
    key = f"student@{steps}" if f"student@{steps}" in drawn else drawn[-1]
    teacher, cost, retrieval = _teacher(figures), figures["network_evaluations"], figures["retrieval"]
    won = (figures.get("advantage") or {}).get(key)
    low, high = won["interval"] if won else (0.0, 0.0)
    unmeasured = unmeasured_retrieval(figures)
    return {
        "key": key,
        "steps": Key.parse(key).steps,
        "evaluations": cost[key],
        "won": won,
        "verdict": "closer" if high < 0 else "farther" if low > 0 else "undecided",
        "share": None if unmeasured else retrieval[key] / retrieval[teacher],
        "unmeasured": unmeasured,
        "fewer": cost[teacher] / cost[key],
    }


def _cell_sizes(side: int) -> dict[str, int]:
    """Returns how large a picture is shown, in CSS pixels: small ones by whole factors, so that pixels stay alike."""
    if side > _SMALL:
        return {"wide": 136, "narrow": 80}
    return {"wide": side * max(1, round(128 / side)), "narrow": side * max(1, 64 // side)}


def _prompts(figures: dict[str, Any], album: Album) -> dict[str, Any]:
    """Returns, for each prompt, the real picture if any, the teacher's, and for each method a row of pictures by
    steps."""
    cost, teacher = figures["network_evaluations"], _teacher(figures)
    keys = [key for key in _ordered(figures) if key != teacher]
    real = [] if figures.get("real_pictures") == 0 else ["real"]
    strips = {key: album.strip(key, label(key)) for key in (*real, teacher, *keys)}
    steps = sorted({Key.parse(key).steps for key in keys})
    methods = []
    for method in dict.fromkeys(Key.parse(key).method for key in keys):
        rates = {cost[key] / Key.parse(key).steps for key in keys if Key.parse(key).method == method}
        methods.append((method, Key("", method, 0).name, rates.pop() if len(rates) == 1 else None))
    blocks = []
    for i, prompt in enumerate(album.prompts):
        drawn = {key: strip[i] for key, strip in strips.items()}
        rows = [(*method, [drawn.get(f"{method[0]}@{n}") for n in steps]) for method in methods]
        blocks.append({"prompt": prompt, "real": drawn.get("real"), "teacher": drawn[teacher], "rows": rows})
    return {"steps": steps, "teacher_steps": Key.parse(teacher).steps, "blocks": blocks}


def _guidance(facts: dict[str, Any], album: Album) -> dict[str, Any]:
    """Returns the sweep as rows of a table, and its pictures: prompts by guidance scales."""
    scales, steps = facts["scales"], facts["steps"]
    student = Key("", "student", steps).label
    strips = [album.strip(f"guidance@{scale:g}", f"{student}, guidance scale {scale:g}") for scale in scales]
    columns = (facts[name] for name in ("network_evaluations", "excess", "retrieval", "diversity"))
    return {
        "steps": steps,
        "scales": scales,
        "rows": list(zip(scales, *columns, strict=True)),
        "best": min(facts["excess"]),
        "places": _places(facts["excess"]),
        "shown": list(zip(album.prompts, zip(*strips, strict=True), strict=True)),
    }


def _variation(name: str, facts: dict[str, Any], steps: int, album: Album) -> dict[str, Any]:
    """Returns a style's or a checkpoint's figures by network evaluations, its claims, and pictures around `steps`."""
    distance, cost = facts["distance_real"], facts["network_evaluations"]
    rows: dict[int, dict[str, str]] = {}
    for key in sorted(distance, key=lambda key: (cost[key], -distance[key])):  # the best of equals comes last and stays
        parsed = Key.parse(key)
        rows.setdefault(cost[key], {})[parsed.part or parsed.method] = key
    parts = [part for part in _PARTS if any(part in row for row in rows.values())]
    claimed = {claim["evaluations"] for claim in facts["claims"]} & set(rows) or set(rows)
    chosen = sorted(claimed, key=lambda count: abs(math.log2(count / steps)))[:_PICTURED]
    columns = [(count, part, rows[count][part]) for count in sorted(chosen) for part in parts if part in rows[count]]
    strips = [album.strip("real", f"real, {name}", name)]
    for _, part, key in columns:
        what = "" if part == "adapter" else f"{name} alone, " if part == "alone" else f"{name} "
        strips.append(album.strip(key, what + label(key), name))
    return facts | {
        "name": name,
        "noun": "style" if facts["kind"] == "style" else "checkpoint",
        "parts": {part: _PARTS[part] for part in parts},
        "rows": rows,
        "best": {count: min(row.values(), key=lambda key: distance[key]) for count, row in rows.items()},
        "places": _places(distance.values()),
        "columns": {count: [(part, key) for n, part, key in columns if n == count] for count in sorted(chosen)},
        "shown": list(zip(album.prompts_of(name), zip(*strips, strict=True), strict=True)),
    }


def _weights(facts: dict[str, Any], album: Album) -> dict[str, Any]:
    """Returns the grid of style and adapter weights: distances, shades in [0, 1] (1 the best), and pictures."""
    values = [value for row in facts["distance_real"] for value in row]
    best, worst = min(values), max(values)
    steps, style = f"{facts['steps']} step{'' if facts['steps'] == 1 else 's'}", facts["style"]
    prompt = facts.get("prompt", album.prompts[0])
    labels = [
        [f"{style} weight {x:g}, adapter weight {y:g}, {steps}: {prompt}" for y in facts["adapter_weights"]]
        for x in facts["style_weights"]
    ]
    return facts | {
        "prompt": prompt,
        "best": best,
        "places": _places(values),
        "shades": [
            [(worst - value) / (worst - best) if worst > best else 0.0 for value in row]
            for row in facts["distance_real"]
        ],
        "shown": list(zip(facts["style_weights"], album.sheet("weights", labels), strict=True)),
    }


class Point(NamedTuple):
    """A figure at its cost, with the ends of its interval, which are the figure itself where there is none."""

    evaluations: int
    value: float
    low: float
    high: float
    text: str


def _charts(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns both curves against network evaluations, each drawn for a wide and for a narrow page."""
    cost, retrieval, teacher = figures["network_evaluations"], figures["retrieval"], _teacher(figures)
    # Linear around zero, where the teacher stands and below which chance can bring a method; logarithmic far from it.
    unit = max(abs(figures["floor"]) / 4, max(map(abs, figures["excess"].values())) / 200, 1e-9)
    real = {"real pictures": retrieval["real"]} if "real" in retrieval else {}
    charts = []
    for kind, title, levels, scale in (
        ("excess", "Excess distance to the teacher", {"teacher": 0.0}, lambda v: math.asinh(v / unit)),
        ("retrieval", "Caption retrieval", {"teacher": retrieval[teacher]} | real, None),
    ):
        places = 3 if kind == "retrieval" else _places(figures["excess"].values())
        curves: dict[str, list[Point]] = {}
        for key in _ordered(figures):
            if key == teacher or key not in figures[kind]:
                continue
            value, interval = figures[kind][key], (figures.get("intervals") or {}).get(kind, {}).get(key)
            text = f"{label(key)}, {cost[key]} network evaluations: {fixed(value, places)}"
            text += f" ({span(interval, places)})" if interval else ""
            low, high = interval or (value, value)
            point = Point(cost[key], value, low, high, text)
            curves.setdefault(Key.parse(key).method, []).append(point)
        sizes = {"wide": (520, 400, 104), "narrow": (350, 340, 106)}
        drawings = {name: chart(curves, levels, scale, *size) for name, size in sizes.items()}
        charts.append({"title": title, "better": "lower" if kind == "excess" else "higher", "drawings": drawings})
    return charts


def chart(
    curves: dict[str, list[Point]],
    levels: dict[str, float],
    scale: Callable[[float], float] | None,
    width: int,
    height: int,
    margin: int,
) -> dict[str, Any]:
    """Returns the geometry of a chart in pixels, for the template to draw.

    Args:
        curves: points for each method.
        levels: horizontal lines by their names.
        scale: what the vertical axis is linear in, increasing; None for the figures themselves.
        margin: pixels at the right, for the names.
    """
    points = [point for curve in curves.values() for point in curve]
    costs = sorted({point.evaluations for point in points})
    bounds = [0.0, *levels.values(), *(v for point in points for v in (point.low, point.value, point.high))]
    left, right, top, bottom = 44.0, float(width - margin), 34.0, float(height - 46)
    inset = 5.0 * len(curves)  # room for the outermost of the points side by side
    octaves = math.log2(costs[-1] / costs[0]) or 1.0
    rows, scale = (_even(bounds), float) if scale is None else (_round(bounds), scale)
    low, high = scale(min(bounds)), scale(max(bounds))

    def across(cost: float) -> float:
        return left + inset + (right - left - 2 * inset) * math.log2(cost / costs[0]) / octaves

    def up(value: float) -> float:
        return bottom - 8 - (bottom - top - 16) * (scale(value) - low) / ((high - low) or 1.0)

    names = [_Name(name, "level", right, up(value)) for name, value in levels.items()]
    lines = []
    for method, curve in curves.items():
        spots = []
        for point in sorted(curve):
            # Points of equal cost stand side by side, so that none hides another's interval.
            beside = [name for name, other in curves.items() if any(o.evaluations == point.evaluations for o in other)]
            aside = (beside.index(method) - (len(beside) - 1) / 2) * (6 if width > 400 else 4)
            x = across(point.evaluations) + aside
            spots.append((x, up(point.value), up(point.low), up(point.high), point.text))
        lines.append({"method": method, "spots": spots})
        names.append(_Name(Key("", method, 0).name, method, *spots[-1][:2]))
    return {
        "width": width,
        "height": height,
        "frame": (left, top, right, bottom),
        "columns": _apart([(across(cost), f"{cost}") for cost in costs], 24),
        "rows": _apart([(up(value), f"{value:g}".replace("-", _MINUS)) for value in rows], 24),
        "levels": [up(value) for value in levels.values()],
        "lines": lines,
        "names": _spread(names, right + 12, top, bottom),
    }


class _Name(NamedTuple):
    text: str
    css: str
    x: float  # the end of what it names
    y: float


def _round(bounds: list[float]) -> list[float]:
    """Returns zero and 1, 2, 5 times powers of ten between the bounds, those first that an axis should rather have."""
    low, high = min(bounds), max(bounds)
    exponents = range(math.floor(math.log10(max(-low, high, 1e-9))), -10, -1)
    sizes = [step * 10.0**n for step in (1, 5, 2) for n in exponents]
    return [0.0, *(value for size in sizes for value in (size, -size) if low <= value <= high)]


def _even(bounds: list[float]) -> list[float]:
    """Returns some five round values between the bounds, at equal distances."""
    low, high = min(bounds), max(bounds)
    rough = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(ticks: list[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Returns the ticks that are at least `gap` pixels from all before them."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if all(abs(tick[0] - other) >= gap for other, _ in kept):
            kept.append(tick)
    return kept


def _spread(
    names: list[_Name], x: float, top: float, bottom: float, gap: float = 16
) -> list[tuple[_Name, float, float]]:
    """Returns the names with places in a column at `x`, near what they name and `gap` pixels apart."""
    ordered = sorted(names, key=lambda name: name.y)
    # Least squares under the gap: what would overlap becomes a block around the mean of its wishes.
    blocks: list[tuple[float, int]] = []
    for i, name in enumerate(ordered):
        mean, count = name.y - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, size = blocks.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        blocks.append((mean, count))
    places = [mean + gap * i for i, mean in enumerate(mean for mean, count in blocks for _ in range(count))]
    shift = max(top - places[0], min(0.0, bottom - places[-1]))
    return [(name, x, y + shift) for name, y in zip(ordered, places, strict=True)]
