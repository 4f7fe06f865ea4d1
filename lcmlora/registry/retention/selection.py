"""Which versions and runs may go: the rules alone, without asking a server."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from lcmlora.registry.lookup import Version
from lcmlora.registry.retention import tombstones
from lcmlora.releases.trust import records
from lcmlora.settings.services import Retention


@dataclass(frozen=True)
class Rules:
    """What is kept, beside what has a name.

    now: UTC.
    local: SHA-256 of adapters, as trained or released, that a project's folder holds and its next run will look up.
    awaiting: references (NAME/VERSION) that wait for a person's decision.
    """

    settings: Retention
    now: datetime
    local: frozenset[str] = frozenset()
    awaiting: frozenset[str] = frozenset()

    def is_young(self, time: str, days: float | None = None) -> bool:
        """Returns whether a time (ISO 8601) is less than `days` ago, those of the settings by default.

        A time that cannot be read counts as young.
        """
        try:
            moment = datetime.fromisoformat(time)
        except ValueError:
            return True
        if moment.tzinfo is None:
            return True
        return self.now - moment < timedelta(days=self.settings.days if days is None else days)


@dataclass(frozen=True)
class Choice:
    """A version, and why it is kept; None where it goes, for the reason in `why`."""

    version: Version
    kept: str | None
    why: str = ""


def choose(found: Sequence[Version], channels: Mapping[str, Sequence[str]], rules: Rules) -> list[Choice]:
    """Returns for each version of one model whether it is kept, and why.

    Args:
        found: all versions of the model, the newest first.
        channels: what points to a release, by the first 12 digits of the SHA-256 of its weights, in all stores.
    """
    newest = {version.version for version in sorted(found, key=lambda v: -v.version)[: rules.settings.versions]}
    choices = []
    for version in found:
        kept = _named(version, channels, rules) or _recent(version, newest, rules)
        why = f"older than {rules.settings.days:g} days, and not among the newest {rules.settings.versions}"
        choices.append(Choice(version, kept, "" if kept else why))
    return choices


def _named(version: Version, channels: Mapping[str, Sequence[str]], rules: Rules) -> str | None:
    """Returns what names the version, or will; None where nothing does."""
    if version.aliases:
        return "is " + ", ".join(f"@{alias}" for alias in version.aliases)
    if not version.run_id or not records.is_digest(version.sha256):
        return "was registered by other means"
    if pointing := channels.get(version.sha256[:12]):
        return f"{', '.join(pointing)} points to its release"
    if version.reference in rules.awaiting:
        return "waits for approval"
    if {version.sha256, version.trained} & rules.local:
        return "is the adapter in this folder"
    return None


def _recent(version: Version, newest: Collection[int], rules: Rules) -> str | None:
    if tombstones.MARK in version.tags:
        return None  # it was chosen before, and its deletion was interrupted
    if version.version in newest:
        return f"is among the newest {rules.settings.versions}"
    # Its age is that of the last decision about it: a version that was champion until yesterday may be looked for.
    past = [version.created, *([version.promoted] if version.promoted else [])]
    if any(rules.is_young(time) for time in past):
        return f"is younger than {rules.settings.days:g} days"
    return None
