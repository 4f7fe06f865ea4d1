"""Source `prompts`: captions without pictures. The teacher draws the latents (lcmlora/data/latents/rollouts.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from lcmlora.data.reading.candidates import (
    NO_CAPTION,
    SAME_PROMPT,
    Candidate,
    Rejection,
    Unusable,
    decoded_caption,
)
from lcmlora.data.reading.tables import Row, read_rows
from lcmlora.data.sources.inputs import InputFiles
from lcmlora.data.sources.source import Record, Source, Survey
from lcmlora.errors import UserError

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
NAMES = ("prompt", "caption", "text")  # of the key or column, in any case of letters

NO_PROMPT = f"row without a text under {', '.join(NAMES[:-1])} or {NAMES[-1]}"


class Prompts(Source):
    """A file of prompts, or a folder of them, here or in a bucket: .txt with a prompt in each line, .jsonl, .csv or
    .parquet. A record is a prompt and the number of a copy: the teacher draws a latent for each."""

    has_pictures = False
    has_sizes = False

    def survey(self) -> Survey:
        data = self.data
        files = InputFiles(data.path, data.links, data.split)
        prompts, rejections = _read(data.path, files)
        rejections += files.rejections()
        records = [_record(prompt, copy) for copy in range(data.copies) for prompt in prompts]
        return Survey(records, rejections, files.left_out, files.unused_files().by_kind())


def _record(prompt: Candidate, copy: int) -> Record:
    text, raw = prompt.caption
    digest = hashlib.sha256(f"{copy}/{text}".encode()).hexdigest()
    return Record(f"{prompt.key}/{copy}", text, digest, 0, 0, raw_caption=raw)


def _read(path: str, files: InputFiles) -> tuple[list[Candidate], list[Rejection]]:
    """Returns each distinct prompt, in the order of the files, with its file and line as key; and the rejections.

    Raises:
        UserError: there are no such files, or no prompt in them.
    """
    names = files.list(*KINDS)
    if not names:
        raise UserError(f"data.path: {path}: no prompts; expected a file that ends in {', '.join(KINDS)}, or a folder")
    prompts, rejections = distinct_prompts(read_rows(path, names, wanted=("", *NAMES)))
    if not prompts:
        first = next(iter(rejections), None)
        reason = f": {first.name}: {first.reason}" + (f" ({first.detail})" if first.detail else "") if first else ""
        raise UserError(f"data.path: {path}: no prompt that can be used in {len(names)} files{reason}")
    return prompts, rejections


def distinct_prompts(rows: Iterable[Row | Rejection]) -> tuple[list[Candidate], list[Rejection]]:
    """Returns each distinct prompt of these rows, and the rejections."""
    prompts: list[Candidate] = []
    rejections: list[Rejection] = []
    seen: set[str] = set()
    for row in rows:
        if isinstance(row, Rejection):
            rejections.append(row)
            continue
        try:
            prompt = decoded_caption(_text(row).encode("utf-8"))
            if not prompt.text or prompt.text in seen:
                raise Unusable(SAME_PROMPT if prompt.text else NO_CAPTION)
        except Unusable as reason:
            rejections.append(Rejection(row.name, str(reason), detail=f"row {row.number}: {str(row.fields)[:200]}"))
        else:
            seen.add(prompt.text)
            prompts.append(Candidate(row.name, prompt, row.name))
    return prompts, rejections


def _text(row: Row) -> str:
    """Returns the first text of a row that is not empty; empty if all are. Raises Unusable if it has no text."""
    fields: dict[str, object] = {}
    for name, value in row.fields.items():
        fields.setdefault(name.casefold(), value)
    texts = [value for name in ("", *NAMES) if isinstance(value := fields.get(name), str)]
    if not texts:
        raise Unusable(NO_PROMPT)
    return next((text for text in texts if text.strip()), "")
