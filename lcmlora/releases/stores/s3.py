"""A store in a bucket of S3, or of a server with its protocol."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import urllib.parse
from collections.abc import Callable, Mapping
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lcmlora import extras
from lcmlora.config import Publish
from lcmlora.errors import Unavailable, UserError
from lcmlora.releases.stores.store import Entry, Store, in_blocks, read_small, write_blocks

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")


class S3Store(Store):
    """Releases in a bucket. boto3 finds the credentials as usual. The server checks the SHA-256 of every object."""

    form = "s3://bucket/prefix"

    def __init__(self, bucket: str, prefix: str, settings: Publish, key: str, consequence: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._consequence = consequence
        self._client = _client(settings, f"{key}: bucket {bucket}")
        endpoint = settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self._place = f"{key}: bucket {bucket} at {endpoint or 'AWS'}"
        self._options: dict[str, str] = {}  # for every object that is written
        if settings.encryption:
            self._options["ServerSideEncryption"] = settings.encryption
        if settings.kms_key:
            self._options["SSEKMSKeyId"] = settings.kms_key
        if settings.tags:
            self._options["Tagging"] = urllib.parse.urlencode(settings.tags)

    @classmethod
    def open(cls, settings: Publish, key: str, consequence: str) -> Self:
        bucket, _, prefix = settings.to.removeprefix("s3://").strip("/").partition("/")
        if not bucket:
            raise UserError(f"{key}: expected {cls.form}, got {settings.to!r}")
        return cls(bucket, prefix, settings, key, consequence)

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
            # Objects of other programs may have none.
            return base64.b64decode(stored).hex() if stored else hashed()

        def hashed() -> str | None:
            digest = hashlib.sha256()
            for block in in_blocks(self._client.get_object(**self._at(name))["Body"].read):
                digest.update(block)
            return digest.hexdigest()

        return self._call(hashed if reread else noted, {"404": None, "NoSuchKey": None}, name)

    def read(self, name: str) -> tuple[bytes, str] | None:
        def get() -> tuple[bytes, str] | None:
            answer = self._client.get_object(**self._at(name))
            return read_small(answer["Body"].read, f"{self.uri}/{name}"), answer["ETag"]

        return self._call(get, {"NoSuchKey": None}, name)

    def fetch(self, name: str, target: Path, size: int) -> bool:
        def get() -> bool:
            answer = self._client.get_object(**self._at(name))
            write_blocks(in_blocks(answer["Body"].read), size, target, f"{self.uri}/{name}")
            return True

        return self._call(get, {"NoSuchKey": False}, name)

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        sha256 = hashlib.sha256(content).hexdigest()

        def put() -> bool:
            self._put(name, content, sha256, {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag})
            return True

        # NoSuchKey: the object may have been deleted since.
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
        """Runs one request, and repeats it if the connection or the server fails.

        Args:
            answers: the results for error codes that are no errors.
            name: of the object, or the prefix of the objects, for messages.
        """
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
            IncompleteReadError,
        )
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

        def is_temporary(error: BaseException) -> bool:
            if isinstance(error, ClientError):
                busy = {"SlowDown", "ConditionalRequestConflict", "RequestTimeout"}
                return _status(error) >= 500 or _code(error) in busy
            return isinstance(error, (HTTPClientError, IncompleteReadError))

        attempts = Retrying(
            retry=retry_if_exception(is_temporary),
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
            kind = Unavailable if is_temporary(error) else UserError
        except BotoCoreError as error:
            reason = " ".join(str(error).split())
            kind = Unavailable if is_temporary(error) or isinstance(error, ConnectionError) else UserError
        about = f" for {self._prefix}{name}" if self._prefix + name else ""
        raise kind(f"{self._place}: {reason}{about}; {self._consequence}")


def _client(settings: Publish, place: str) -> S3Client:
    extras.require("boto3", "tenacity", extra="registry", needed_by=place)
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    options = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"total_max_attempts": 1},  # `S3Store._call` retries
        signature_version="s3v4",  # for links, too, for which boto3 uses an older one in some regions
        # Other S3 servers do not know the checksums that boto3 adds by itself. Ours are explicit.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        client: S3Client = boto3.Session().client(
            "s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=options
        )
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{place}: {' '.join(str(error).split())}") from None
    # Every message about this endpoint would show it.
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
