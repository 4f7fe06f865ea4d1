"""What `prepare` dropped, for people: a table of all of it, and a page with examples for each reason."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lcmlora.config import Data
from lcmlora.data.reading.candidates import Rejection, printable, shown
from lcmlora.data.reading.tables import PRELOAD
from lcmlora.data.sources.source import glimpse, opened, workers
from lcmlora.io.files import atomic_write
from lcmlora.io.isolation import isolated

TABLE, PAGE = "rejected.parquet", "rejected.html"

_EXAMPLES = 12  # of each reason
_SIDE = 112  # pixels of an example


def write(folder: Path, data: Data, rejections: Sequence[Rejection]) -> None:
    """Writes rejected.parquet (name, reason) and rejected.html to the folder.

    Pictures that can be decoded after all are shown; it is done as carefully as before (isolation.py).
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
    text = _page(data, dict(sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))))
    atomic_write(folder / PAGE, lambda path: path.write_text(text, encoding="utf-8"))


def _page(data: Data, by_reason: dict[str, list[Rejection]]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lcmlora"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown_of = {reason: found[:_EXAMPLES] for reason, found in by_reason.items()}
    places = [r.place for found in shown_of.values() for r in found if r.place is not None]
    see = partial(glimpse, opened(data), _SIDE)
    looks = isolated(see, places, lambda place, reason: None, workers(), preload=PRELOAD)
    sources = {
        place: "data:image/jpeg;base64," + base64.b64encode(look).decode()
        for place, look in zip(places, looks, strict=True)
        if look
    }
    reasons: list[dict[str, Any]] = [
        {
            "reason": reason,
            "count": len(found),
            "examples": [{"name": _told(r), "source": sources.get(r.place or "")} for r in shown_of[reason]],
        }
        for reason, found in by_reason.items()
    ]
    template = environment.get_template("rejected.html.j2")
    return template.render(path=data.path, source=data.source, reasons=reasons, table=TABLE)


def _told(rejection: Rejection) -> str:
    return shown(rejection.name) + (f" ({shown(rejection.detail)})" if rejection.detail else "")
