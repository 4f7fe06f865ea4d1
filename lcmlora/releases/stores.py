"""Where releases lie: a directory or a bucket. What was created is never overwritten; small pointers are swapped."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lcmlora import progress
from lcmlora.config import Publish
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import temporaries
from lcmlora.io.files import atomic_write, make_folder, sha256_file, sync_folder

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_BLOCK = 1 << 20
_SMALL = 8 << 20  # bytes of what `read` takes into memory; a manifest of a thousand files has 0.2 MB
_SHOWN = 16  # blocks, MiB: a file from this size on shows its progress


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    name: str  # relative to the store, with slashes
    bytes: int
    time: datetime  # when it was written, UTC


class Store(Protocol):
    """Where releases lie. Names are relative and use slashes; nothing that was created is ever overwritten.

    Every method raises Unavailable where the store cannot be reached, UserError where it refuses.
    """

    uri: str

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        """Writes a new object whole or not at all; returns False where one of this name is already there."""

    def digest(self, name: str, *, reread: bool = False) -> str | None:
        """Returns the SHA-256 of the stored object, None where there is none.

        Args:
            reread: hash the bytes that are there now, whatever the server noted when they were written.
        """

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Returns a small object and its version tag, None where there is none. Raises UserError where it is large."""

    def fetch(self, name: str, target: Path, size: int) -> bool:
        """Writes the object to the file `target`, with its progress; returns False where there is none.

        Args:
            size: bytes that it should have; not more than these are written.

        Raises:
            UserError: it has more or fewer bytes.
            OSError: the target cannot be written.
        """

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        """Replaces a small object if its tag still is `tag` (None: if there is none); returns whether it did."""

    def entries(self, prefix: str) -> list[Entry]:
        """Returns the objects whose names begin with `prefix`, in the order of their names."""

    def link(self, name: str, seconds: int) -> str:
        """Returns an address at which anybody can read the object for so long."""


def open_store(
    settings: Publish,
    *,
    key: str = "publish.to",
    consequence: str = "the release is kept, and the next run publishes it",
) -> Store:
    """Returns the store that `publish.to` names. Raises UserError where it names neither a directory nor a bucket.

    Args:
        key, consequence: what messages say of who named the store, and of what follows where it cannot be reached.
    """
    if settings.to.startswith("s3://"):
        bucket, _, prefix = settings.to.removeprefix("s3://").strip("/").partition("/")
        if not bucket:
            raise UserError(f"{key}: expected s3://bucket/prefix, got {settings.to!r}")
        return S3Store(bucket, prefix, settings, key, consequence)
    if settings.to.startswith("file:///"):
        return DirectoryStore(Path(urllib.parse.unquote(settings.to.removeprefix("file://"))), key, consequence)
    if "://" in settings.to:
        raise UserError(f"{key}: expected a directory or s3://bucket/prefix, got {settings.to!r}")
    return DirectoryStore(Path(settings.to), key, consequence)


