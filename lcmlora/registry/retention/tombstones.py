"""Tombstones: what is left of a version that was pruned, as the tag `pruned.NUMBER` of its registered model.

The version itself and its run first get the tag `pruned`. From then on no lookup finds them and no alias is given to
the version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.registry.events import Event

if TYPE_CHECKING:
    from mlflow import MlflowClient

MARK = "pruned"  # tag of a version, and of a run, that is being deleted; its value is the time
_TAG = re.compile(r"pruned\.([1-9][0-9]{0,8})")
_TEXTS = ("time", "who", "reason", "sha256", "adapter", "run_id")


@dataclass(frozen=True)
class Tombstone:
    """What is known of a pruned version."""

    version: int
    time: str  # ISO 8601, UTC
    who: str
    reason: str
    sha256: str = ""  # of the weights as they were released
    adapter: str = ""  # and as they were trained
    promoted: bool = False  # whether it had the configured alias at some time
    run_id: str = ""
    releases: tuple[str, ...] = ()  # addresses
    finished: bool = False  # run, artifacts and releases are gone, too

    @property
    def event(self) -> Event:
        """The pruning as an entry of the history."""
        return Event(self.time, "pruned", self.version, self.who, self.reason)

    def line(self, name: str) -> str:
        """Returns what a lookup of the version says."""
        kept = "the history and its SHA-256 are kept" if self.sha256 else "its history is kept"
        return (
            f"{name}/{self.version}: was pruned on {self.time[:10]} by {self.who} ({self.reason}); {kept}, its files "
            "are gone"
        )


def read(tags: Mapping[str, str]) -> list[Tombstone]:
    """Returns the tombstones among the tags of a registered model, the oldest version first."""
    found = [_parse(int(match[1]), tags[key]) for key in tags if (match := _TAG.fullmatch(key))]
    return sorted((stone for stone in found if stone is not None), key=lambda stone: stone.version)


def _parse(version: int, text: object) -> Tombstone | None:
    """Returns None where `write` did not write the tag: anybody can set any tag in MLflow."""
    try:
        fields = parse_json(text) if isinstance(text, str) else None
    except Malformed:
        return None
    if not isinstance(fields, dict) or not {"time", "who", "reason"} <= fields.keys():
        return None
    texts = {key: fields[key] for key in _TEXTS if isinstance(fields.get(key), str)}
    if not {"time", "who", "reason"} <= texts.keys():
        return None
    releases = fields.get("releases", [])
    if not isinstance(releases, list) or not all(isinstance(uri, str) for uri in releases):
        return None
    promoted, finished = fields.get("promoted") is True, fields.get("finished") is True
    return Tombstone(version, **texts, promoted=promoted, releases=tuple(releases), finished=finished)


def write(client: MlflowClient, name: str, stone: Tombstone) -> None:
    """Writes a tombstone, over an older one of the same version."""
    if stone.finished:
        stone = replace(stone, run_id="", releases=())
    fields = {key: value for key, value in asdict(stone).items() if value and key != "version"}
    client.set_registered_model_tag(name, f"{MARK}.{stone.version}", json.dumps(fields, sort_keys=True))


def remove(client: MlflowClient, name: str, version: int) -> None:
    """Removes the tombstone of a version that is not deleted after all."""
    client.delete_registered_model_tag(name, f"{MARK}.{version}")


def with_digits(stones: list[Tombstone], digits: str) -> Tombstone | None:
    """Returns the newest of these whose adapter, as released or as trained, has a SHA-256 with these first digits."""
    found = (s for s in reversed(stones) if any(each.startswith(digits) for each in (s.sha256, s.adapter) if each))
    return next(found, None)
