"""What joins a release later: where a channel points, and that a release was yanked. Signed where there is a key.

A record is a JSON object of texts. Its signature, in the field `signature`, is of all its other fields, as `_canonical`
writes them: model, channel or release, and time. So no record stands for another model, channel, release or time.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.releases.trust import signing

POINTER, YANK = "pointer", "yank"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)")
_SKEW = timedelta(minutes=10)  # by which clocks may differ


@dataclass(frozen=True)
class Pointer:
    """Where a channel points."""

    model: str
    sha256: str
    channel: str | None  # None and None: written before pointers had them
    time: datetime | None
    signed: bool

    @property
    def prefix(self) -> str:
        return f"{self.model}/sha256-{self.sha256[:12]}"


def is_name(text: object) -> bool:
    """Returns whether it can be the name of a model or a channel: what names one folder or file and no other."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_digest(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def seal(kind: str, facts: dict[str, str], key: str | None) -> bytes:
    """Returns the content of a record, with its signature where there is a private key. Raises UserError as `sign`."""
    record: dict[str, Any] = dict(facts)
    if key is not None:
        record["signature"] = json.loads(signing.sign(_canonical(kind, facts), key, kind))
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()


def read(kind: str, content: bytes, place: str) -> dict[str, Any]:
    """Returns the fields of a record, the signature unchecked. Raises UserError where it is none."""
    wanted = ("model", "sha256") if kind == POINTER else ("reason", "who", "time")
    try:
        record = parse_json(content)
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in wanted):
        raise UserError(f"{place}: expected a JSON object with {', '.join(wanted)}, each a text")
    return record


def check(kind: str, record: dict[str, Any], settings: Publish, place: str, remedy: str) -> None:
    """Raises UserError where publish.verify_key is set and the record is not signed by it.

    Args:
        remedy: what to do about a record that is not signed, which older versions wrote.
    """
    if settings.verify_key is None:
        return
    if "signature" not in record:
        raise UserError(f"{place}: is not signed, and publish.verify_key asks for it; {remedy}")
    signing.check(*_signed(kind, record), settings.verify_key, place, kind)


def is_own(kind: str, record: dict[str, Any], key: str, place: str) -> bool:
    """Returns whether the record is signed by this private key. Raises UserError where the key cannot be used."""
    if "signature" not in record:
        return False
    content, signature = _signed(kind, record)
    signing.sign(b"", key, kind)  # tells of a key that cannot be used
    try:
        signing.check_own(content, signature, key, place, kind)
    except UserError:
        return False
    return True


def pointer(content: bytes, place: str) -> Pointer:
    """Returns what a channel's pointer says, its signature unchecked. Raises UserError where it is none."""
    record = read(POINTER, content, place)
    model, sha256, channel = record["model"], record["sha256"], record.get("channel")
    if not is_name(model) or not is_digest(sha256):
        shown = f"{terminal.shown(repr(model))} and {terminal.shown(repr(sha256))}"
        raise UserError(f"{place}: expected the model and sha256 of a release, got {shown}")
    if channel is not None and not is_name(channel):
        raise UserError(f"{place}: channel: expected a name, got {terminal.shown(repr(channel))}")
    when = record.get("time")
    return Pointer(model, sha256, channel, None if when is None else moment(when, place), "signature" in record)


def expect(found: Pointer, model: str, channel: str, place: str) -> None:
    """Raises UserError where a pointer that lies at MODEL/channels/CHANNEL.json is another's."""
    if found.model != model or found.channel not in (None, channel):
        whose = found.model + (f"@{found.channel}" if found.channel else "")
        raise UserError(f"{place}: is the pointer of {whose}, expected that of {model}@{channel}; do not use it")


def moment(text: object, place: str) -> datetime:
    """Returns the time that a record names. Raises UserError where that is none."""
    try:
        if isinstance(text, str) and _TIME.fullmatch(text):
            return datetime.fromisoformat(text)
    except ValueError:
        pass  # such as a thirteenth month, which the line below tells of
    raise UserError(f"{place}: time: expected one such as 2026-11-28T21:30:00Z, got {terminal.shown(repr(text))}")


def is_future(time: datetime) -> bool:
    """Returns whether the time is further ahead than clocks differ."""
    return time > datetime.now(UTC) + _SKEW


def _signed(kind: str, record: dict[str, Any]) -> tuple[bytes, bytes]:
    facts = {key: value for key, value in record.items() if key != "signature"}
    return _canonical(kind, facts), json.dumps(record["signature"]).encode()


def _canonical(kind: str, facts: dict[str, Any]) -> bytes:
    return json.dumps({"record": kind} | {"facts": facts}, sort_keys=True, separators=(",", ":")).encode()
