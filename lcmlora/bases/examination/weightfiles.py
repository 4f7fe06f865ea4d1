"""The safetensors files of a base's part: which they are, what they hold, and whether every number in them is finite.

Each file is read once, from its first byte to its last, for its SHA-256 and its numbers alike. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmlora.errors import UserError
from lcmlora.io.parsing import Malformed, as_object, parse_json, read_bytes

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # what the libraries call files of weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

_HEADER_BYTES = 100 << 20  # the format's own limit
_CHUNK = 4 << 20
_EMPTY = 0.1  # share of zeros above which a file was not written to its end; biases that begin as zeros are far fewer
_LFS = b"version https://git-lfs"
_PARTIAL = (".incomplete", ".part", ".aria2", ".crdownload", ".download", ".tmp")
# Bytes of a number, and the bits of its exponent, which are all set in NaN and Inf alone.
_FLOATS = {"F64": (8, 0x7FF << 52), "F32": (4, 0xFF << 23), "F16": (2, 0x1F << 10), "BF16": (2, 0xFF << 7)}
_INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1}
SHORT = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of its file tells it."""

    dtype: str  # as the format spells it, such as F16
    shape: tuple[int, ...]
    begin: int  # bytes, counted from the start of the file
    end: int


def find(name: str, part: Path, stem: str, variant: str | None) -> list[Path]:
    """Returns the files from which a part is loaded, in the order of their names.

    Args:
        name: of the base, for messages about its key `variant`.
        part: in the base's folder, such as unet.
        stem: what its files are called: diffusion_pytorch_model, or model of a text encoder.

    Raises:
        UserError: there are none in this variant, with what lies there instead; or a shard is missing.
    """
    marked = f".{variant}" if variant else ""
    single = part / f"{stem}{marked}.safetensors"
    index = part / f"{stem}.safetensors.index{marked}.json"
    # Where both are there, diffusers takes the shards and transformers the single file.
    order = (index, single) if stem == DIFFUSERS else (single, index)
    for path in order:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to nothing; get the file again")
        if path.exists():
            return [path] if path is single else _shards(index)
    raise UserError(_missing(name, part, stem, variant, single.name))


def _shards(index: Path) -> list[Path]:
    weight_map = as_object(json_of(index).get("weight_map"), f"{index}: weight_map")
    names = sorted({str(file) for file in weight_map.values()})
    if not names:
        raise UserError(f"{index}: weight_map is empty; expected the shard of every tensor")
    for file in names:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map names {file[:100]!r}; expected .safetensors files beside the index")
        if not (index.parent / file).exists():
            there = sum((index.parent / other).exists() for other in names)
            raise UserError(f"{index}: the shard {file} is missing ({there} of {len(names)} are there); get it again")
    for file in names:
        held = header(index.parent / file)
        listed = {tensor for tensor, place in weight_map.items() if place == file}
        if lost := sorted(listed - held.keys()):
            raise UserError(f"{index}: {file} lacks {some(lost)}, which the index says it has")
        if lost := sorted(held.keys() - listed):
            raise UserError(f"{index}: does not list {some(lost)}, which {file} has")
    return [index.parent / file for file in names]


def _missing(name: str, part: Path, stem: str, variant: str | None, wanted: str) -> str:
    """Returns why a part has no weights to load, by what lies there instead."""
    files = sorted(path.name for path in part.iterdir())
    weights = [file for file in files if file.endswith(".safetensors")]
    if variant and weights:
        return f"bases.{name}.variant: {part} has no {variant} file, but {weights[0]}; remove the key or change it"
    if any(file.startswith(f"{stem}-") for file in weights):
        return f"{part}: has shards and no {stem}.safetensors.index.json, which tells what is in them; get it again"
    variants = [file for file in weights if file.startswith(f"{stem}.") and not file.endswith(".index.json")]
    if variants:
        return f"bases.{name}.variant: {part} has {variants[0]} alone; set the key to the file's variant"
    if pickles := [file for file in files if file.endswith(PICKLES)]:
        return (
            f"{part}: has {pickles[0]} and no {wanted}; that is a pickle, which can run any code when it is read, and "
            "is never opened here; get the base as .safetensors"
        )
    if partial := [file for file in files if file.endswith(_PARTIAL)]:
        return f"{part}: has {partial[0]}, a download that was not finished, and no {wanted}; get it again"
    others = [file for file in files if file != "config.json"]
    again = "get the base again" if not variant else f"get the base again, or remove bases.{name}.variant ({variant})"
    return f"{part}: has no {wanted}" + (f", but {some(others)}" if others else "") + f"; {again}"


