"""Which version is champion: promoting through the gate, rolling back, and the history of both.

The alias moves first and the event is written after it, so that no history tells of what did not happen; a call that
was killed in between is completed by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lcmlora import masking
from lcmlora.config import Gate, Registry
from lcmlora.errors import Unavailable, UserError
from lcmlora.evaluation import gate as gates
from lcmlora.registry import events
from lcmlora.registry.events import Event
from lcmlora.registry.lookup import PASSED, Version, figures, find, read_aliases, resolve, search
from lcmlora.registry.registration import Registered
from lcmlora.registry.tracking import connect, reaching

PREVIOUS = "previous"  # the alias of the champion before the present one


def history(name: str, settings: Registry) -> list[Event]:
    """Returns what happened to the versions of a model, the oldest event first; nothing of what others wrote there.

    Raises:
        UserError: there is no such model, or MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        found = _versions(connect(settings), name)
    if not found:
        raise UserError(f"{name}: not registered at {masking.address(settings.tracking_uri)}")
    return _events(found)


def foreign_events(name: str, settings: Registry) -> list[str]:
    """Returns NAME/VERSION: TAG for each tag that is named like an event but was not written by lcmlora: it is
    passed over.

    Raises:
        UserError: MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        found = _versions(connect(settings), name)
    return [f"{name}/{version.version}: {tag}" for version in found for tag in events.foreign(version.tags)]


def assign(version: Version | Registered, settings: Registry, *, reason: str, who: str | None = None) -> str:
    """Gives the configured alias to a version that has been put through the gate, and returns its reference.

    The champion before it becomes `previous`. Idempotent.
    """
    return _move(version.name, version.version, settings, "promoted", reason, who)


def promote(
    reference: str,
    settings: Registry,
    gate: Gate,
    *,
    reason: str,
    who: str | None = None,
    override: bool = False,
) -> Version:
    """Makes a version champion if it passed the gate and, by the registry's figures, is not worse than the champion.

    Args:
        override: go against the gate; the history says so.

    Raises:
        UserError: the gate's reasons, or that the two cannot be compared.
    """
    candidate = resolve(reference, settings)
    if not override:
        refused = [] if candidate.gate == PASSED else [candidate.gate_reason or "did not pass the gate"]
        refused = refused or _worse(candidate, settings, gate)
        if refused:
            advice = f"to make it {settings.alias} all the same: --override --reason"
            raise UserError(f"{candidate.reference}: {'; '.join(refused)}; {advice}")
    _move(candidate.name, candidate.version, settings, "promoted", reason, who, override=override)
    return resolve(candidate.reference, settings)


def rollback(name: str, settings: Registry, *, reason: str, who: str | None = None, to: int | None = None) -> Version:
    """Makes the champion before the present one champion again, or the version `to`, and returns it.

    Called again, it goes further back. The flow does not promote again what was rolled back.

    Raises:
        UserError: there is none to go back to, or MLflow cannot be reached.
    """
    with reaching(settings, "nothing was rolled back"):
        client = connect(settings)
        history(name, settings)
        line = _champions(client, name, settings.alias)
        if not line:
            raise UserError(f"{name}: no version has {settings.alias}, so there is nothing to roll back")
        if to is None and len(line) < 2:
            raise UserError(f"{name}/{line[-1]}: is the first {settings.alias}; name the version to go to with --to")
        target = line[-2] if to is None else to
        if target == line[-1]:
            raise UserError(f"{name}/{target}: is {settings.alias} already")
        find(client, f"{name}/{target}", settings)
    _move(name, target, settings, "rolled back", reason, who)
    return resolve(f"{name}/{target}", settings)


def _worse(candidate: Version, settings: Registry, gate: Gate) -> list[str]:
    """Returns in what the candidate is worse than the champion by the figures of their releases."""
    reference = f"{candidate.name}@{settings.alias}"
    with reaching(settings, "nothing was promoted"):
        champion = read_aliases(connect(settings), candidate.name).get(settings.alias)
    if not gate.champion or champion in (None, candidate.version):
        return []
    mine = figures(candidate, settings)
    try:
        theirs = figures(resolve(reference, settings), settings)
    except Unavailable:
        raise
    except UserError as error:  # a champion that others made, or that has lost its run
        return [f"cannot be compared with {candidate.name}/{champion}, the {settings.alias}: {error}"]
    if other := gates.incomparable(mine, theirs):
        return [f"cannot be compared with {candidate.name}/{champion}, the {settings.alias}: {other}"]
    return gates.against(mine, theirs, gate, f"{candidate.name}/{champion}")


def _move(
    name: str,
    version: int,
    settings: Registry,
    action: str,
    reason: str,
    who: str | None,
    *,
    override: bool = False,
) -> str:
    """Moves the alias and `previous`, writes the event, and returns the version's reference by its alias.

    Nothing is written where all is so already.
    """
    alias = settings.alias
    with reaching(settings, "the version is registered; run again to promote it"):
        client = connect(settings)
        line, present = _line(client, name, alias), read_aliases(client, name).get(alias)
        if line[-1:] != [version] or present != version:
            former = present if present != version else next((v for v in reversed(line) if v != version), None)
            client.set_registered_model_alias(name, alias, str(version))
            key, event = events.tag(action, reason=reason, who=who, alias=alias, former=former, override=override)
            client.set_model_version_tag(name, str(version), key, event)
        _set_previous(client, name, alias)
    return f"{name}@{alias}"


def _set_previous(client: Any, name: str, alias: str) -> None:
    line, present = _champions(client, name, alias), read_aliases(client, name).get(PREVIOUS)
    if len(line) > 1 and present != line[-2]:
        client.set_registered_model_alias(name, PREVIOUS, str(line[-2]))
    elif len(line) < 2 and present is not None:
        client.delete_registered_model_alias(name, PREVIOUS)


def _champions(client: Any, name: str, alias: str) -> list[int]:
    """Returns the line of champions by the history; one that was made so elsewhere, in MLflow's pages, ends it."""
    line, present = _line(client, name, alias), read_aliases(client, name).get(alias)
    return line if present is None or line[-1:] == [present] else [*line, present]


def _line(client: Any, name: str, alias: str) -> list[int]:
    """Returns the line of champions by the history, of versions that are there: they can be deleted, or never were."""
    found = _versions(client, name)
    there = {int(version.version) for version in found}
    line: list[int] = []
    for number in events.champions(_events(found), alias):
        if number in there and line[-1:] != [number]:
            line.append(number)
    return line


def _versions(client: Any, name: str) -> list[Any]:
    return search(client.search_model_versions, f"name = '{name}'")


def _events(found: Sequence[Any]) -> list[Event]:
    every = [event for version in found for event in events.read(int(version.version), version.tags)]
    return sorted(every, key=lambda event: event.time)
