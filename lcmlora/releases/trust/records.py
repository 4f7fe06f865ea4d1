"""Records that join a release after it is published: a channel's pointer, and a yank. Signed where there is a key.

A record is a JSON object of texts. Its field `signature` signs all its other fields (see `_canonical`): model, channel
or release, and time. So no record can be used for another model, channel, release or time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.io.parsing import JsonObject, Malformed, parse_json
from lcmlora.releases.trust import signing

POINTER, YANK = "pointer", "yank"

_REQUIRED = {POINTER: ("model", "sha256"), YANK: ("reason", "who", "time")}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)")
_SKEW = timedelta(minutes=10)  # by which clocks may differ


@dataclass(frozen=True)
class Record:
    """A pointer or a yank as it was read from a store. Neither its signature nor its optional fields are checked."""

    kind: str  # POINTER or YANK
    fields: JsonObject  # without the signature
    signature: bytes | None  # JSON; None: the record is not signed

    def text(self, name: str) -> str:
        """Returns a required field."""
        return str(self.fields[name])


@dataclass(frozen=True)
class Pointer:
    """The release that a channel points to."""

    model: str
    sha256: str
    channel: str | None  # None, like the time: written before pointers had these fields
    time: datetime | None
    signed: bool

    @property
    def prefix(self) -> str:
        """The name of the release's folder in its store."""
        return f"{self.model}/sha256-{self.sha256[:12]}"


@dataclass(frozen=True)
class Yank:
    """Why a release must not be used any more, who said so, and when."""

    reason: str
    who: str
    time: str  # ISO 8601
    unproven: str | None = None  # what is wrong with the record's signature, if anything


def is_name(text: object) -> bool:
    """Returns whether a text can be the name of a model or a channel. Such a name stands for one folder or file."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_digest(text: object) -> bool:
    """Returns whether a text is a SHA-256 in hexadecimal digits."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def serialize_record(kind: str, fields: Mapping[str, str], key: str | None) -> bytes:
    """Returns the record as JSON, signed where `key` is a private key. Raises UserError as `signing.sign` does."""
    record: JsonObject = dict(fields)
    if key is not None:
        record["signature"] = json.loads(signing.sign(_canonical(kind, fields), key, kind))
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()


def read_record(kind: str, content: bytes, place: str) -> Record:
    """Returns a record, its signature unchecked. Raises UserError where a required field is missing or no text."""
    required = _REQUIRED[kind]
    try:
        fields = parse_json(content)
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in required):
        raise UserError(f"{place}: expected a JSON object with {', '.join(required)}, each a text")
    signature = json.dumps(fields.pop("signature")).encode() if "signature" in fields else None
    return Record(kind, fields, signature)


def check_signature(record: Record, settings: Publish, place: str, remedy: str) -> None:
    """Raises UserError where publish.verify_key is set and the record is not signed by it.

    Args:
        remedy: what to do about a record without a signature, which older versions of lcmlora wrote.
    """
    if settings.verify_key is None:
        return
    if record.signature is None:
        raise UserError(f"{place}: is not signed, and publish.verify_key asks for it; {remedy}")
    signing.check(_canonical(record.kind, record.fields), record.signature, settings.verify_key, place, record.kind)


def is_signed_by(record: Record, key: str, place: str) -> bool:
    """Returns whether the record is signed by this private key. Raises UserError where the key cannot be used."""
    if record.signature is None:
        return False
    signing.sign(b"", key, record.kind)  # raises where the key cannot be used
    try:
        signing.check_own(_canonical(record.kind, record.fields), record.signature, key, place, record.kind)
    except UserError:
        return False
    return True


def pointer_of(record: Record, place: str) -> Pointer:
    """Returns what a channel's pointer says. Raises UserError where a field does not fit."""
    model, sha256, channel = record.text("model"), record.text("sha256"), record.fields.get("channel")
    if not is_name(model) or not is_digest(sha256):
        shown = f"{terminal.shown(repr(model))} and {terminal.shown(repr(sha256))}"
        raise UserError(f"{place}: expected the model and sha256 of a release, got {shown}")
    if channel is not None and not is_name(channel):
        raise UserError(f"{place}: channel: expected a name, got {terminal.shown(repr(channel))}")
    time = record.fields.get("time")
    return Pointer(
        model, sha256, channel, None if time is None else parse_time(time, place), record.signature is not None
    )


def check_channel(pointer: Pointer, model: str, channel: str, place: str) -> None:
    """Raises UserError where the pointer at MODEL/channels/CHANNEL.json was written for another model or channel."""
    if pointer.model != model or pointer.channel not in (None, channel):
        written_for = pointer.model + (f"@{pointer.channel}" if pointer.channel else "")
        raise UserError(f"{place}: is the pointer of {written_for}, expected that of {model}@{channel}; do not use it")


def parse_time(text: object, place: str) -> datetime:
    """Returns the time that a record names. Raises UserError where the text is no such time."""
    try:
        if isinstance(text, str) and _TIME.fullmatch(text):
            return datetime.fromisoformat(text)
    except ValueError:
        pass  # such as a thirteenth month: refused below
    raise UserError(f"{place}: time: expected one such as 2026-11-28T21:30:00Z, got {terminal.shown(repr(text))}")


def is_future(time: datetime) -> bool:
    """Returns whether the time is further ahead than clocks differ."""
    return time > datetime.now(UTC) + _SKEW


def _canonical(kind: str, fields: Mapping[str, object]) -> bytes:
    """Returns the bytes that a signature signs."""
    return json.dumps({"record": kind} | {"facts": fields}, sort_keys=True, separators=(",", ":")).encode()
