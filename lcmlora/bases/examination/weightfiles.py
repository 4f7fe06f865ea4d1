"""The safetensors files of a base's part: which files are loaded, which tensors they have, and whether all are finite.

Each file is read once, from its first byte to its last, for its SHA-256 and its numbers alike. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lcmlora.bases.examination.library_config import LFS_POINTER, read_object
from lcmlora.errors import UserError
from lcmlora.io.parsing import Malformed, as_object, parse_json

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # the libraries' names of files of weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

_HEADER_BYTES = 100 << 20  # the format's own limit
_CHUNK = 4 << 20
# Above this share of zeros a file was not written to its end; biases that are initialised with zeros are far fewer.
_MAX_ZEROS = 0.1
_PARTIAL = (".incomplete", ".part", ".aria2", ".crdownload", ".download", ".tmp")
# Bytes of a number, and the bits of its exponent, all of which are set in NaN and Inf alone.
_FLOATS = {"F64": (8, 0x7FF << 52), "F32": (4, 0xFF << 23), "F16": (2, 0x1F << 10), "BF16": (2, 0xFF << 7)}
_INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1}
PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Entry:
    """A tensor's entry in the header of its file."""

    dtype: str  # as the format spells it, such as F16
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the file
    end: int


def find_weights(name: str, part: Path, stem: str, variant: str | None) -> list[Path]:
    """Returns the files from which a part is loaded, sorted by name.

    Args:
        name: the base's name, for errors about its key `variant`.
        part: the part's folder, such as BASE/unet.
        stem: how its files are named: DIFFUSERS, or TRANSFORMERS for a text encoder.

    Raises:
        UserError: the part has no weights in this variant (the error names the files that it has), or lacks a shard.
    """
    marked = f".{variant}" if variant else ""
    single = part / f"{stem}{marked}.safetensors"
    index = part / f"{stem}.safetensors.index{marked}.json"
    # If a part has both, diffusers takes the shards, and transformers the single file.
    order = (index, single) if stem == DIFFUSERS else (single, index)
    for path in order:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to nothing; get the file again")
        if path.exists():
            return [path] if path is single else _shards(index)
    raise UserError(_missing(name, part, stem, variant, expected=single.name))


def _shards(index: Path) -> list[Path]:
    weight_map = as_object(read_object(index).get("weight_map"), f"{index}: weight_map")
    names = sorted({str(file) for file in weight_map.values()})
    if not names:
        raise UserError(f"{index}: weight_map is empty; expected the shard of every tensor")
    for file in names:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map names {file[:100]!r}; expected .safetensors files beside the index")
        if not (index.parent / file).exists():
            present = sum((index.parent / other).exists() for other in names)
            raise UserError(f"{index}: the shard {file} is missing ({present} of {len(names)} are there); get it again")
    for file in names:
        entries = read_header(index.parent / file)
        listed = {tensor for tensor, shard in weight_map.items() if shard == file}
        if missing := sorted(listed - entries.keys()):
            raise UserError(f"{index}: {file} lacks {first_names(missing)}, which the index says it has")
        if unlisted := sorted(entries.keys() - listed):
            raise UserError(f"{index}: does not list {first_names(unlisted)}, which {file} has")
    return [index.parent / file for file in names]


def _missing(name: str, part: Path, stem: str, variant: str | None, expected: str) -> str:
    """Returns the error of a part without weights to load, which depends on the files that it has."""
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
            f"{part}: has {pickles[0]} and no {expected}; that is a pickle, which can run any code when it is read, "
            "and is never opened here; get the base as .safetensors"
        )
    if partial := [file for file in files if file.endswith(_PARTIAL)]:
        return f"{part}: has {partial[0]}, a download that was not finished, and no {expected}; get it again"
    others = [file for file in files if file != "config.json"]
    again = "get the base again" if not variant else f"get the base again, or remove bases.{name}.variant ({variant})"
    return f"{part}: has no {expected}" + (f", but {first_names(others)}" if others else "") + f"; {again}"


