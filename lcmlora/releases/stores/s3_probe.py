"""What an S3 server does with the conditions, checksums and encryption that publishing relies on.

Some servers answer 200 to what they should refuse, and then overwrite another publisher's files, or store in clear
what was to be encrypted. So each server is tried on an object of its own before the first write, and the result is
remembered for a week in the user's cache: a server may be upgraded, or replaced behind its address. A server that
lacks something is tried again each time, unless `publish.tolerate` accepts it.

Publishers that know nothing of each other write that object, and some may not be allowed to delete. It has one name in
each model's folder, always the same bytes, and is never deleted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io.files import make_folder, write_json
from lcmlora.io.parsing import read_json
from lcmlora.io.private import downloads

CONTENT = (
    b"lcmlora tries here whether this server honours conditional writes, checksums and encryption. "
    b"Nobody reads this object; without it the next publisher writes it again.\n"
)
_VALID = timedelta(days=7)
_NO_TAG = '"00000000000000000000000000000000"'
_ATTEMPTS = 5  # swaps, of which other publishers' probes may spoil some

_IGNORED = {
    "create": "If-None-Match (publishers can overwrite each other's files)",
    "swap": "If-Match (publishers can undo each other's move of a channel)",
    "checksum": "x-amz-checksum-sha256 (uploads that were damaged on the way are stored)",
    "encryption": "the encryption that publish.encryption asks for (objects are stored in clear)",
}


@dataclass(frozen=True)
class Outcome:
    """The end of one upload.

    kind: stored, refused because of its condition or checksum, or unknown (501: the server has no such feature).
    """

    kind: Literal["stored", "refused", "unknown"]
    answer: Mapping[str, Any]


# Writes CONTENT with these parameters of `put_object`.
Put = Callable[[dict[str, str]], Outcome]


def name_for(key: str) -> str:
    """Returns the key of the object for trying, of a publisher that is about to write `key`.

    It lies where that publisher may write, if rights are given by prefixes such as `MODEL/*`, `*/sha256-*` or
    `*/channels/*`. It is neither in a release nor named like one.
    """
    if match := re.fullmatch(r"(|.*/)sha256-[0-9a-f]{12}/[^/]*", key):
        return f"{match[1]}sha256-probe"
    folder, mark, _ = key.rpartition("/")
    return f"{folder}{mark}probe"


def find_lacking(put: Put, head: Callable[[], Mapping[str, Any]], encryption: str | None) -> frozenset[str]:
    """Tries a server and returns what it lacks: any of create, swap, checksum, encryption.

    Args:
        head: returns the object's facts.
        encryption: the server-side encryption that uploads ask for.
    """
    lacking = set()
    created = put({"IfNoneMatch": "*"})
    if created.kind == "stored":  # else it was there before, which a server that ignores the condition does not notice
        created = put({"IfNoneMatch": "*"})
    if created.kind != "refused":
        lacking.add("create")
        put({})
    if put({"IfMatch": _NO_TAG}).kind != "refused":
        lacking.add("swap")
    wrong = hashlib.sha256(CONTENT + b"\n").digest()
    if put({"ChecksumSHA256": base64.b64encode(wrong).decode()}).kind != "refused":
        lacking.add("checksum")
    for _ in range(_ATTEMPTS):
        last = put({} if "swap" in lacking else {"IfMatch": str(head().get("ETag", _NO_TAG))})
        if last.kind == "stored":
            break
    else:
        lacking.add("swap")
        last = put({})
    if encryption and (not is_encrypted(last.answer, encryption) or not is_encrypted(head(), encryption)):
        lacking.add("encryption")
    return frozenset(lacking)


def is_encrypted(answer: Mapping[str, Any], encryption: str, kms_key: str | None = None) -> bool:
    """Returns whether a server's answer names the encryption, and the key where its name can be compared."""
    if answer.get("ServerSideEncryption") != encryption:
        return False
    used = answer.get("SSEKMSKeyId")
    # AWS answers with the key's ARN. An alias is another name for it.
    return kms_key is None or "alias/" in kms_key or used is None or str(used).endswith(kms_key.rpartition("/")[2])


def refusal(lacking: Collection[str]) -> str:
    """Returns what a server ignores, and what to do, in one line."""
    ignored = ", ".join(text for name, text in _IGNORED.items() if name in lacking)
    conditions = [name for name in ("create", "swap", "checksum") if name in lacking]
    remedies = ["publish to a server that honours this"]
    if conditions:
        alone = "accept that, if never more than one publisher is at work"
        why = alone if {*conditions} - {"checksum"} else "have each upload read back instead"
        remedies.append(f"set publish.tolerate to [{', '.join(conditions)}] to {why}")
    if "encryption" in lacking:
        remedies.append("set publish.encryption to null if its disks are encrypted by other means")
    return f"the server ignores {ignored}; {', or '.join(remedies)}"


def recall(endpoint: str, bucket: str, settings: Publish) -> frozenset[str] | None:
    """Returns what the server lacked when it was last tried; None where that is unknown or too long ago."""
    try:
        kept = read_json(_file(endpoint, bucket, settings))
        age = datetime.now(UTC) - datetime.fromisoformat(kept["time"])
        return frozenset(kept["lacking"]) if timedelta() <= age < _VALID else None
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None  # there is none, or it is damaged


def remember(endpoint: str, bucket: str, settings: Publish, lacking: Collection[str]) -> None:
    """Keeps what `recall` returns. Where the cache cannot be written, each process asks the server itself."""
    facts = {"endpoint": endpoint, "bucket": bucket, "lacking": sorted(lacking), "time": datetime.now(UTC).isoformat()}
    with contextlib.suppress(UserError, OSError):
        file = _file(endpoint, bucket, settings)
        make_folder(file.parent)
        write_json(file, facts)


def _file(endpoint: str, bucket: str, settings: Publish) -> Path:
    asked = "\0".join((endpoint, bucket, settings.encryption or "", settings.kms_key or ""))
    return downloads("stores") / f"{hashlib.sha256(asked.encode()).hexdigest()[:20]}.json"
