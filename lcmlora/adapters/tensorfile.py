"""Files of adapters' tensors: found in trainers' output folders, and opened within limits.

Only safetensors files are opened. A pickle can run any code when it is read; it is refused, whatever its ending is.
"""

from __future__ import annotations

import stat
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcmlora.adapters import lora, peft_settings
from lcmlora.errors import UserError
from lcmlora.io.terminal import joined

MAX_BYTES = 8 << 30  # of a file; an adapter of SDXL at rank 512 in fp32 has 6.3 GB
MAX_TENSORS = 50_000  # an adapter of SDXL has 2,400, with text encoders and LyCORIS's parts 7,000
_MAX_HEADER = 32 << 20  # bytes; kohya's tags of all captions can have several megabytes
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_MAX_NAMED = 5  # files of a folder, in an error


def find(folder: Path) -> Path:
    """Returns the adapter in a folder: diffusers' own file, PEFT's, or the only safetensors file there is.

    Raises:
        UserError: the folder has several, which the error names, or none.
    """
    for name in (lora.WEIGHTS, peft_settings.WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: is a base (it has model_index.json), not an adapter")
    own = _files(folder, "*.safetensors")
    below = [path for part in _folders(folder) for path in _files(part, "*.safetensors")]
    if len(own) == 1 and not below:
        return own[0]
    if paths := own + below:
        names = ", ".join(str(path.relative_to(folder)) for path in paths[:_MAX_NAMED])
        more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
        raise UserError(f"{folder}: has {len(paths)} safetensors files; name the one that is meant: {names}{more}")
    pickles = [path for place in (folder, *_folders(folder)) for path in _files(place, "*") if path.suffix in _PICKLES]
    if pickles:
        raise UserError(f"{folder}: has no safetensors file; {_pickle(pickles[0])}")
    raise UserError(
        f"{folder / lora.WEIGHTS}: no such file; {folder} is not the folder of an adapter: expected {lora.WEIGHTS}, "
        f"{peft_settings.WEIGHTS} or one other .safetensors file"
    )


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read(path: Path, shown: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file by name, and the metadata in its header.

    The tensors are mapped: only those that are used are read.

    Args:
        shown: the file's name in errors.

    Raises:
        UserError: a pickle, no safetensors file or a damaged one, or one over the limits.
    """
    _check(path, shown)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > MAX_TENSORS:
                raise UserError(f"{shown}: has {len(names)} tensors, an adapter at most {MAX_TENSORS}")
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
        # safetensors raises all but the first two for types that this version of torch does not have.
        raise UserError(f"{shown}: is not a readable safetensors file: {_reason(error)}") from None


def _check(path: Path, shown: str) -> None:
    """Raises UserError if the file is a pickle, no safetensors file by its first bytes, or too large."""
    if path.suffix.lower() in _PICKLES:
        raise UserError(_pickle(path, shown))
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{shown}: is no file, expected a .safetensors file")
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: cannot be read: {_reason(error)}") from None
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and start[8:9] != b"{":
        raise UserError(_pickle(path, shown))
    fault = f"{shown}: is not a readable safetensors file"
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{fault} but Git LFS's pointer to it: fetch it with git lfs pull")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise UserError(f"{fault} but a web page: the download needs another address, or a login")
    header = int.from_bytes(start[:8], "little")
    if len(start) < 8 or 8 + header > status.st_size:
        raise UserError(f"{fault}: it has {status.st_size} bytes and is cut, or is something else")
    if header > _MAX_HEADER:
        raise UserError(f"{fault}: its header has {header} bytes, an adapter's at most {_MAX_HEADER}")
    if status.st_size > MAX_BYTES:
        raise UserError(f"{shown}: has {status.st_size / 1e9:.1f} GB, an adapter at most {MAX_BYTES / 1e9:.1f} GB")


def _pickle(path: Path, shown: str | None = None) -> str:
    return (
        f"{shown or path}: is a pickle, which can run any code when it is read; expected .safetensors: ask its maker "
        "for that, or save it so where its code can do no harm"
    )


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return joined(text)


def check_finite(tensor: Tensor, name: str, shown: str) -> None:
    """Raises UserError if a tensor has values that are not finite."""
    if tensor.isfinite().all():
        return
    bad = int((~tensor.isfinite()).sum())
    kinds = " and ".join(kind for kind, has in (("NaN", tensor.isnan().any()), ("Inf", tensor.isinf().any())) if has)
    raise UserError(
        f"{shown}: {name} has {kinds} in {bad} of {tensor.numel()} values, not finite numbers: its training or a "
        "conversion went wrong; take an earlier file of it"
    )


def check_harmless(path: Path) -> None:
    """Raises UserError if diffusers might run a regular expression from the file; see `peft_settings`."""
    _check(path, str(path))
    try:
        with safe_open(path, framework="pt") as file:
            names, header = list(file.keys()), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is not a readable safetensors file: {_reason(error)}") from None
    peft_settings.check_harmless(header, names, str(path))
