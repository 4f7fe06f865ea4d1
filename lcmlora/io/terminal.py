"""Making foreign text safe to show: on a terminal, in a log, in Markdown and in HTML."""

from __future__ import annotations

import html
import re
import sys
import unicodedata

LINE = 2000  # characters of a line of an error or a log
CELL = 400  # characters of a table's cell

# Control and format characters, but for what holds emoji and words of some scripts together; line and paragraph
# separators; lone surrogates, which no stream can encode.
_UNSHOWN = ("Cc", "Cf", "Zl", "Zp", "Cs")
_JOINERS = "\u200c\u200d\u00ad"
_TAGS = range(0xE0020, 0xE0080)  # of flags
_PLAIN = re.compile(r"[ -~]*")
# What means something within a line of Markdown, and at its beginning; between letters an underscore does not.
_MARKDOWN = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^(?:[#+-]+|[0-9]+[.)])(?=\s|$)")


def shown(text: object, limit: int | None = CELL) -> str:
    """Returns text as one line that only shows: what would move a cursor, colour, turn around or break the line is
    spelled out (`\\x1b`), and from what is longer than `limit` characters the middle is left out."""
    line = str(text) if limit is None else shortened(str(text), limit)
    return line if _PLAIN.fullmatch(line) else "".join(map(_visible, line))


def shortened(text: str, limit: int) -> str:
    """Returns a text of `limit` characters at most: the end of an error often says why, so the middle is left out."""
    if len(text) <= limit:
        return text
    kept = max(limit - 30, limit // 2)
    head, tail = text[: kept * 2 // 3], text[len(text) - kept // 3 :]
    return f"{head}... {len(text) - len(head) - len(tail):,} more ...{tail}"


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _UNSHOWN or character in _JOINERS or ord(character) in _TAGS:
        return character
    return ascii(character)[1:-1]


def joined(text: object, limit: int = CELL) -> str:
    """Returns a text, such as a library's error of several lines, as one line without its middle if it is longer than
    `limit`. It is not escaped."""
    return shortened(" ".join(str(text).split()), limit)


def lines(text: object, limit: int = LINE, most: int = 100) -> list[str]:
    """Returns the lines of a text, each as `shown`; of more than `most` how many are left out."""
    every = str(text).split("\n")
    kept = [shown(line, limit) for line in every[:most]]
    return kept if len(every) <= most else [*kept, f"... and {len(every) - most:,} more lines"]


def markdown(text: object, limit: int | None = CELL) -> str:
    """Returns text for a place within a line of Markdown, where neither it nor HTML in it means anything."""
    return _MARKDOWN.sub(
        lambda found: "".join(f"&#{ord(each)};" for each in found[0]), html.escape(shown(text, limit), quote=False)
    )


def say(text: object) -> None:
    """Prints a text, each line as `shown`, on standard output."""
    for line in lines(text):
        print(line)


def note(text: object, prefix: str = "") -> None:
    """Prints a text, each line as `shown` and after the prefix, on standard error."""
    for line in lines(text):
        print(f"{prefix}{line}", file=sys.stderr, flush=True)


def cell(text: object, limit: int | None = CELL):  # type: ignore[no-untyped-def]  # the type would import rich for --help
    """Returns text for a cell of a rich table, in which [brackets] are no style; lines stay lines."""
    from rich.text import Text

    return Text("\n".join(shown(line, limit) for line in str(text).split("\n")))
