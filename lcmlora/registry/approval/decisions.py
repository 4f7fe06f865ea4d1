"""Asking for approval of a version, approving and rejecting it. Calls may be killed, repeated or concurrent.

A decision is an event in the version's history, with who and why. Approving writes it first and gives the alias after
it; if a call is killed in between, the same call or the next run completes it.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, NamedTuple

from lcmlora.config import Gate, Registry
from lcmlora.errors import UserError
from lcmlora.io.terminal import note
from lcmlora.registry import events, promotion
from lcmlora.registry.approval.standing import (
    APPROVED,
    AWAITING,
    DECLINED,
    REFUSED,
    REQUESTED,
    SUPERSEDED,
    TIMED_OUT,
    Standing,
    standing,
)
from lcmlora.registry.lookup import PASSED, Version, all_versions, resolve
from lcmlora.registry.tracking import connect, reaching

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Waiting(NamedTuple):
    """A version that waits for a person."""

    reference: str  # lcm-lora-emoji/3
    version: int
    since: Standing


def request(name: str, version: int, settings: Registry, *, reason: str) -> Standing | None:
    """Asks for approval of a version, which takes the place of all others of the model that wait. Idempotent.

    Returns:
        Where the version stands now; None if it waited already or was decided on.

    Raises:
        UserError: MLflow cannot be reached.
    """
    with reaching(settings, "the version is registered; run again to ask for its approval"):
        client = connect(settings)
        present = _standing(client, name, version, settings)
        asked = present is None or present.state == "superseded"
        if asked:
            _write(client, name, version, REQUESTED, reason, None)
        for other in _waiting(client, name, settings):
            if other.version != version:
                _write(client, name, other.version, SUPERSEDED, f"{name}/{version} waits in its place", None)
        return _standing(client, name, version, settings) if asked else None


def waiting(name: str, settings: Registry) -> list[Waiting]:
    """Returns the versions of a model that wait for approval, the oldest first.

    Raises:
        UserError: MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        return _waiting(connect(settings), name, settings)


def expire(name: str, settings: Registry, gate: Gate) -> list[str]:
    """Rejects the versions of a model that have waited for longer than `gate.approval_days`, and returns them.

    Raises:
        UserError: MLflow cannot be reached.
    """
    now = datetime.datetime.now(datetime.UTC)
    with reaching(settings, "ask again later"):
        client, expired = connect(settings), []
        for each in _waiting(client, name, settings):
            if each.since.deadline(gate.approval_days) <= now:
                reason = f"nobody decided within {gate.approval_days:g} days"
                _write(client, name, each.version, TIMED_OUT, reason, None)
                expired.append(each.reference)
        return expired


def approve(reference: str, settings: Registry, gate: Gate, *, reason: str | None, who: str | None = None) -> Version:
    """Makes a version champion that waits for approval, or that passed the gate before approval was asked for.

    It must still be no worse than the champion, which may be another one now.

    Args:
        reference: as for `lookup.resolve`.
        reason, who: for the history.

    Raises:
        UserError: it does not wait, has waited too long, was rejected, or is worse than the champion.
    """
    candidate = resolve(reference, settings)
    expire(candidate.name, settings, gate)
    with reaching(settings, "nothing was approved"):
        client = connect(settings)
        present = _standing(client, candidate.name, candidate.version, settings)
        if settings.alias in candidate.aliases:
            if present is not None and present.state != AWAITING:
                note(f"note: {candidate.reference} is {settings.alias} already ({present.text}); nothing was written")
            return candidate
        if present is not None and present.state in (*REFUSED, "superseded"):
            raise UserError(f"{candidate.reference}: {present.text}; {promotion.ADVICE.format(settings.alias)}")
        if present is None and candidate.gate != PASSED:
            raise UserError(f"{candidate.reference}: does not wait for approval: it did not pass the gate")
        promotion.check(candidate, settings, gate)
        if present is None or present.state == AWAITING:
            _write(client, candidate.name, candidate.version, APPROVED, reason, who)
            present = _standing(client, candidate.name, candidate.version, settings)
            if present is None or present.state != "approved":
                said = present.text if present else "its history was changed"
                raise UserError(f"{candidate.reference}: {said}, at the same time; nothing was promoted")
    promotion.promote_passed(candidate, settings, reason=f"approved: {reason}" if reason else "approved", who=who)
    return resolve(candidate.exact, settings)


def reject(reference: str, settings: Registry, *, reason: str, who: str | None = None) -> Version:
    """Rejects a version, so that no run makes it champion, and returns it. The champion is not rejected.

    Args:
        reference: as for `lookup.resolve`.
        reason, who: for the history.

    Raises:
        UserError: it is the champion, was approved, or MLflow cannot be reached.
    """
    candidate = resolve(reference, settings)
    with reaching(settings, "nothing was rejected"):
        client = connect(settings)
        present = _standing(client, candidate.name, candidate.version, settings)
        if settings.alias in candidate.aliases:
            raise UserError(f"{candidate.reference}: is {settings.alias}; `lcmlora registry rollback` takes it back")
        if present is None or present.state in (AWAITING, "superseded"):
            _write(client, candidate.name, candidate.version, DECLINED, reason, who)
            present = _standing(client, candidate.name, candidate.version, settings)
        if present is None or present.state not in REFUSED:
            said = present.text if present else "its history was changed"
            raise UserError(f"{candidate.reference}: {said}; `lcmlora registry rollback` takes a {settings.alias} back")
    return resolve(candidate.exact, settings)


def _waiting(client: MlflowClient, name: str, settings: Registry) -> list[Waiting]:
    found = []
    versions = all_versions(client, f"name = '{name}'")
    for version in versions:
        number = int(version.version)
        present = standing(events.read_events(number, version.tags), settings.alias)
        if present is not None and present.state == AWAITING:
            found.append(Waiting(f"{name}/{number}", number, present))
    return sorted(found, key=lambda each: each.version)


def _standing(client: MlflowClient, name: str, version: int, settings: Registry) -> Standing | None:
    tags = client.get_model_version(name, str(version)).tags
    return standing(events.read_events(version, tags), settings.alias)


def _write(client: MlflowClient, name: str, version: int, action: str, reason: str | None, who: str | None) -> None:
    events.write(client, name, version, action, reason=reason, who=who)
