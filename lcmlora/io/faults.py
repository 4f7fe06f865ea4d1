"""Errors of the machine in one line, with what to do about them: no space, no permission, no memory."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.io import temporaries
from lcmlora.io.terminal import shortened

_REMEDIES = {
    errno.ENOSPC: "free some, or work on another disk",
    errno.EDQUOT: "delete some of your files, or ask for a larger quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or use a file system that has larger files",
    errno.EROFS: "mount it for writing, or name another place",
    errno.EACCES: "change its permissions or its owner (chmod, chown), or name another place",
    errno.EPERM: "change its permissions or its owner (chmod, chown), or name another place",
    errno.ENOTDIR: "expected a folder; move the file that is in the way, or name another place",
    errno.EISDIR: "expected a file; move the folder that is in the way, or name another place",
    errno.EEXIST: "move what is in the way, or name another place",
    errno.ENOTEMPTY: "move what is in the way, or name another place",
    errno.ENOENT: "check the name, and run in the project's folder",
    errno.ENAMETOOLONG: "choose a shorter name; most file systems have room for 255 bytes",
    errno.ELOOP: "these links lead to each other; delete one of them",
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096)",
    errno.ENFILE: "end what holds so many files open on this machine",
    errno.EAGAIN: "end some of the processes of this user, or raise their limit (ulimit -u)",
    errno.EBUSY: "is it a mount point, or in use? name a folder in it",
    errno.ETXTBSY: "end the program that runs it",
    errno.EXDEV: "use one file system for both",
    errno.EIO: "look at the disk: `dmesg` says what is wrong with it",
    errno.ESTALE: "the network file system lost it; run this again, or mount it anew",
}
# Messages of libraries that give no error number: of Rust, SQLite, zip writers.
_TEXTS = {
    errno.ENOSPC: r"No space left on device|database or disk is full",
    errno.EDQUOT: r"Disk quota exceeded",
    errno.EFBIG: r"File too large",
    errno.EROFS: r"Read-only file system|attempt to write a readonly database",
    errno.EACCES: r"Permission denied|unable to open database file",
    errno.EMFILE: r"Too many open files",
    errno.EAGAIN: r"can't start new thread|Resource temporarily unavailable",
    errno.EIO: r"disk I/O error|Input/output error",
}
# Messages of torch and numpy about a failed write, which do not give the reason.
_WITHOUT_REASON = r"inline_container|PytorchStreamWriter|\d+ requested and \d+ written"
_WRITE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
}  # which may come without a file's name

_GPU = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|HIP out of m"
_HOST = r"DefaultCPUAllocator|alloc_cpu|Cannot allocate memory|std::bad_alloc|[Uu]nable to allocate|mmap failed"
_TRAINING = "lower {0}.batch or raise {0}.accumulate, set {0}.checkpointing: full or {0}.precision: bf16 in params.yaml"
_DRAWING = "lower evaluation.batch in params.yaml"
_TO_LOWER = {
    "pretrain": "lower pretrain.batch or pretrain.vae_batch in params.yaml",
    "encode": "lower encode.batch in params.yaml",
    "distill": _TRAINING.format("distill"),
    "polish": _TRAINING.format("distill"),
    "doctor": _TRAINING.format("distill"),
    "style": _TRAINING.format("style"),
    "finetune": _TRAINING.format("finetune"),
    "reference": _DRAWING,
    "evaluate": _DRAWING,
    "alone": _DRAWING,
    "study": _DRAWING,
    "remeasure": _DRAWING,
    "generate": "lower --batch",
}
_SHOWN = 400  # characters of a name
_LINE = 600  # characters of an error of a library
_KILLED = "probably for lack of memory (`dmesg` names whom the kernel killed)"


def explain(error: BaseException, verb: str = "") -> str | None:
    """Returns one line that says what the machine refused and what to do; None if it is another kind of error.

    Args:
        verb: of the command line. The advice on how to save memory depends on it.
    """
    if isinstance(error, UserError):
        return None
    text = " ".join(str(error).split())
    if line := _memory(error, text, verb):
        return line
    if isinstance(error, OSError):
        code = error.errno if isinstance(error.errno, int) else _code(text)
        reason = os.strerror(code) if code in _REMEDIES else error.strerror or text or type(error).__name__
        shown = f"{_shown(error.filename)}: " if error.filename is not None else ""
        return "; ".join(
            filter(None, (f"{shown}{shortened(' '.join(reason.split()), _LINE)}", _REMEDIES.get(code or 0)))
        )
    code = _code(text) if _is_foreign(error) else None
    return f"{shortened(text, _LINE)}; {_REMEDIES[code]}" if code else None


def chain(error: BaseException, limit: int = _LINE) -> str:
    """Returns an error and what caused it in one line, the first cause last: it says why."""
    found: list[str] = []
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        text = " ".join(str(each).split())
        if text and not any(text in other for other in found):
            found.append(text)
        each = each.__cause__ or (None if text or each.__suppress_context__ else each.__context__)
    return shortened(": ".join(found) or type(error).__name__, limit)


def _memory(error: BaseException, text: str, verb: str) -> str | None:
    lower = _TO_LOWER.get(verb)
    if type(error).__name__ == "OutOfMemoryError" or re.search(_GPU, text):
        request = re.search(r"Tried to allocate [\d.]+ \w+", text)
        detail = f" ({request[0].lower()})" if request else ""
        return f"{verb or 'this'}: the GPU has too little memory{detail}; {lower or 'use one with more'}"
    more = "end what else takes it, or use a machine with more"
    if type(error).__name__ in ("BrokenProcessPool", "ProcessExpired"):
        return f"{verb or 'this'}: a process that worked for it was ended, {_KILLED}; {lower or more}"
    of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or of_system or (_is_foreign(error) and re.search(_HOST, text)):
        request = re.search(r"[Tt]ried to allocate \d+ bytes|allocate [\d.]+ \w+", text)
        detail = f" ({request[0].lower()})" if request else ""
        return f"{verb or 'this'}: this machine has too little memory{detail}; {lower or more}"
    return None


def verb_of(arguments: Sequence[str]) -> str:
    """Returns the verb of a command line if it is one that takes much memory; else an empty text."""
    return next((word for word in arguments if word in _TO_LOWER), "")


def explain_sigkill(verb: str = "") -> str:
    """Returns the likely reason of a SIGKILL without another known cause, and what to do if this verb runs."""
    lower = _TO_LOWER.get(verb)
    return f"{_KILLED}; {lower}" if lower else _KILLED


def _is_foreign(error: BaseException) -> bool:
    """Returns whether a library raised the error, and neither Python itself nor this package."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, RuntimeError | sqlite3.Error) or package not in ("builtins", "lcmlora")


