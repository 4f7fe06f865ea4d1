"""The message about an event: one JSON document for webhooks, and a subject and a text for people."""

from __future__ import annotations

import datetime
import json
import platform
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmlora import masking
from lcmlora.flows import memory
from lcmlora.flows.memory import LARGEST
from lcmlora.flows.notices.event import Event
from lcmlora.io.terminal import shown

SCHEMA = 1  # of the document; docs/notifications.md describes it

_MESSAGES = uuid.UUID("6d2b1a0e-7c55-5f0e-9d0c-5b1d5f2f8a11")  # the namespace of the ids of messages
_REASON, _LINK, _TEXT = 1_500, 300, 100  # bytes of a reason, of an address, of a title or a figure
_ENTRIES = 12  # figures, and as many links

_SUBJECTS = {
    "failed": "failed",
    "rejected": "was rejected",
    "promoted": "has a new champion",
    "approval_needed": "waits for your approval",
    "stuck": "a run is stuck",
    "disk": "the disk is nearly full",
    "budget": "is over its budget",
    "test": "tests its notifications",
}


@dataclass(frozen=True)
class Message:
    """A message, with all secrets masked. Its document is JSON and has everything but the pictures."""

    document: dict[str, Any]

    @classmethod
    def of(cls, event: Event, times: int = 1, since: str | None = None) -> Message:
        """Returns the message about an event that happens now.

        Args:
            times: how often it has happened since it was told first.
            since: when it happened first, ISO 8601.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        figures = [
            (_clean(k, _TEXT), v if isinstance(v, float) else _clean(v, _TEXT)) for k, v in event.figures.items()
        ]
        links = [(_clean(title, _TEXT), _clean(link, _LINK)) for title, link in event.links.items()]
        made = cls(
            {
                "schema": SCHEMA,
                "id": str(uuid.uuid5(_MESSAGES, event.occurrence) if event.occurrence else uuid.uuid4()),
                "time": now,
                "kind": event.kind,
                "project": _clean(memory.project(), _TEXT),
                "host": _clean(platform.node(), _TEXT),
                "model": event.model,
                "version": event.version,
                "reason": _clean(event.reason, _REASON),
                "figures": dict(figures[:_ENTRIES]),
                "links": dict(links[:_ENTRIES]),
                "run": event.run,
                "times": times,
                "since": (since or event.happened or now).replace("+00:00", "Z"),
                "pictures": [str(path) for path in event.pictures],
            }
        )
        return made._fitting()

    def _fitting(self) -> Message:
        """Returns the message without its last figures and links, as far as it is too large to be kept."""
        document = self.document
        while len(json.dumps(document, ensure_ascii=False).encode()) > LARGEST:
            longest = max(("figures", "links", "pictures"), key=lambda name: len(document[name]))
            if document[longest]:
                kept = list(document[longest].items() if longest != "pictures" else document[longest])[:-1]
                document = document | {longest: dict(kept) if longest != "pictures" else kept}
            else:
                document = document | {"reason": _clean(document["reason"], len(document["reason"].encode()) // 2)}
        return Message(document)

    @classmethod
    def test(cls) -> Message:
        """Returns a message that nothing has happened, of the kind `test`."""
        made = cls.of(Event("failed", "This is a test by `lcmlora notify`. Nothing has happened."))
        return cls(made.document | {"kind": "test"})

    @property
    def id(self) -> str:
        """The message's id: a receiver that gets it twice knows it by this."""
        return str(self.document["id"])

    @property
    def content(self) -> bytes:
        """The document as a webhook gets it. Pictures are files of this machine, so that it has none."""
        document = {key: value for key, value in self.document.items() if key != "pictures"}
        return json.dumps(document, ensure_ascii=False).encode()

    @property
    def pictures(self) -> list[Path]:
        """The pictures that are still there, for receivers that take files."""
        return [path for path in map(Path, self.document["pictures"]) if path.is_file()]

    @property
    def subject(self) -> str:
        """One line."""
        document = self.document
        about = document["model"] or document["project"]
        return f"lcmlora: {about} {_SUBJECTS[document['kind']]}"

    @property
    def text(self) -> str:
        """The reason, the figures and the links, in lines."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        document = self.document
        yield document["reason"]
        if document["version"]:
            yield f"version: {document['version']}"
        for name, value in document["figures"].items():
            yield f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
        for title, link in document["links"].items():
            yield f"{title}: {link}"
        if document["times"] > 1:
            yield f"It has happened {document['times']} times since {document['since']}."
        yield f"{document['project']} on {document['host']}, {document['time']}"


def _clean(text: object, limit: int) -> str:
    """Returns the text without secrets and control characters, and without its middle if it has too many bytes."""
    lines = (shown(line.rstrip(), limit) for line in masking.text(text).splitlines())
    whole = "\n".join(lines)
    if len(whole.encode()) <= limit:
        return whole
    half = (limit - len(" ... ")) // 2
    start, end = whole.encode()[:half], whole.encode()[-half:]
    return f"{start.decode(errors='ignore')} ... {end.decode(errors='ignore')}"