def header(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by name, in the order in which they lie there.

    Raises:
        UserError: it is no such file, or it is cut: every byte after the header must belong to one tensor.
    """
    size = _size(path)
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        # A pickle or a page of a web site is told by what its bytes mean as a length.
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise UserError(f"{path}: {_strange(path, size)}")
        content = file.read(length)
    try:
        return _entries(parse_json(content.rstrip(b" ")), 8 + length, size)
    except Malformed as error:
        raise UserError(f"{path}: its header is damaged: {error}") from None


def _size(path: Path) -> int:
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'not an ordinary file' if path.exists() else 'no such file'}")
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _strange(path: Path, size: int) -> str:
    """Returns what a file is that begins as no safetensors file does."""
    with path.open("rb") as file:
        start = file.read(64)
    if size == 0:
        return "is empty; get it again"
    if start.startswith(_LFS):
        return "is a Git LFS pointer and not the weights; run `git lfs pull` where the base was cloned"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page and not weights; get it again"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "is a pickle under another name, which can run any code when it is read; get the base as .safetensors"
    return f"is not a readable safetensors file, or is cut ({size} bytes); get it again"


def _entries(read: Any, start: int, size: int) -> dict[str, Entry]:
    if not isinstance(read, dict):
        raise Malformed("no object")
    entries = {name: _entry(name, read[name], start) for name in read if name != "__metadata__"}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    place = start
    for name, entry in entries.items():
        if entry.begin != place:
            raise Malformed(f"{name[:100]} does not begin where the tensor before it ends")
        place = entry.end
    if place != size:
        told = "cut" if place > size else "longer"
        raise Malformed(f"the file is {told}: its tensors end at {place} and it has {size} bytes")
    return entries


def _entry(name: str, told: Any, start: int) -> Entry:
    shown = name[:100]
    if not isinstance(told, dict):
        raise Malformed(f"{shown}: no object")
    dtype = told.get("dtype")
    if not isinstance(dtype, str):
        raise Malformed(f"{shown}: no dtype")
    shape, offsets = _numbers(told, "shape", shown), _numbers(told, "data_offsets", shown)
    if len(offsets) != 2 or len(shape) > 8:
        raise Malformed(f"{shown}: expected two data_offsets and at most 8 dimensions")
    width = _FLOATS[dtype][0] if dtype in _FLOATS else _INTEGERS.get(dtype)
    count = 1
    for side in shape:
        count *= side
    if width is not None and offsets[1] - offsets[0] != width * count:
        raise Malformed(f"{shown}: {dtype} of shape {shape} does not fill its bytes {offsets}")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _numbers(told: dict[str, Any], key: str, shown: str) -> list[int]:
    numbers = told.get(key)
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise Malformed(f"{shown}: {key} is not a list of whole numbers")
    return numbers


def _any(name: str) -> bool:
    return True


def read(path: Path, wanted: Callable[[str], bool] = _any) -> tuple[dict[str, Entry], str]:
    """Reads a whole file and returns its tensors and its SHA-256.

    Args:
        wanted: tells the weights that must be sound by their names; others may hold anything.

    Raises:
        UserError: as `header`; or a tensor of weights is quantised or fp8, or has a number that is not finite.
    """
    entries = header(path)
    for name, entry in entries.items():
        if wanted(name) and entry.dtype not in _FLOATS and not name.endswith(("position_ids", "num_batches_tracked")):
            raise UserError(f"{path}: {_dtype_fault(name, entry.dtype)}")
    known = hashlib.sha256()
    filled = empty = 0
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        if hasattr(content, "madvise"):
            content.madvise(mmap.MADV_SEQUENTIAL)
        known.update(view[: next(iter(entries.values())).begin if entries else len(view)])
        for name, entry in entries.items():
            largest = 0
            for begin in range(entry.begin, entry.end, _CHUNK):
                with view[begin : min(begin + _CHUNK, entry.end)] as chunk:
                    known.update(chunk)
                    if entry.dtype in _FLOATS and wanted(name):
                        largest = max(largest, _exponent(chunk, entry.dtype))
            if entry.dtype in _FLOATS and largest == _FLOATS[entry.dtype][1]:
                raise UserError(
                    f"{path}: {name[:200]} has numbers that are not finite (NaN or Inf); get or make the base again"
                )
            if entry.dtype in _FLOATS and wanted(name):
                filled += (entry.end - entry.begin) * bool(largest)
                empty += (entry.end - entry.begin) * (not largest)
    if empty > _EMPTY * (filled + empty):
        raise UserError(
            f"{path}: {empty} of the {filled + empty} bytes of its weights are zeros, as in a file whose download was "
            "not finished; get it again"
        )
    return entries, known.hexdigest()


def _dtype_fault(name: str, dtype: str) -> str:
    kind = "fp8" if dtype.startswith(("F8", "F4", "F6", "E8")) else "quantised"
    return f"{name[:200]} is {dtype}: {kind} weights are not distilled; get the base in fp16, bf16 or fp32"


def _exponent(chunk: memoryview, dtype: str) -> int:
    """Returns the highest exponent of numbers as it stands in their bits: all ones of NaN or Inf, 0 of zeros alone."""
    import numpy as np

    width, exponent = _FLOATS[dtype]
    bits = np.frombuffer(chunk, dtype=f"<u{width}")
    return int((bits & bits.dtype.type(exponent)).max(initial=0))


def text_of(path: Path) -> bytes:
    """Returns the content of a small text file of a base. Raises UserError, also for a Git LFS pointer."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: is a link to nothing; get the file again")
    content = read_bytes(path)
    if content.startswith(_LFS):
        raise UserError(f"{path}: is a Git LFS pointer and not the file; run `git lfs pull` where the base was cloned")
    return content


def json_of(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a base. Raises UserError, which names the file."""
    try:
        return as_object(parse_json(text_of(path)), str(path))
    except Malformed as error:
        raise UserError(f"{path}: {error}") from None


def some(names: list[str]) -> str:
    """Returns the first three names, and how many more there are."""
    shown = ", ".join(name[:100] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