def _code(text: str) -> int | None:
    if match := re.search(r"\((?:os error|errno) (\d+)\)", text):
        return int(match[1]) if int(match[1]) in _REMEDIES else None
    return next((code for code, pattern in _TEXTS.items() if re.search(pattern, text)), None)


def _text(filename: object) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes | os.PathLike) else str(filename)


def _shown(filename: object) -> str:
    text = _text(filename)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"


@contextlib.contextmanager
def as_oserror(path: Path, temporary: Path) -> Iterator[None]:
    """Turns what libraries raise in the block, if the disk refuses a write, into an OSError that names `path`.

    Args:
        temporary: the file or folder that is written to. A write to it finds the reason if a library gives none.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        code = _cause(error, temporary)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def _cause(error: BaseException, temporary: Path) -> int | None:
    text = str(error)
    if isinstance(error, OSError) or _is_foreign(error):
        if code := _code(text):
            return code
        if re.search(_WITHOUT_REASON, text):
            return _probe(temporary)
    return None


def _probe(temporary: Path) -> int:
    """Returns why nothing more can be written to the file, or into the folder."""
    target = temporary / ".probe" if temporary.is_dir() else temporary
    try:
        with target.open("ab") as file:
            file.write(bytes(1 << 16))
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EIO


def name_path(error: OSError, path: Path, temporary: Path | None = None) -> None:
    """Makes an error name `path`, or a file in it, instead of the temporary path. So does a failed write without a
    name."""
    if error.filename2 is not None and error.errno in _WRITE_ERRORS:  # of a copy: the first name is the source
        error.filename = error.filename2
        del error.filename2
    if error.filename is None:
        if error.errno in _WRITE_ERRORS:
            error.filename = str(path)
        return
    named = Path(_text(error.filename))
    if temporary is not None and named.is_relative_to(temporary):
        error.filename = str(path / named.relative_to(temporary))
    elif named.is_relative_to(path.parent) and any(map(temporaries.is_temporary, (named, *named.parents))):
        error.filename = str(path)  # the temporary place could not even be made, or has a library's own file
    else:
        return
    if error.filename2 is not None:
        del error.filename2
