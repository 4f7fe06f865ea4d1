"""Prompts of one's own (`evaluation.prompts`), drawn and compared as the test captions are, and reported apart."""

from __future__ import annotations

from pathlib import Path

from lcmlora.data.reading.tables import read_rows
from lcmlora.data.sources.prompts import KINDS, NAMES, distinct_prompts
from lcmlora.errors import UserError
from lcmlora.io.remote import Files
from lcmlora.io.terminal import note

OWN_PROMPTS = "own-prompts"  # a folder in a reference, which is a reference itself
OWN_PICTURES = "@own-prompts"  # a folder of pictures, and no name of a style


def read_own_prompts(path: str) -> list[str]:
    """Returns every prompt of a file once: .txt with a prompt in each line, .jsonl, .csv or .parquet.

    Raises:
        UserError: no such file, or no prompt in it.
    """
    if not Path(path).is_file():
        raise UserError(f"evaluation.prompts: {path}: no such file; expected one that ends in {', '.join(KINDS)}")
    names = Files(path, "evaluation.prompts").list(*KINDS)
    if not names:
        raise UserError(f"evaluation.prompts: {path}: expected a file that ends in {', '.join(KINDS)}")
    found, rejections = distinct_prompts(read_rows(path, names, wanted=("", *NAMES)))
    if not found:
        raise UserError(f"evaluation.prompts: {path}: has no prompt; expected one in each line or row")
    if rejections:
        first = rejections[0]
        note(f"{path}: {len(rejections)} rows are not used, {first.name}: {first.reason}", "warning: ")
    return [candidate.caption.text for candidate in found]
