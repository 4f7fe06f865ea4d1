"""Which source can read a path that somebody names without saying so."""

from __future__ import annotations

from pathlib import PurePosixPath

from lcmlora.data.reading.candidates import SUFFIXES
from lcmlora.data.sources.inputs import InputFiles
from lcmlora.data.sources.parquet import with_pictures

_TRIED = 3  # tables; those of one data set have the same columns
_METADATA = "metadata.parquet"  # beside the pictures that it names


def source_of(path: str, links: str = "project") -> str:
    """Returns `parquet`, `webdataset` or `folder` by what lies there.

    Tables without pictures are the metadata of what lies beside them, as img2dataset and others write them. Where there
    are tar files and pictures, what there is more of counts; the report of `prepare` tells of the rest.

    Raises:
        UserError: there is no such path.
        Unavailable: it cannot be reached.
    """
    files = InputFiles(path, links, ("train", "validation", "test"))
    tables = [name for name in files.list(".parquet") if PurePosixPath(name).name.lower() != _METADATA]
    if tables and with_pictures(path, tables[:_TRIED]):
        return "parquet"
    tars = len(files.list(".tar"))
    pictures = len(files.list(*SUFFIXES))
    if tars > pictures:
        return "webdataset"
    if pictures or not tables or files.list(".jsonl", ".csv"):
        return "folder"
    return "parquet"  # which says what it misses in them
