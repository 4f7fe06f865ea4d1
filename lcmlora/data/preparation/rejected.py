"""What `prepare` dropped, for people: a table of all rejections, and a page with examples of each reason."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypedDict

from lcmlora.config import Data
from lcmlora.data.preparation.working import default_decoders
from lcmlora.data.reading.candidates import Rejection, display_name, printable
from lcmlora.data.reading.tables import PRELOAD
from lcmlora.data.rejection_advice import ByReason
from lcmlora.data.sources.source import open_source, rejected_thumbnail
from lcmlora.io.files import atomic_write
from lcmlora.io.isolation import isolated
from lcmlora.templates.loading import load_template

TABLE, PAGE = "rejected.parquet", "rejected.html"

_GROUP = 1 << 15  # rows of the table that are in memory
_SIDE = 112  # pixels of an example's longer side


class _Example(TypedDict):
    """A rejection on the page; `source` is the thumbnail as a data: address, None if there is no picture to see."""

    name: str
    source: str | None


class _Section(TypedDict):
    """A section of the page: one reason."""

    reason: str
    count: int
    examples: list[_Example]


def write_table(folder: Path, rejections: Iterable[Rejection]) -> None:
    """Writes rejected.parquet (columns name and reason) to the folder."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("name", pyarrow.string()), ("reason", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(folder / TABLE, schema, compression="zstd") as writer:
        remaining = iter(rejections)
        while group := list(islice(remaining, _GROUP)):
            reasons = [f"{r.reason} ({printable(r.detail)})" if r.detail else r.reason for r in group]
            writer.write_table(pyarrow.table({"name": [r.name for r in group], "reason": reasons}, schema))


def write_page(folder: Path, data: Data, rejections: ByReason) -> None:
    """Writes rejected.html to the folder: the first rejections of each reason.

    The page shows the pictures that can be decoded after all. They are decoded in processes of their own, as they were
    the first time (lcmlora/io/isolation.py).
    """
    text = _page(data, rejections)
    atomic_write(folder / PAGE, lambda path: path.write_text(text, encoding="utf-8"))


def _page(data: Data, rejections: ByReason) -> str:
    most_frequent_first = sorted(rejections.counts.items(), key=lambda item: (-item[1], item[0]))
    examples = [rejection for reason, _ in most_frequent_first for rejection in rejections.first[reason]]
    thumbnails = _thumbnails(data, examples)
    sections: list[_Section] = [
        {
            "reason": reason,
            "count": count,
            "examples": [
                {"name": _caption(r), "source": thumbnails.get(r.place or "")} for r in rejections.first[reason]
            ],
        }
        for reason, count in most_frequent_first
    ]
    template = load_template("rejected.html.j2")
    return template.render(path=data.path, source=data.source, reasons=sections, table=TABLE)


def _thumbnails(data: Data, rejections: list[Rejection]) -> dict[str, str]:
    """Returns the pictures that can be decoded as data: addresses of JPEGs, by their places."""
    places = [rejection.place for rejection in rejections if rejection.place is not None]
    thumbnail = partial(rejected_thumbnail, open_source(data), _SIDE)
    contents = isolated(thumbnail, places, lambda place, reason: None, default_decoders(), preload=PRELOAD)
    return {
        place: "data:image/jpeg;base64," + base64.b64encode(content).decode()
        for place, content in zip(places, contents, strict=True)
        if content
    }


def _caption(rejection: Rejection) -> str:
    return display_name(rejection.name) + (f" ({display_name(rejection.detail)})" if rejection.detail else "")
