"""Files of this machine or of a bucket, read by fsspec: s3://bucket/prefix needs s3fs and AWS's usual variables."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from lcmlora import extras
from lcmlora.errors import Unavailable, UserError

_AT_ONCE = 512  # files


class Files:
    """The files of one path."""

    def __init__(self, path: str, setting: str = "data.path") -> None:
        """Raises as `list` does, and UserError where the path's protocol cannot be read here.

        Args:
            setting: the key in params.yaml that has the path, for messages.
        """
        extras.require("fsspec", extra="train", needed_by=setting)
        if path.startswith("s3://"):
            extras.require("s3fs", extra="pipeline", needed_by=f"{setting}: {path}")
        from fsspec.core import url_to_fs

        self.path = path
        self.setting = setting
        try:
            self._system, root = url_to_fs(path, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise UserError(f"{setting}: {path}: {error}") from None
        self.root: str = root.rstrip("/")
        self.only: str | None = None  # the file's name, if the path is a file
        with self._one_line_errors():
            if self._system.isfile(self.root):
                self.root, _, self.only = self.root.rpartition("/")

    def sizes(self, *, missing_ok: bool = False) -> dict[str, int]:
        """Returns the bytes of every file below the path, by name, sorted. Raises as `list` does, but for a path that
        may be missing."""
        with self._one_line_errors():
            found = self._system.find(self.root, detail=True)
        if not found and not missing_ok and not self._exists():
            raise UserError(f"{self.setting}: {self.path}: no such file or folder")
        names = {PurePosixPath(path).relative_to(self.root): facts["size"] for path, facts in sorted(found.items())}
        return {str(name): int(size) for name, size in names.items() if not _hidden(name)}

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """Returns the contents of small files, by name, read at once. Missing and forbidden files are left out."""
        found: dict[str, bytes] = {}
        for start in range(0, len(names), _AT_ONCE):
            paths = {f"{self.root}/{name}": name for name in names[start : start + _AT_ONCE]}
            with self._one_line_errors():
                read = self._system.cat(list(paths), on_error="return")
            for path, content in read.items():
                if isinstance(content, bytes):
                    found[paths[path]] = content
                elif not isinstance(content, FileNotFoundError | PermissionError):
                    raise Unavailable(f"{self.setting}: {self.path}: {content}")
        return found

    @property
    def local(self) -> bool:
        """Whether the files are of this machine; `root` is then a path."""
        return "file" in self._system.protocol

    def list(self, *endings: str) -> list[str]:
        """Returns the names below the path with one of these endings, sorted; of a file its own name.

        Raises:
            UserError: there is no such path.
            Unavailable: it cannot be reached.
        """
        if self.only:
            return [self.only] if PurePosixPath(self.only).suffix.lower() in endings else []
        with self._one_line_errors():
            found = self._system.find(self.root)
        if not found and not self._exists():
            raise UserError(f"{self.setting}: {self.path}: no such file or folder")
        names = (PurePosixPath(path).relative_to(self.root) for path in found)
        return sorted(str(name) for name in names if name.suffix.lower() in endings and not _hidden(name))

    def state(self) -> str:
        """Returns a digest that changes with any name, size, time or tag of a file. Raises as `list` does."""
        digest = hashlib.sha256()
        for path, facts in self._facts():
            digest.update(json.dumps([path, facts], sort_keys=True).encode())
        return digest.hexdigest()

    def states(self) -> dict[str, str]:
        """Returns a text for each file below the path that changes with it, by its name. Raises as `list` does."""
        names = ((PurePosixPath(path).relative_to(self.root), facts) for path, facts in self._facts())
        states = {str(name): json.dumps(facts, sort_keys=True) for name, facts in names if not _hidden(name)}
        if not states and not self._exists():
            raise UserError(f"{self.setting}: {self.path}: no such file or folder")
        return states

    def _facts(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yields size, time and tag of each file, sorted by their paths."""
        with self._one_line_errors():
            path = f"{self.root}/{self.only}" if self.only else self.root
            found = self._system.find(path, detail=True)
        wanted = ("size", "ETag", "LastModified", "mtime")
        for path, facts in sorted(found.items()):
            yield path, {name: str(facts.get(name)) for name in wanted}

    def open(self, name: str) -> IO[bytes]:
        """Returns the file for random access. Raises as `list` does, and UserError where it is no ordinary file: a pipe
        would block for ever."""
        path = f"{self.root}/{name}"
        with self._one_line_errors():
            if self.local and not stat.S_ISREG(Path(path).stat().st_mode):
                raise UserError(f"{self.setting}: {self.path}: {name}: not an ordinary file")
            file: IO[bytes] = self._system.open(path, "rb")
            return file

    def read(self, name: str, start: int, length: int) -> bytes:
        """Returns these bytes of the file. Raises as `list` does."""
        with self._one_line_errors():
            content: bytes = self._system.cat_file(f"{self.root}/{name}", start=start, end=start + length)
            return content

    def put(self, path: Path, name: str) -> None:
        """Uploads a file of this machine.

        Raises:
            UserError, Unavailable: as `list` does; or a bucket has stored it in part, or without the encryption that
                fsspec's settings ask for (`s3_additional_kwargs`).
        """
        with self._one_line_errors():
            if self.local:  # a bucket has no folders
                self._system.makedirs(self.root, exist_ok=True)
            self._system.put_file(str(path), f"{self.root}/{name}")
            if "s3" not in self._system.protocol:
                return
            bucket, key, _ = self._system.split_path(f"{self.root}/{name}")
            stored = self._system.call_s3("head_object", Bucket=bucket, Key=key)
        asked = self._system.s3_additional_kwargs.get("ServerSideEncryption")
        found = stored.get("ServerSideEncryption")
        if stored["ContentLength"] != (size := path.stat().st_size):
            raise UserError(f"{self.setting}: {self.path}: {name} has {stored['ContentLength']} bytes, expected {size}")
        if asked and found != asked:
            raise UserError(
                f"{self.setting}: {self.path}: {name} was stored with encryption {found or 'none'}, expected {asked}; "
                "delete it, and use a server that encrypts"
            )

    def _exists(self) -> bool:
        with self._one_line_errors():
            return bool(self._system.exists(self.root))

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, *_botocore_errors()) as error:
            plain = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, FileNotFoundError | PermissionError):
                raise UserError(f"{self.setting}: {self.path}: {plain}") from None
            raise Unavailable(f"{self.setting}: {self.path}: {plain}") from error


def _hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _botocore_errors() -> tuple[Any, ...]:
    """Returns the errors of a bucket that are no OSErrors."""
    try:
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return ()
    return (BotoCoreError,)
