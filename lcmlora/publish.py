"""Published releases, in a directory or on S3: an immutable prefix each, its manifest last, and a channel's pointer.

    TO/MODEL/sha256-<first 12 of the adapter's SHA-256>/{weights, scheduler, card, ..., manifest.json}
    TO/MODEL/channels/champion.json

A prefix without a manifest is no release: readers skip it, and the next run completes it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lcmlora import release
from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.files import atomic_write, sha256_file

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MANIFEST = "manifest.json"

T = TypeVar("T")


class Store(Protocol):
    """Where releases lie. Names are relative and use slashes; nothing that was created is ever overwritten."""

    uri: str

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        """Writes a new object whole or not at all; returns False where one of this name is already there."""

    def digest(self, name: str) -> str | None:
        """Returns the SHA-256 of the stored object, None where there is none."""

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Returns a small object and its version tag, None where there is none."""

    def fetch(self, name: str, target: Path) -> bool:
        """Writes the object to the file `target`; returns False where there is none."""

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        """Replaces a small object if its tag still is `tag` (None: if there is none); returns whether it did."""


def publish(folder: Path, model: str, settings: Publish) -> str:
    """Publishes the release in `folder` and returns its address. A release that is already there is left as it is.

    The identity of a release is its adapter: the same adapter packaged again, with other timings in its metrics, is
    the release that already stands.

    Raises:
        UserError: the folder does not match its SHA256SUMS, the store cannot be reached or refuses, or another
            publisher has left different files under this adapter's prefix.
    """
    release.verify(folder)
    sums = release.checksums(folder) | {release.CHECKSUMS: sha256_file(folder / release.CHECKSUMS)}
    sha256 = release.digest(folder)
    store = open_store(settings)
    prefix = _prefix(model, sha256)
    if _published(store, model, sha256):
        return f"{store.uri}/{prefix}"
    for name, expected in sums.items():
        store.create(f"{prefix}/{name}", folder / name, expected)
    # Checked after all have been written: whichever publisher wrote an object, it must be the one that is listed.
    for name, expected in sums.items():
        _expect(store, f"{prefix}/{name}", expected)
    files = [{"name": n, "bytes": (folder / n).stat().st_size, "sha256": s} for n, s in sorted(sums.items())]
    manifest = _json({"model": model, "sha256": sha256, "files": files})
    digest = hashlib.sha256(manifest).hexdigest()
    if not store.create(f"{prefix}/{MANIFEST}", manifest, digest):
        _expect(store, f"{prefix}/{MANIFEST}", digest)
    return f"{store.uri}/{prefix}"


def point(model: str, sha256: str, settings: Publish, channel: str = "champion") -> str:
    """Points the channel at a published release and returns the pointer's address; idempotent.

    Raises:
        UserError: there is no such release, or another publisher moved the pointer at the same moment.
    """
    store = open_store(settings)
    if not _published(store, model, sha256):
        raise UserError(f"{store.uri}/{_prefix(model, sha256)}: no {MANIFEST}, so no release to point {channel} at")
    name = f"{model}/channels/{channel}.json"
    content = _json({"model": model, "sha256": sha256, "release": f"{store.uri}/{_prefix(model, sha256)}"})
    current = store.read(name)
    if current is None or current[0] != content:
        moved = store.swap(name, content, current[1] if current else None)
        after = None if moved else store.read(name)
        if not moved and (after is None or after[0] != content):
            raise UserError(f"{store.uri}/{name}: another publisher moved it just now; look at it, then run again")
    return f"{store.uri}/{name}"


