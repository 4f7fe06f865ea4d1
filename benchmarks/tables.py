"""Tables in README.md and docs/*.md that a command writes, between two comments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Returns a table; the first `words` columns are words, the others numbers."""
    aligned = "---|" * words + "---:|" * (len(head) - words)
    return "".join(f"{line}\n" for line in (_row(head), "|" + aligned, *map(_row, rows)))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read(page: Path, name: str = "table") -> str:
    """Returns what stands between the two comments of the page; nothing where it has none."""
    begin, end = _comments(name)
    return page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]


def write(page: Path, text: str, name: str = "table") -> None:
    """Puts `text` in the place of what stands between the two comments of the page."""
    begin, end = _comments(name)
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(before + begin + text + end + rest.partition(end)[2], encoding="utf-8")


def _comments(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
