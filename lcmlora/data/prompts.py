"""Source `prompts`: captions without pictures. The teacher makes the latents (rollouts.py)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import IO, Any

from lcmlora.data.candidates import MAX_CAPTION, NO_CAPTION, Candidate, Rejection, Unusable, decoded_caption
from lcmlora.data.remote import Files
from lcmlora.errors import UserError

KINDS = (".txt", ".jsonl", ".csv")
NAMES = ("prompt", "caption", "text")  # of the key or column

TWICE = "same prompt as another"


def find(path: str) -> tuple[list[Candidate], list[Rejection]]:
    """Returns every prompt once, in the order of the files, with its file and line as key; and the refused ones.

    Args:
        path: a file, or a folder of them, here or in a bucket: .txt with a prompt in each line, .jsonl, or .csv.

    Raises:
        UserError: no such files, or one that cannot be read.
    """
    files = Files(path)
    names = sorted(name for kind in KINDS for name in files.list(kind))
    if not names:
        raise UserError(f"data.path: {path}: no prompts; expected a file that ends in {', '.join(KINDS)}, or a folder")
    found: list[Candidate] = []
    rejections: list[Rejection] = []
    seen: set[str] = set()
    for name in names:
        with files.open(name) as file:
            for number, content in _lines(name, file):
                key = f"{name}/{number:06d}"
                try:
                    prompt = decoded_caption(content)
                    if not prompt.text or prompt.text in seen:
                        raise Unusable(TWICE if prompt.text else NO_CAPTION)
                except Unusable as reason:
                    rejections.append(Rejection(key, str(reason)))
                else:
                    seen.add(prompt.text)
                    found.append(Candidate(key, prompt, key))
    if not found:
        raise UserError(f"data.path: {path}: no prompt that can be used in {len(names)} files")
    return found, rejections


def _lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yields the prompts of a file, undecoded, with the numbers of their lines or rows; empty lines are passed over."""
    if name.endswith(".csv"):
        yield from _rows(name, file)
        return
    number = 0
    while line := file.readline(2 * MAX_CAPTION):
        number += 1
        ended = line.endswith(b"\n")
        while not ended and (rest := file.readline(MAX_CAPTION)):  # of a line that is too long, and is refused
            ended = rest.endswith(b"\n")
        if line.strip():
            yield number, line if name.endswith(".txt") else _told(name, number, line)


def _told(name: str, number: int, line: bytes) -> bytes:
    """Returns the prompt in a line of .jsonl: an object's, or the line itself where it is a text."""
    try:
        told = json.loads(line)
    except UnicodeDecodeError:
        return line  # which is refused for that
    except (ValueError, RecursionError) as error:
        if len(line) > MAX_CAPTION:
            return line  # likewise; it was cut off
        raise UserError(f"{name}: line {number}: not JSON: {error}") from None
    return _prompt(name, number, {NAMES[0]: told} if isinstance(told, str) else told)


def _rows(name: str, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    number = 0
    try:
        for number, row in enumerate(csv.DictReader(text), start=1):
            yield number, _prompt(name, number, row)
    except csv.Error as error:
        raise UserError(f"{name}: cannot be read after row {number}: {error}") from None


def _prompt(name: str, number: int, row: Any) -> bytes:
    named = (row.get(key) for key in NAMES) if isinstance(row, dict) else ()
    text = next((value for value in named if isinstance(value, str)), None)
    if text is None:
        raise UserError(f"{name}: row {number}: expected a text {' or '.join(NAMES)}, got {str(row)[:200]}")
    # What was no UTF-8 in the file, or half a surrogate pair in JSON, is none here either.
    return text.encode("utf-8", "surrogatepass")