def find(uri: str, settings: Publish) -> tuple[str, str]:
    """Returns the address of a published release on S3, and its adapter's SHA-256.

    Args:
        uri: s3://bucket/.../MODEL/sha256-..., or a channel's pointer s3://bucket/.../MODEL/channels/champion.json.
        settings: its endpoint and region are used.

    Raises:
        UserError: there is no whole release, or the store cannot be reached.
    """
    if uri.endswith(".json"):
        folder, _, name = uri.rpartition("/")
        found = _reader(folder, settings).read(name)
        if found is None:
            raise UserError(f"{uri}: no such pointer")
        uri = str(_read(found[0], uri, "release"))
    found = _reader(uri, settings).read(MANIFEST)
    if found is None:
        raise UserError(f"{uri}: holds no {MANIFEST}, so no release; expected s3://bucket/.../MODEL/sha256-...")
    return uri.rstrip("/"), str(_read(found[0], f"{uri}/{MANIFEST}", "sha256"))


def download(uri: str, settings: Publish, folder: Path) -> None:
    """Writes the files of the release at `uri`, see `find`, to the folder.

    Raises:
        UserError: a file is missing or is not the one that the manifest lists, or the store cannot be reached.
    """
    store = _reader(uri, settings)
    found = store.read(MANIFEST)
    files = _read(found[0], f"{uri}/{MANIFEST}", "files") if found else []
    for file in files:
        name, expected = str(file["name"]), file["sha256"]
        if Path(name).name != name:
            raise UserError(f"{uri}/{MANIFEST}: {name!r} is not the name of a file")
        if not store.fetch(name, folder / name):
            raise UserError(f"{uri}/{name}: is listed in {MANIFEST} and missing")
        if (got := sha256_file(folder / name)) != expected:
            raise UserError(f"{uri}/{name}: expected sha256 {expected[:12]}..., got {got[:12]}...")


def _reader(uri: str, settings: Publish) -> Store:
    return open_store(settings.model_copy(update={"to": uri}), key="--adapter", consequence="ask again later")


def _read(content: bytes, place: str, key: str) -> Any:
    try:
        return json.loads(content)[key]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place}: expected a JSON object with {key}") from None


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
    if "://" in settings.to:
        raise UserError(f"{key}: expected a directory or s3://bucket/prefix, got {settings.to!r}")
    return DirectoryStore(Path(settings.to))


def _prefix(model: str, sha256: str) -> str:
    return f"{model}/sha256-{sha256[:12]}"


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _published(store: Store, model: str, sha256: str) -> bool:
    name = f"{_prefix(model, sha256)}/{MANIFEST}"
    found = store.read(name)
    if found and (theirs := json.loads(found[0])["sha256"]) != sha256:
        raise UserError(f"{store.uri}/{name}: is the release of adapter {theirs}, expected {sha256}")
    return found is not None


def _expect(store: Store, name: str, sha256: str) -> None:
    found = store.digest(name)
    if found != sha256:
        shown = f"holds sha256 {found[:12]}..." if found else "is missing"
        raise UserError(
            f"{store.uri}/{name}: {shown}, expected {sha256[:12]}...; another publisher left it there: if no other "
            f"run is publishing now, delete the prefix {Path(name).parent} (it has no {MANIFEST}) and run again"
        )


