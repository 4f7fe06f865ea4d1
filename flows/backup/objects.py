"""The objects of the SeaweedFS that `up` starts, read and written by S3 while it works."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from lcmlora.errors import UserError
from lcmlora.flows.backup import archive
from lcmlora.flows.backup.archive import StoredObject

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# What an object is stored with, beside its bytes: the answer's fields, which are the request's, too.
_HEADERS = ("CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType")
_ENCRYPTION = ("ServerSideEncryption", "SSEKMSKeyId")
_READY = "ready"  # what shows that the store can be written to
_GONE = ("NoSuchKey", "404")


def buckets(client: S3Client) -> list[str]:
    """Returns the names of all buckets."""
    return [str(each["Name"]) for each in client.list_buckets()["Buckets"]]


def versions(client: S3Client, bucket: str) -> dict[str, str]:
    """Returns the ETag of each object of a bucket, by its key."""
    return {key: etag for key, etag in _listed(client, bucket) if key != _READY}


def _listed(client: S3Client, bucket: str) -> Iterator[tuple[str, str]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for each in page.get("Contents", []):
            if not each["Key"].endswith("/"):  # a folder of SeaweedFS
                yield each["Key"], f"{each['ETag']} {each['LastModified'].isoformat()}"


def fetch(client: S3Client, bucket: str, key: str, backup: Path) -> StoredObject | None:
    """Copies an object into a backup. Returns None if it is gone.

    Raises:
        UserError: fewer bytes came than it has.
    """
    from botocore.exceptions import ClientError

    part = backup / archive.OBJECTS / "part"
    try:
        answer = client.get_object(Bucket=bucket, Key=key)
        tags = client.get_object_tagging(Bucket=bucket, Key=key)["TagSet"]
    except ClientError as error:
        if error.response["Error"]["Code"] in _GONE:
            return None
        raise
    content = archive.copied(answer["Body"], part)  # type: ignore[arg-type]
    if content.bytes != answer["ContentLength"]:
        raise UserError(f"s3://{bucket}/{key}: has {answer['ContentLength']} bytes, and {content.bytes} came")
    path = archive.object_path(backup, content.sha256)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part.replace(path)
    fields: dict[str, Any] = {**answer}
    return StoredObject(
        sha256=content.sha256,
        bytes=content.bytes,
        headers={name: str(fields[name]) for name in (*_HEADERS, *_ENCRYPTION) if fields.get(name)},
        metadata=dict(answer.get("Metadata", {})),
        tags={each["Key"]: each["Value"] for each in tags},
    )


def put(client: S3Client, bucket: str, key: str, stored: StoredObject, backup: Path) -> None:
    """Writes an object of a backup to a bucket, and reads it again.

    Raises:
        UserError: other bytes come back.
    """
    arguments: dict[str, Any] = {**stored.headers, "Metadata": stored.metadata}
    if stored.tags:
        arguments["Tagging"] = urlencode(stored.tags)
    checksum = base64.b64encode(bytes.fromhex(stored.sha256)).decode()
    with archive.object_path(backup, stored.sha256).open("rb") as body:
        client.put_object(Bucket=bucket, Key=key, Body=body, ChecksumSHA256=checksum, **arguments)
    digest = hashlib.sha256()
    for block in client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(1 << 20):
        digest.update(block)
    if digest.hexdigest() != stored.sha256:
        raise UserError(f"s3://{bucket}/{key}: other bytes came back than were written")