class DirectoryStore:
    """Releases in a directory. Hard links make creation exclusive on any local file system."""

    def __init__(self, root: Path, key: str = "publish.to", consequence: str = "the release is kept") -> None:
        self._root = root
        self._key = key
        self._consequence = consequence
        self.uri = root.absolute().as_uri()

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        path = self._root / name
        with self._explained(path):
            make_folder(path.parent)
            temporaries.sweep(path.parent)
            with temporaries.file_beside(path) as (temporary, descriptor):
                with os.fdopen(descriptor, "wb", closefd=False) as target:
                    # A copy is checked, not the source: what is read twice may change between.
                    digest = hashlib.sha256()
                    for block in _blocks(content):
                        digest.update(block)
                        target.write(block)
                    target.flush()
                    os.fsync(descriptor)
                if digest.hexdigest() != sha256:
                    raise UserError(f"{path.name}: changed while it was published; package the release again")
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            sync_folder(path.parent)
        return True

    def digest(self, name: str, *, reread: bool = False) -> str | None:
        path = self._root / name
        with self._explained(path):
            return sha256_file(path) if path.is_file() else None

    def read(self, name: str) -> tuple[bytes, str] | None:
        path = self._root / name
        with self._explained(path):
            if not path.is_file():
                return None
            with path.open("rb") as file:
                content = _read_small(file.read, f"{self.uri}/{name}")
            return content, hashlib.sha256(content).hexdigest()

    def fetch(self, name: str, target: Path, size: int) -> bool:
        path = self._root / name
        with self._explained(path):
            if not path.is_file():
                return False

        def blocks() -> Iterator[bytes]:
            with self._explained(path), path.open("rb") as file:
                yield from _pieces(file.read)

        _write(blocks(), size, target, f"{self.uri}/{name}")
        return True

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        path = self._root / name
        with self._explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # The lock is a file of its own: the pointer is replaced, and a lock on it would go with the old one.
            with path.with_name(f".{path.name}.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                current = self.read(name)
                if (current[1] if current else None) != tag:
                    return False
                atomic_write(path, lambda p: p.write_bytes(content))
        return True

    def entries(self, prefix: str) -> list[Entry]:
        folder = self._root / prefix.rpartition("/")[0]
        with self._explained(folder):
            found = []
            for path in folder.rglob("*") if folder.is_dir() else ():
                name = path.relative_to(self._root).as_posix()
                if not path.name.startswith(".") and name.startswith(prefix) and path.is_file():
                    state = path.stat()
                    found.append(Entry(name, state.st_size, datetime.fromtimestamp(int(state.st_mtime), UTC)))
        return sorted(found, key=lambda entry: entry.name)

    def link(self, name: str, seconds: int) -> str:
        raise UserError(f"{self.uri}: a directory gives no links; they need a release at s3://bucket/prefix")

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._key}: cannot use {path}: {error.strerror or error}; {self._consequence}"
            ) from error


def _blocks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        yield from _pieces(file.read)


def _pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while block := read(_BLOCK):
        yield block


def _read_small(read: Callable[[int], bytes], place: str) -> bytes:
    pieces: list[bytes] = []
    for block in _pieces(read):
        pieces.append(block)
        if sum(map(len, pieces)) > _SMALL:
            raise UserError(f"{place}: has more than {_SMALL} bytes, expected a small file; do not use it")
    return b"".join(pieces)


