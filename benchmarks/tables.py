"""Tables in docs/*.md that a command writes, between two comments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Returns a table; the first `words` columns are words, the others numbers."""
    aligned = "---|" * words + "---:|" * (len(head) - words)
    return "".join(f"{line}\n" for line in (_row(head), "|" + aligned, *map(_row, rows)))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(page: Path, text: str) -> None:
    """Puts `text` in the place of what stands between the two comments of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    page.write_text(before + _BEGIN + text + _END + rest.partition(_END)[2], encoding="utf-8")
