"""A store in a bucket of S3, or of a server with its protocol."""

from __future__ import annotations

import base64
import contextlib
import copy
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
from lcmlora.releases.stores import s3_probe
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
        self._settings = settings
        self._lacking: frozenset[str] | None = None  # what the server ignores; None: not tried yet
        self._options: dict[str, str] = {}  # for every object that is written
        if settings.encryption:
            self._options["ServerSideEncryption"] = settings.encryption
        if settings.kms_key:
            self._options["SSEKMSKeyId"] = settings.kms_key
        if settings.tags:
            self._options["Tagging"] = urllib.parse.urlencode(settings.tags)

    @classmethod
    def open(cls, settings: Publish, key: str, consequence: str) -> Self:
        bucket, _, prefix = settings.first.removeprefix("s3://").strip("/").partition("/")
        if not bucket:
            raise UserError(f"{key}: expected {cls.form}, got {settings.first!r}")
        return cls(bucket, prefix, settings, key, consequence)

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        condition = {"IfNoneMatch": "*"}
        if "create" in self._tried(name):  # which publish.tolerate accepts
            if self._facts(name) is not None:
                return False
            condition = {}

        def put() -> bool:
            with contextlib.ExitStack() as stack:
                body = content if isinstance(content, bytes) else stack.enter_context(content.open("rb"))
                self._put(name, body, sha256, condition)
            return True

        return self._call(put, {"PreconditionFailed": False}, name)

    def digest(self, name: str, *, reread: bool = False) -> str | None:
        if not reread and "checksum" not in (self._lacking or ()):
            facts = self._facts(name)
            if facts is None:
                return None
            if stored := facts.get("ChecksumSHA256"):  # objects of other programs may have none
                return base64.b64decode(stored).hex()

        def hashed() -> str | None:
            digest = hashlib.sha256()
            for block in in_blocks(self._client.get_object(**self._at(name))["Body"].read):
                digest.update(block)
            return digest.hexdigest()

        return self._call(hashed, {"404": None, "NoSuchKey": None}, name)

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
        sha256, condition = (
            hashlib.sha256(content).hexdigest(),
            {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag},
        )
        if ("create" if tag is None else "swap") in self._tried(name):  # which publish.tolerate accepts
            facts = self._facts(name)
            if (facts["ETag"] if facts else None) != tag:
                return False
            condition = {}

        def put() -> bool:
            self._put(name, content, sha256, condition)
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

    def delete(self, name: str) -> None:
        def remove() -> None:
            self._client.delete_object(**self._at(name))

        self._call(remove, {"NoSuchKey": None}, name)

    def link(self, name: str, seconds: int) -> str:
        def presigned() -> str:
            return str(self._client.generate_presigned_url("get_object", Params=self._at(name), ExpiresIn=seconds))

        return self._call(presigned, {}, name)

    def _put(self, name: str, body: Any, sha256: str, condition: dict[str, str]) -> None:
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        request: Any = self._at(name) | self._options | condition
        answer = self._client.put_object(**request, Body=body, ChecksumSHA256=checksum)
        wanted, key, place = self._settings.encryption, self._settings.kms_key, f"{self.uri}/{name}"
        if wanted and not s3_probe.is_encrypted(answer, wanted, key):
            found = answer.get("SSEKMSKeyId") or answer.get("ServerSideEncryption") or "none"
            raise UserError(
                f"{place}: was stored with encryption {found}, and publish.encryption asks for {key or wanted}; delete "
                "it, and publish to a server that encrypts"
            )
        if answer.get("ChecksumSHA256", checksum) != checksum:
            raise UserError(
                f"{place}: was stored with another SHA-256 than that of the upload; delete it, and run again"
            )
        if not answer.get("ETag"):
            raise UserError(f"{place}: the server's answer to its upload has no ETag, so it is no S3 server")

    def _facts(self, name: str) -> Any:
        """Returns the answer to HEAD, None where there is no such object."""

        def head() -> Any:
            return self._client.head_object(**self._at(name), ChecksumMode="ENABLED")

        return self._call(head, {"404": None, "NoSuchKey": None}, name)

    def _tried(self, name: str) -> frozenset[str]:
        """Returns what the server lacks of what publishing relies on, and publish.tolerate accepts.

        The server is tried before the first write to it, or its remembered behaviour is taken.

        Args:
            name: of the object that is about to be written.

        Raises:
            UserError: it lacks something else.
        """
        if self._lacking is None:
            settings, endpoint = self._settings, self._client.meta.endpoint_url
            lacking = s3_probe.recall(endpoint, self._bucket, settings)
            if lacking is None or lacking.difference(settings.tolerate):
                lacking = self._probe(s3_probe.name_for(self._prefix + name))
                s3_probe.remember(endpoint, self._bucket, settings, lacking)
            if excess := lacking.difference(settings.tolerate):
                raise UserError(f"{self._place}: {s3_probe.refusal(excess)}")
            self._lacking = lacking
        return self._lacking

    def _probe(self, key: str) -> frozenset[str]:
        top = copy.copy(self)  # the store may be a release's folder, and the object for trying lies above it
        top._prefix = ""
        checksum = base64.b64encode(hashlib.sha256(s3_probe.CONTENT).digest()).decode()
        refused, unknown = s3_probe.Outcome("refused", {}), s3_probe.Outcome("unknown", {})
        codes = ("PreconditionFailed", "BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch")
        answers = dict.fromkeys(codes, refused) | {"NoSuchKey": refused, "NotImplemented": unknown, "501": unknown}

        def put(parameters: dict[str, str]) -> s3_probe.Outcome:
            request: Any = top._at(key) | self._options | {"ChecksumSHA256": checksum} | parameters

            def write() -> s3_probe.Outcome:
                return s3_probe.Outcome("stored", self._client.put_object(**request, Body=s3_probe.CONTENT))

            return top._call(write, answers, key)

        return s3_probe.find_lacking(put, lambda: top._facts(key) or {}, self._settings.encryption)

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
                return (_status(error) >= 500 and _status(error) != 501) or _code(error) in busy
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
