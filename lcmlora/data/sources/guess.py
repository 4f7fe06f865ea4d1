"""Guesses which source can read a path."""

from __future__ import annotations

from pathlib import PurePosixPath

from lcmlora.data.reading.candidates import SUFFIXES
from lcmlora.data.sources.inputs import InputFiles
from lcmlora.data.sources.parquet import any_has_pictures

_MAX_TABLES = 3  # tables that are opened; those of one data set have the same columns
_METADATA = "metadata.parquet"  # beside the pictures that it names


def source_of(path: str, links: str = "project") -> str:
    """Returns `parquet`, `webdataset` or `folder`, by the files at the path.

    Tables without pictures are the metadata of the files beside them, as img2dataset and others write them. If there
    are tar files and pictures, those that are more decide; the report of `prepare` counts the others as unused.

    Raises:
        UserError: there is no such path.
        Unavailable: the bucket does not answer.
    """
    files = InputFiles(path, links, ("train", "validation", "test"))
    tables = [name for name in files.list(".parquet") if PurePosixPath(name).name.lower() != _METADATA]
    if tables and any_has_pictures(path, tables[:_MAX_TABLES]):
        return "parquet"
    tars = len(files.list(".tar"))
    pictures = len(files.list(*SUFFIXES))
    if tars > pictures:
        return "webdataset"
    if pictures or not tables or files.list(".jsonl", ".csv"):
        return "folder"
    return "parquet"  # its error says which columns are missing