def _write(blocks: Iterable[bytes], size: int, target: Path, place: str) -> None:
    count, written = -(-size // _BLOCK), 0
    with target.open("wb") as file:
        for block in progress.track(blocks, f"{target.name}, MiB", total=count, quiet=count < _SHOWN):
            written += len(block)
            if written > size:
                break
            file.write(block)
    if written != size:
        shown = f"more than {size} bytes" if written > size else f"{written} bytes"
        raise UserError(f"{place}: has {shown}, and {size} are listed; it was changed in the store, do not use it")


class S3Store:
    """Releases in a bucket. Credentials come from boto3's own chain; the server checks every object's SHA-256."""

    def __init__(self, bucket: str, prefix: str, settings: Publish, key: str, consequence: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._consequence = consequence
        self._client = _client(settings, f"{key}: bucket {bucket}")
        endpoint = settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self._place = f"{key}: bucket {bucket} at {endpoint or 'AWS'}"
        self._options: dict[str, Any] = {}  # of every object that is written
        if settings.encryption:
            self._options["ServerSideEncryption"] = settings.encryption
        if settings.kms_key:
            self._options["SSEKMSKeyId"] = settings.kms_key
        if settings.tags:
            self._options["Tagging"] = urllib.parse.urlencode(settings.tags)

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        def put() -> bool:
            with contextlib.ExitStack() as stack:
                body = content if isinstance(content, bytes) else stack.enter_context(content.open("rb"))
                self._put(name, body, sha256, {"IfNoneMatch": "*"})
            return True

        return self._call(put, {"PreconditionFailed": False}, name)

    def digest(self, name: str, *, reread: bool = False) -> str | None:
        def noted() -> str | None:
            stored = self._client.head_object(**self._at(name), ChecksumMode="ENABLED").get("ChecksumSHA256")
            # Objects that others wrote may have none.
            return base64.b64decode(stored).hex() if stored else hashed()

        def hashed() -> str | None:
            digest = hashlib.sha256()
            for block in _pieces(self._client.get_object(**self._at(name))["Body"].read):
                digest.update(block)
            return digest.hexdigest()

        return self._call(hashed if reread else noted, {"404": None, "NoSuchKey": None}, name)

    def read(self, name: str) -> tuple[bytes, str] | None:
        def get() -> tuple[bytes, str] | None:
            answer = self._client.get_object(**self._at(name))
            return _read_small(answer["Body"].read, f"{self.uri}/{name}"), answer["ETag"]

        return self._call(get, {"NoSuchKey": None}, name)

    def fetch(self, name: str, target: Path, size: int) -> bool:
        def get() -> bool:
            answer = self._client.get_object(**self._at(name))
            _write(_pieces(answer["Body"].read), size, target, f"{self.uri}/{name}")
            return True

        return self._call(get, {"NoSuchKey": False}, name)

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        sha256 = hashlib.sha256(content).hexdigest()

        def put() -> bool:
            self._put(name, content, sha256, {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag})
            return True

        # The object that was there may have gone: NoSuchKey.
        return self._call(put, {"PreconditionFailed": False, "NoSuchKey": False}, name)

    def entries(self, prefix: str) -> list[Entry]:
        def listed() -> list[Entry]:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            return [
                Entry(each["Key"].removeprefix(self._prefix), each["Size"], each["LastModified"].astimezone(UTC))
                for page in pages
                for each in page.get("Contents", [])
            ]

        return sorted(self._call(listed, {}, prefix), key=lambda entry: entry.name)

    def link(self, name: str, seconds: int) -> str:
        def presigned() -> str:
            return str(self._client.generate_presigned_url("get_object", Params=self._at(name), ExpiresIn=seconds))

        return self._call(presigned, {}, name)

    def _put(self, name: str, body: Any, sha256: str, condition: dict[str, str]) -> None:
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        request: Any = self._at(name) | self._options | condition
        self._client.put_object(**request, Body=body, ChecksumSHA256=checksum)

    def _at(self, name: str) -> Any:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _call(self, action: Callable[[], T], answers: Mapping[str, T], name: str) -> T:
        """Runs one request, again where the connection or the server failed.

        Args:
            answers: what error codes that are no errors stand for.
            name: the object, or the beginning of the objects' names, that it is about.
        """
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
            IncompleteReadError,
        )
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

        def passes(error: BaseException) -> bool:
            if isinstance(error, ClientError):
                busy = {"SlowDown", "ConditionalRequestConflict", "RequestTimeout"}
                return _status(error) >= 500 or _code(error) in busy
            return isinstance(error, (HTTPClientError, IncompleteReadError))

        attempts = Retrying(
            retry=retry_if_exception(passes),
            stop=stop_after_attempt(4),
            wait=wait_exponential_jitter(initial=0.5, max=8),
            reraise=True,
        )
        try:
            return attempts(action)
        except ClientError as error:
            if _code(error) in answers:
                return answers[_code(error)]
            reason = f"{_code(error)} ({error.response['Error'].get('Message') or _status(error)})"
            kind = Unavailable if passes(error) else UserError
        except BotoCoreError as error:
            reason = " ".join(str(error).split())
            kind = Unavailable if passes(error) or isinstance(error, ConnectionError) else UserError
        about = f" for {self._prefix}{name}" if self._prefix + name else ""
        raise kind(f"{self._place}: {reason}{about}; {self._consequence}")


def _client(settings: Publish, place: str) -> S3Client:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    options = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"total_max_attempts": 1},  # `S3Store._call` retries
        signature_version="s3v4",  # of links as well, which boto3 makes in an older one for some regions
        # Other S3s do not know the checksums that boto3 adds by itself; ours are explicit.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        client: S3Client = boto3.Session().client(
            "s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=options
        )
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{place}: {' '.join(str(error).split())}") from None
    # It would stand in every message about this endpoint.
    if "@" in urllib.parse.urlsplit(client.meta.endpoint_url).netloc:
        raise UserError(
            "publish.endpoint_url: holds a user or a password; expected http://host:port, and the keys in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
        )
    return client


def _code(error: Any) -> str:
    return str(error.response["Error"].get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
