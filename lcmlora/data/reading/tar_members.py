"""Reads the headers of a tar file within limits, and checks what a header says before it is used.

`tarfile` decodes each header. It does not read the file, because it follows sizes that lead backwards (and reads a file
of 12 kilobytes for ever), reads names of gigabytes, and has a regular expression that a header can stall.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from lcmlora.data.reading.candidates import Unusable

CUT_OFF = "the tar file is damaged from here on"
TRAILING_DATA = "the tar file has something else behind its end"
COMPRESSED = "the tar file is compressed; unpack it to a plain .tar (gunzip, unzstd, xz -d)"

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENSION = 1 << 20  # bytes of a long name, or of the records of a PAX header, which may hold file attributes
_MAX_EXTENSIONS = 16  # extension headers before the header of a member
_MAX_SPARSE = 1 << 12  # further headers of a sparse file
_MAX_NAME = 1 << 12  # bytes; no file system takes longer ones
_MAX_ZEROS = 1 << 26  # bytes after the end in which another archive is sought; archives are padded to 10 KiB
_ZEROS_STEP = 1 << 20
_COMPRESSED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"PK\x03\x04",
    b"7z\xbc\xaf",
)


class Member(NamedTuple):
    """A member that is not a folder.

    start: the byte at which its first header begins.
    offset, size: of its content, in bytes; size 0 if it is no file.
    plain: whether it is an ordinary file, not a link, a device or a sparse file.
    """

    name: str
    start: int
    offset: int
    size: int
    plain: bool


def read_members(file: IO[bytes], start: int = 0) -> Iterator[Member]:
    """Yields the members from the header at `start` on, in the order of their headers.

    Concatenated tar files (`cat a.tar b.tar`) are read as one.

    Raises:
        Unusable: the rest of the file cannot be read; the members before it were yielded.
    """
    end = file.seek(0, 2)
    at = start
    if not at and _read_at(file, 0, 8).startswith(_COMPRESSED):
        raise Unusable(COMPRESSED)
    while True:
        block = _read_at(file, at, _BLOCK)
        if len(block) < _BLOCK:
            raise Unusable(CUT_OFF)
        if not any(block):
            at = _next_archive(file, at, end)
            if at >= end:
                return
            continue
        member, at = _member(file, at, end)
        if member is not None:
            yield member


def _member(file: IO[bytes], start: int, end: int) -> tuple[Member | None, int]:
    """Returns the member whose headers begin at `start`, None for a folder, and where the next one begins.

    Raises:
        Unusable: the headers are damaged.
    """
    at, name, size, sparse = start, None, None, False
    for _ in range(_MAX_EXTENSIONS):
        header = _header(_read_at(file, at, _BLOCK))
        at += _BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            records = _records(_extension(file, at, header.size, end))
            if header.type != tarfile.XGLTYPE:  # a global header is for all later members, and names none of them
                sparse = sparse or any(key.startswith(b"GNU.sparse.") for key in records)
                name = _decoded_name(records.get(b"GNU.sparse.name", records.get(b"path"))) or name
                size = _number(records[b"size"]) if b"size" in records else size
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            name = _decoded_name(_extension(file, at, header.size, end).partition(b"\0")[0]) or name
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            _extension(file, at, header.size, end)
        else:
            break
        at += _padded(header.size)
    else:
        raise Unusable(CUT_OFF)
    if header.type == tarfile.GNUTYPE_SPARSE:
        at = _skip_sparse_headers(file, at)
        sparse = True
    size = header.size if size is None else size
    has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    if size < 0 or (has_content and size > end - at):
        raise Unusable(CUT_OFF)
    following = at + (_padded(size) if has_content else 0)
    if header.isdir():
        return None, following
    plain = header.isreg() and header.type != tarfile.GNUTYPE_SPARSE and not sparse
    return Member(name or header.name, start, at, size if has_content else 0, plain), following


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError):  # ValueError: a number has other characters than digits
        raise Unusable(CUT_OFF) from None
    if header.size < 0:  # possible in base 256
        raise Unusable(CUT_OFF)
    return header


def _extension(file: IO[bytes], at: int, size: int, end: int) -> bytes:
    """Returns the content of an extension header. Raises Unusable."""
    if size > min(_MAX_EXTENSION, end - at):
        raise Unusable(CUT_OFF)
    return _read_at(file, at, size)


def _records(content: bytes) -> dict[bytes, bytes]:
    """Returns the records of a PAX header, "LENGTH KEY=VALUE\\n" each. Raises Unusable."""
    records = {}
    at = 0
    while at < len(content) and content[at]:  # some writers end with zeros
        digits = content[at : at + 8].partition(b" ")[0]
        length = _number(digits)
        record = content[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or at + length > len(content):
            raise Unusable(CUT_OFF)
        records[key] = value[:-1]
        at += length
    return records


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise Unusable(CUT_OFF)
    return int(digits)


def _decoded_name(name: bytes | None) -> str | None:
    if name is not None and len(name) > _MAX_NAME:
        raise Unusable(CUT_OFF)
    return name.decode("utf-8", "surrogateescape") if name else None


def _skip_sparse_headers(file: IO[bytes], at: int) -> int:
    """Returns where the content of a sparse file begins, after the headers that say where its holes are."""
    more = _read_at(file, at - _BLOCK, _BLOCK)[482]
    for _ in range(_MAX_SPARSE):
        if not more:
            return at
        block = _read_at(file, at, _BLOCK)
        if len(block) < _BLOCK:
            break
        more = block[504]
        at += _BLOCK
    raise Unusable(CUT_OFF)


def _next_archive(file: IO[bytes], at: int, end: int) -> int:
    """Returns where another tar file begins after the zeros that end this one; without one, the end of the file."""
    for start in range(at, min(end, at + _MAX_ZEROS), _ZEROS_STEP):
        zeros = _read_at(file, start, _ZEROS_STEP)
        if rest := zeros.lstrip(b"\0"):
            following = start + (len(zeros) - len(rest)) // _BLOCK * _BLOCK
            try:
                _header(_read_at(file, following, _BLOCK))
            except Unusable:
                raise Unusable(TRAILING_DATA) from None
            return following
    return end


def _padded(size: int) -> int:
    """Returns the bytes that a content of this size takes in a tar file."""
    return -(-size // _BLOCK) * _BLOCK


def _read_at(file: IO[bytes], at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
