"""What `prepare` dropped, for people: a table of all rejections, and a page with examples of each reason."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from lcmlora.config import Data
from lcmlora.data.reading.candidates import Rejection, display_name, printable
from lcmlora.data.reading.tables import PRELOAD
from lcmlora.data.sources.source import open_source, rejected_thumbnail, workers
from lcmlora.io.files import atomic_write
from lcmlora.io.isolation import isolated
from lcmlora.templates.loading import load_template

TABLE, PAGE = "rejected.parquet", "rejected.html"

_EXAMPLES = 12  # of each reason
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


def write_rejections(folder: Path, data: Data, rejections: Sequence[Rejection]) -> None:
    """Writes rejected.parquet (columns name and reason) and rejected.html to the folder.

    The page shows the pictures that can be decoded after all. They are decoded in processes of their own, as they were
    the first time (lcmlora/io/isolation.py).
    """
    import pyarrow
    import pyarrow.parquet

    reasons = [f"{r.reason} ({printable(r.detail)})" if r.detail else r.reason for r in rejections]
    columns = {"name": [r.name for r in rejections], "reason": reasons}
    table = pyarrow.table(columns, pyarrow.schema([("name", pyarrow.string()), ("reason", pyarrow.string())]))
    atomic_write(folder / TABLE, lambda path: pyarrow.parquet.write_table(table, path, compression="zstd"))
    by_reason: dict[str, list[Rejection]] = defaultdict(list)
    for rejection in rejections:
        by_reason[rejection.reason].append(rejection)
    most_frequent_first = dict(sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])))
    text = _page(data, most_frequent_first)
    atomic_write(folder / PAGE, lambda path: path.write_text(text, encoding="utf-8"))


def _page(data: Data, by_reason: dict[str, list[Rejection]]) -> str:
    examples = {reason: rejections[:_EXAMPLES] for reason, rejections in by_reason.items()}
    thumbnails = _thumbnails(data, [rejection for each in examples.values() for rejection in each])
    sections: list[_Section] = [
        {
            "reason": reason,
            "count": len(rejections),
            "examples": [{"name": _caption(r), "source": thumbnails.get(r.place or "")} for r in examples[reason]],
        }
        for reason, rejections in by_reason.items()
    ]
    template = load_template("rejected.html.j2")
    return template.render(path=data.path, source=data.source, reasons=sections, table=TABLE)


def _thumbnails(data: Data, rejections: list[Rejection]) -> dict[str, str]:
    """Returns the pictures that can be decoded as data: addresses of JPEGs, by their places."""
    places = [rejection.place for rejection in rejections if rejection.place is not None]
    thumbnail = partial(rejected_thumbnail, open_source(data), _SIDE)
    contents = isolated(thumbnail, places, lambda place, reason: None, workers(), preload=PRELOAD)
    return {
        place: "data:image/jpeg;base64," + base64.b64encode(content).decode()
        for place, content in zip(places, contents, strict=True)
        if content
    }


def _caption(rejection: Rejection) -> str:
    return display_name(rejection.name) + (f" ({display_name(rejection.detail)})" if rejection.detail else "")
