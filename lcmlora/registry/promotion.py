"""Promoting a version to champion through the gate, rolling back, and the history of both.

The alias moves first and its event is written after it, so that the history has only what happened. If a call is killed
in between, the next one completes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lcmlora import masking
from lcmlora.config import Gate, Registry
from lcmlora.errors import NotFound, Unavailable, UserError
from lcmlora.evaluation import gate as gates
from lcmlora.registry import events
from lcmlora.registry.approval.standing import REFUSED, standing
from lcmlora.registry.downloads.pulling import figures
from lcmlora.registry.events import Event
from lcmlora.registry.listing.current import CHAMPION_RUN
from lcmlora.registry.lookup import PASSED, PREFIX, Version, all_versions, find_version, read_aliases, resolve
from lcmlora.registry.registration import Registered
from lcmlora.registry.retention import tombstones
from lcmlora.registry.servers import ledger
from lcmlora.registry.tracking import connect, reaching

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PREVIOUS = "previous"  # alias of the champion before the present one
ADVICE = "to make it {} anyway, use `lcmlora registry promote` with --override and --reason"

_EXACT = "models:/"  # before a registered model's exact name


def history(name: str, settings: Registry, *, may_be_missing: bool = False) -> list[Event]:
    """Returns the events of all versions of a model, the oldest first, and when others were pruned.

    Tags of other programs are left out.

    Args:
        may_be_missing: a model that is not registered has no events.

    Raises:
        UserError: there is no such model, or MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        client = connect(settings)
        found = _versions(client, name)
        if not found and not may_be_missing:
            ledger.refuse_renamed(client, name)
            raise NotFound(f"{name}: not registered at {masking.address(settings.tracking_uri)}")
        stones = tombstones.read(dict(client.get_registered_model(name).tags)) if found else []
    return sorted([*events.of_versions(found), *(stone.event for stone in stones)], key=lambda event: event.time)


def foreign_events(name: str, settings: Registry) -> list[str]:
    """Returns NAME/VERSION: TAG for each tag that is named like an event and that lcmlora did not write.

    Raises:
        UserError: MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        found = _versions(connect(settings), name)
    return [
        f"{name}/{version.version}: {tag}" for version in found for tag in events.own_and_foreign(0, version.tags)[1]
    ]


def promote_passed(version: Version | Registered, settings: Registry, *, reason: str, who: str | None = None) -> str:
    """Gives the configured alias to a version that has passed the gate already, and returns MODEL@ALIAS.

    The champion before it gets the alias `previous`. Idempotent.

    Raises:
        UserError: MLflow cannot be reached.
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
    """Makes a version champion if it passed the gate and is not worse than the present champion.

    Args:
        reference: as for `lookup.resolve`.
        reason, who: for the history.
        override: promote it against the gate, which the history records.

    Raises:
        UserError: the gate's reasons, or why the version cannot be compared with the champion.
    """
    candidate = resolve(reference, settings)
    if not override:
        check(candidate, settings, gate)
        _check_approval(candidate, settings, gate)
    _move(candidate.name, candidate.version, settings, "promoted", reason, who, override=override)
    return resolve(candidate.exact, settings)


def check(candidate: Version, settings: Registry, gate: Gate) -> None:
    """Raises UserError if a version did not pass the gate, or is worse than the present champion or incomparable."""
    refused = [] if candidate.gate == PASSED else [candidate.gate_reason or "did not pass the gate"]
    refused = refused or _worse(candidate, settings, gate)
    if refused:
        raise UserError(f"{candidate.reference}: {'; '.join(refused)}; {ADVICE.format(settings.alias)}")


def _check_approval(candidate: Version, settings: Registry, gate: Gate) -> None:
    """Raises UserError if a person has rejected a version, or has not approved it where the gate asks for that."""
    past = events.read_events(candidate.version, candidate.tags)
    present = standing(past, settings.alias)
    if present is not None and present.state in REFUSED:
        raise UserError(f"{candidate.reference}: {present.text}; {ADVICE.format(settings.alias)}")
    approved = present is not None and present.state == "approved"
    approved = approved or any(event.alias == settings.alias for event in past)  # it was champion before
    if gate.needs_approval(candidate.name.removeprefix(PREFIX)) and not approved:
        raise UserError(
            f"{candidate.reference}: needs approval (gate.approval); `lcmlora approve {candidate.reference}` gives it"
        )


def rollback(name: str, settings: Registry, *, reason: str, who: str | None = None, to: int | None = None) -> Version:
    """Makes the champion before the present one champion again, or the version `to`, and returns it.

    It is the version that has the alias `previous`, which a person may have moved in MLflow, else the last champion
    before the present one that still exists. A second call goes back by one more champion. The flow does not promote a
    version again that was rolled back.

    Raises:
        UserError: there is no version to go back to, or MLflow cannot be reached.
    """
    with reaching(settings, "nothing was rolled back"):
        client = connect(settings)
        history(name, settings)
        aliases, recorded = read_aliases(client, name), _recorded_champions(client, name, settings.alias)
        target = target_of_rollback(name, settings.alias, aliases, recorded) if to is None else to
        if target == aliases.get(settings.alias):
            raise UserError(f"{name}/{target}: is {settings.alias} already")
        found = find_version(client, f"{_EXACT}{name}/{target}", settings)  # raises where there is no such version
        present = standing(events.read_events(target, found.tags), settings.alias)
        if present is not None and present.state != "approved":
            raise UserError(f"{name}/{target}: {present.text}; roll back to a version that was {settings.alias} before")
    _move(name, target, settings, "rolled back", reason, who)
    return resolve(f"{_EXACT}{name}/{target}", settings)


