"""The code blocks of pages, the commands in them, and the comment that says what proves them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\S*)\s*$")
_COMMENT = re.compile(r"^ *<!--\s*(?P<key>run by|needs):\s*(?P<value>[^>]*?)\s*-->\s*$")
_SEPARATORS = {"|", "||", "&", "&&", ";", ";;"}
_REDIRECTIONS = {">", ">>", "<", "&>"}
_ASSIGNMENT = re.compile(r"\w+=.*", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    claim: the comment on the line before it as (`run by` or `needs`, its values); None where there is none.
    """

    page: Path
    line: int
    language: str
    text: str
    claim: tuple[str, tuple[str, ...]] | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands as words, without assignments before them, redirections and comments."""
        return [words for line in _logical_lines(self.text) for words in _split(line)]


def pages() -> list[Path]:
    """Returns every page for readers: those at the top, of deploy/ and of docs/."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "deploy/README.md")]
    docs = (page for page in ROOT.glob("docs/**/*.md") if "_build" not in page.parts)
    return [page for page in [*top, *sorted(docs)] if page.exists()]


def blocks(page: Path) -> Iterator[Block]:
    """Yields the fenced blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number, claim = 0, None
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if opening is None:
            comment = _COMMENT.match(lines[number])
            if comment is not None:
                values = tuple(value.strip() for value in comment["value"].split(","))
                claim = (comment["key"], values)
            elif lines[number].strip():
                claim = None
            number += 1
            continue
        end = next(
            i for i in range(number + 1, len(lines) + 1) if i == len(lines) or lines[i].strip() == opening["fence"]
        )
        text = "\n".join(line.removeprefix(opening["indent"]) for line in lines[number + 1 : end])
        yield Block(page, number + 1, opening["language"], text, claim)
        number, claim = end + 1, None


def _logical_lines(text: str) -> Iterator[str]:
    """Yields lines without comments, those joined that a backslash, a pipe or an open quotation mark continues."""
    waiting = ""
    for line in text.splitlines():
        waiting, is_open = _without_comment(waiting + line)
        if is_open:
            waiting += "\n"
        elif waiting.endswith("\\"):
            waiting = waiting[:-1] + " "
        elif waiting.rstrip().endswith(("|", "&&")):
            waiting += " "
        else:
            yield waiting
            waiting = ""
    if waiting.strip():
        yield waiting


def _without_comment(line: str) -> tuple[str, bool]:
    """Returns the line up to a comment, and whether it ends within quotation marks."""
    quote, before, escaped = "", " ", False
    for number, character in enumerate(line):
        if escaped:
            escaped = False
        elif character == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and before.isspace():
            return line[:number].rstrip(), False
        before = character
    return line, bool(quote)


def _split(line: str) -> Iterator[list[str]]:
    """Yields the commands of a line."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split, reader.commenters = True, ""
    command: list[str] = []
    for word in reader:
        if word in _SEPARATORS:
            if command:
                yield command
            command = []
        elif word in _REDIRECTIONS:
            if command and command[-1] in ("1", "2"):  # 2> FILE
                command.pop()
            reader.get_token()
        elif command or not _ASSIGNMENT.fullmatch(word):
            command.append(word)
    if command:
        yield command