class DirectoryStore:
    """Releases in a directory. Hard links make creation exclusive on any local file system."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = root.absolute().as_uri()

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        path = self._root / name
        with self._explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as target:
                    # A copy is checked, not the source: what is read twice may change between.
                    digest = hashlib.sha256()
                    for block in _blocks(content):
                        digest.update(block)
                        target.write(block)
                    target.flush()
                    os.fsync(target.fileno())
                if digest.hexdigest() != sha256:
                    raise UserError(f"{path.name}: changed while it was published; package the release again")
                Path(temporary).chmod(0o644)
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                Path(temporary).unlink(missing_ok=True)
        return True

    def digest(self, name: str) -> str | None:
        path = self._root / name
        with self._explained(path):
            return sha256_file(path) if path.is_file() else None

    def read(self, name: str) -> tuple[bytes, str] | None:
        path = self._root / name
        with self._explained(path):
            if not path.is_file():
                return None
            content = path.read_bytes()
            return content, hashlib.sha256(content).hexdigest()

    def fetch(self, name: str, target: Path) -> bool:
        path = self._root / name
        with self._explained(path):
            if not path.is_file():
                return False
            shutil.copyfile(path, target)
        return True

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        current = self.read(name)
        if (current[1] if current else None) != tag:
            return False
        path = self._root / name
        with self._explained(path):
            atomic_write(path, lambda p: p.write_bytes(content))
        return True

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"publish.to: cannot use {path}: {error.strerror or error}; the release is kept") from error


def _blocks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


class S3Store:
    """Releases in a bucket. Credentials come from boto3's own chain; the server checks every object's SHA-256."""

    def __init__(self, bucket: str, prefix: str, settings: Publish, key: str, consequence: str) -> None:
        import boto3
        from botocore.config import Config

        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._place = f"{key}: bucket {bucket} at {settings.endpoint_url or 'AWS'}"
        self._consequence = consequence
        self._client: S3Client = boto3.Session().client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region,
            config=Config(
                connect_timeout=5,
                read_timeout=60,
                retries={"total_max_attempts": 1},  # `_call` retries
                # Other S3s do not know the checksums that boto3 adds by itself; ours are explicit.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()

        def put() -> bool:
            with contextlib.ExitStack() as stack:
                body = content if isinstance(content, bytes) else stack.enter_context(content.open("rb"))
                self._client.put_object(**self._at(name), Body=body, ChecksumSHA256=checksum, IfNoneMatch="*")
            return True

        return self._call(put, {"PreconditionFailed": False})

    def digest(self, name: str) -> str | None:
        def head() -> str | None:
            answer = self._client.head_object(**self._at(name), ChecksumMode="ENABLED")
            if stored := answer.get("ChecksumSHA256"):
                return base64.b64decode(stored).hex()
            body = self._client.get_object(**self._at(name))["Body"]  # written by others, without a checksum
            digest = hashlib.sha256()
            for block in body.iter_chunks(1 << 20):
                digest.update(block)
            return digest.hexdigest()

        return self._call(head, {"404": None})

    def read(self, name: str) -> tuple[bytes, str] | None:
        def get() -> tuple[bytes, str] | None:
            answer = self._client.get_object(**self._at(name))
            return answer["Body"].read(), answer["ETag"]

        return self._call(get, {"NoSuchKey": None})

    def fetch(self, name: str, target: Path) -> bool:
        def get() -> bool:
            body = self._client.get_object(**self._at(name))["Body"]
            with target.open("wb") as file:
                for block in body.iter_chunks(1 << 20):
                    file.write(block)
            return True

        return self._call(get, {"NoSuchKey": False})

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        checksum = base64.b64encode(hashlib.sha256(content).digest()).decode()

        def put() -> bool:
            if tag is None:
                self._client.put_object(**self._at(name), Body=content, ChecksumSHA256=checksum, IfNoneMatch="*")
            else:
                self._client.put_object(**self._at(name), Body=content, ChecksumSHA256=checksum, IfMatch=tag)
            return True

        return self._call(put, {"PreconditionFailed": False})

    def _at(self, name: str) -> Any:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _call(self, action: Callable[[], T], answers: Mapping[str, T]) -> T:
        """Runs one request, again where the connection or the server failed.

        Args:
            answers: what error codes that are no errors stand for.
        """
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

        def passes(error: BaseException) -> bool:
            if isinstance(error, ClientError):
                busy = {"SlowDown", "ConditionalRequestConflict", "RequestTimeout"}
                return _status(error) >= 500 or _code(error) in busy
            return isinstance(error, HTTPClientError)

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
        except BotoCoreError as error:
            reason = " ".join(str(error).split())
        raise UserError(f"{self._place}: {reason}; {self._consequence}")


def _code(error: Any) -> str:
    return str(error.response["Error"].get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