def target_of_rollback(name: str, alias: str, aliases: Mapping[str, int], recorded: Sequence[int]) -> int:
    """Returns the version to go back to.

    Args:
        name: of the registered model, for messages.
        aliases: the version of each alias now.
        recorded: the champions that the history has and that still exist, the last one last.

    Raises:
        UserError: there is none, or a person must say which.
    """
    present, previous = aliases.get(alias), aliases.get(PREVIOUS)
    # Where the history leads to another version, a person has moved `previous`, or deleted the champion.
    as_recorded = previous in (None, present, *recorded[-2:-1])
    if previous is not None and (not as_recorded or present is None):
        return previous
    if present is None:
        if not recorded:
            raise UserError(f"{name}: no version has {alias}, so there is nothing to roll back")
        known = ", ".join(f"/{number}" for number in dict.fromkeys(recorded))
        raise UserError(
            f"{name}: no version has {alias} or {PREVIOUS}; name the version to go to with --to ({known} had {alias})"
        )
    champions = _with_present(recorded, present)
    if len(champions) < 2:
        raise UserError(f"{name}/{present}: is the first {alias}; name the version to go to with --to")
    return champions[-2]


def _worse(candidate: Version, settings: Registry, gate: Gate) -> list[str]:
    """Returns why the candidate is worse than the champion by their releases' figures; empty if it is not."""
    reference = f"{_EXACT}{candidate.name}@{settings.alias}"
    with reaching(settings, "nothing was promoted"):
        champion = read_aliases(connect(settings), candidate.name).get(settings.alias)
    if not gate.champion or champion in (None, candidate.version):
        return []
    candidate_figures = figures(candidate, settings)
    try:
        champion_figures = figures(resolve(reference, settings), settings)
    except Unavailable:
        raise
    except UserError as error:  # a champion that lcmlora did not register, or that has lost its run
        return [f"cannot be compared with {candidate.name}/{champion}, the {settings.alias}: {error}"]
    if reason := gates.incomparable(candidate_figures, champion_figures):
        return [f"cannot be compared with {candidate.name}/{champion}, the {settings.alias}: {reason}"]
    return gates.against(candidate_figures, champion_figures, gate, f"{candidate.name}/{champion}")


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
    """Moves the alias and `previous`, writes the event, and returns MODEL@ALIAS.

    Nothing is written if the version is champion already and the history says so.
    """
    alias = settings.alias
    with reaching(settings, "the version is registered; run again to promote it"):
        client = connect(settings)
        recorded, present = _recorded_champions(client, name, alias), read_aliases(client, name).get(alias)
        if recorded[-1:] != [version] or present != version:
            former = present if present != version else next((v for v in reversed(recorded) if v != version), None)
            found = find_version(client, f"{_EXACT}{name}/{version}", settings)  # raises where it was pruned
            client.set_registered_model_alias(name, alias, str(version))
            _take_back_from_pruned(client, name, version, settings, present)
            client.set_registered_model_tag(name, CHAMPION_RUN, found.run_id or "")
            events.write(
                client, name, version, action, reason=reason, who=who, alias=alias, former=former, override=override
            )
        _set_previous(client, name, alias)
    return f"{name}@{alias}"


def _take_back_from_pruned(
    client: MlflowClient, name: str, version: int, settings: Registry, former: int | None
) -> None:
    """Gives the alias back to the version that had it, if the new one is being pruned since just now.

    `lcmlora prune` looks for aliases after it has marked a version, and this for the mark after it has moved the alias.

    Raises:
        NotFound: the version is being pruned.
    """
    try:
        find_version(client, f"{_EXACT}{name}/{version}", settings)
    except NotFound:
        if former is None:
            client.delete_registered_model_alias(name, settings.alias)
        else:
            client.set_registered_model_alias(name, settings.alias, str(former))
        raise


def _set_previous(client: MlflowClient, name: str, alias: str) -> None:
    aliases = read_aliases(client, name)
    champions = _with_present(_recorded_champions(client, name, alias), aliases.get(alias))
    present = aliases.get(PREVIOUS)
    if len(champions) > 1 and present != champions[-2]:
        client.set_registered_model_alias(name, PREVIOUS, str(champions[-2]))
    elif len(champions) < 2 and present is not None:
        client.delete_registered_model_alias(name, PREVIOUS)


def _with_present(recorded: Sequence[int], present: int | None) -> list[int]:
    """Returns the champions in their order, with the present one last, even if it got its alias in MLflow's pages.

    If that is an earlier champion, it counts as rolled back to.
    """
    if present is None:
        return list(recorded)
    if present not in recorded:
        return [*recorded, present]
    last = max(place for place, number in enumerate(recorded) if number == present)  # promoted twice, perhaps
    return list(recorded[: last + 1])


def _recorded_champions(client: MlflowClient, name: str, alias: str) -> list[int]:
    """Returns the champions that the history has, in their order, without versions that do not exist any more."""
    found = _versions(client, name)
    existing = {int(version.version) for version in found if tombstones.MARK not in version.tags}
    champions: list[int] = []
    for number in events.champions(events.of_versions(found), alias):
        if number in existing and champions[-1:] != [number]:
            champions.append(number)
    return champions


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    return all_versions(client, f"name = '{name}'")