def read_header(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        UserError: the file is not safetensors, or is cut: every byte after the header must belong to one tensor.
    """
    size = _size(path)
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        # The first bytes of a pickle or a web page give a length that is out of range.
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise UserError(f"{path}: {_foreign_format(path, size)}")
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


def _foreign_format(path: Path, size: int) -> str:
    """Returns the error about a file that does not begin as a safetensors file, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(64)
    if size == 0:
        return "is empty; get it again"
    if start.startswith(LFS_POINTER):
        return "is a Git LFS pointer and not the weights; run `git lfs pull` where the base was cloned"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page and not weights; get it again"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "is a pickle under another name, which can run any code when it is read; get the base as .safetensors"
    return f"is not a readable safetensors file, or is cut ({size} bytes); get it again"


def _entries(header: object, start: int, size: int) -> dict[str, Entry]:
    if not isinstance(header, dict):
        raise Malformed("no object")
    entries = {name: _entry(name, header[name], start) for name in header if name != "__metadata__"}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = start
    for name, entry in entries.items():
        if entry.begin != end:
            raise Malformed(f"{name[:100]} does not begin where the tensor before it ends")
        end = entry.end
    if end != size:
        fault = "cut" if end > size else "longer"
        raise Malformed(f"the file is {fault}: its tensors end at {end} and it has {size} bytes")
    return entries


def _entry(name: str, described: object, start: int) -> Entry:
    shown = name[:100]
    if not isinstance(described, dict):
        raise Malformed(f"{shown}: no object")
    dtype = described.get("dtype")
    if not isinstance(dtype, str):
        raise Malformed(f"{shown}: no dtype")
    shape = _whole_numbers(described.get("shape"), f"{shown}: shape")
    offsets = _whole_numbers(described.get("data_offsets"), f"{shown}: data_offsets")
    if len(offsets) != 2 or len(shape) > 8:
        raise Malformed(f"{shown}: expected two data_offsets and at most 8 dimensions")
    width = _FLOATS[dtype][0] if dtype in _FLOATS else _INTEGERS.get(dtype)
    count = 1
    for side in shape:
        count *= side
    if width is not None and offsets[1] - offsets[0] != width * count:
        raise Malformed(f"{shown}: {dtype} of shape {shape} does not fill its bytes {offsets}")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _whole_numbers(numbers: object, place: str) -> list[int]:
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise Malformed(f"{place} is not a list of whole numbers")
    return numbers


def _every_tensor(name: str) -> bool:
    return True


def read_weights(path: Path, is_weight: Callable[[str], bool] = _every_tensor) -> tuple[dict[str, Entry], str]:
    """Reads a whole file and returns its tensors by name and its SHA-256.

    Args:
        is_weight: whether a tensor of this name is a weight, which must be finite; other tensors are not checked.

    Raises:
        UserError: as `read_header`; or a weight is quantised or fp8, or has a number that is not finite; or so many
            weights are zeros that the file's download was not finished.
    """
    entries = read_header(path)
    for name, entry in entries.items():
        counts = name.endswith(("position_ids", "num_batches_tracked"))
        if is_weight(name) and entry.dtype not in _FLOATS and not counts:
            raise UserError(f"{path}: {_dtype_fault(name, entry.dtype)}")
    sha256 = hashlib.sha256()
    filled = zeros = 0  # bytes of weights
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        if hasattr(content, "madvise"):
            content.madvise(mmap.MADV_SEQUENTIAL)
        sha256.update(view[: next(iter(entries.values())).begin if entries else len(view)])
        for name, entry in entries.items():
            checked = entry.dtype in _FLOATS and is_weight(name)
            largest = 0
            for begin in range(entry.begin, entry.end, _CHUNK):
                with view[begin : min(begin + _CHUNK, entry.end)] as chunk:
                    sha256.update(chunk)
                    if checked:
                        largest = max(largest, _largest_exponent(chunk, entry.dtype))
            if not checked:
                continue
            if largest == _FLOATS[entry.dtype][1]:
                raise UserError(
                    f"{path}: {name[:200]} has numbers that are not finite (NaN or Inf); get or make the base again"
                )
            if largest:
                filled += entry.end - entry.begin
            else:
                zeros += entry.end - entry.begin
    if zeros > _MAX_ZEROS * (filled + zeros):
        raise UserError(
            f"{path}: {zeros} of the {filled + zeros} bytes of its weights are zeros, as in a file whose download was "
            "not finished; get it again"
        )
    return entries, sha256.hexdigest()


def _dtype_fault(name: str, dtype: str) -> str:
    kind = "fp8" if dtype.startswith(("F8", "F4", "F6", "E8")) else "quantised"
    return f"{name[:200]} is {dtype}: {kind} weights are not distilled; get the base in fp16, bf16 or fp32"


def _largest_exponent(chunk: memoryview, dtype: str) -> int:
    """Returns the largest exponent in the numbers' bits: all ones if one is NaN or Inf, 0 if all are 0 or subnormal."""
    import numpy as np

    width, exponent = _FLOATS[dtype]
    bits = np.frombuffer(chunk, dtype=f"<u{width}")
    return int((bits & bits.dtype.type(exponent)).max(initial=0))


def first_names(names: list[str]) -> str:
    """Returns the first three names and the number of the others, for an error."""
    shown = ", ".join(name[:100] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
