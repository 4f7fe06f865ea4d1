"""What people preferred, as events in the history of registered versions."""

from __future__ import annotations

from lcmlora.config import Registry
from lcmlora.registry import events
from lcmlora.registry.lookup import Version
from lcmlora.registry.tracking import connect, reaching

COMPARED = "compared"  # the event's action


def record(version: Version, reason: str, settings: Registry, *, who: str | None) -> bool:
    """Adds an event to the version's history that says what a person preferred. Nothing is decided by it.

    Args:
        reason: with all figures, and what it was compared with.
        who: who chose; the user that this process runs as by default.

    Returns:
        False if the history has it of the same person already: nothing is written then.

    Raises:
        Unavailable: MLflow does not answer.
    """
    who = who or events.user()
    with reaching(settings, "the choices were not recorded; try again"):
        client = connect(settings)
        tags = dict(client.get_model_version(version.name, str(version.version)).tags)
        past = events.read_events(version.version, tags)
        if any((event.action, event.reason, event.who) == (COMPARED, reason, who) for event in past):
            return False
        events.write(client, version.name, version.version, COMPARED, reason=reason, who=who)
        return True
