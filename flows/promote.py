"""Flows by which a person decides from Prefect's pages: promotion, rollback, approval and rejection.

`lcmlora registry promote` and `rollback`, `lcmlora approve` and `reject` do the same from a terminal.
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds
    from lcmlora.cli.registry import approve, promote, reject, rollback
    from lcmlora.flows.verbs import standalone

    standalone("flows.promote", promote, rollback, approve, reject)

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, Failed
from pydantic import Field

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows import name_of, notify, outcomes
from lcmlora.flows.notices import rounds
from lcmlora.registry import promotion
from lcmlora.registry.lookup import PREFIX, Version
from lcmlora.tasks.champions import approve_reference, move_channel, promote_reference, reject_reference, roll_back
from lcmlora.tasks.outages.own_state import outlasting
from lcmlora.tasks.output import slug
from lcmlora.tasks.retrying import networked

# Prefect's pages describe parameters by the docstrings of flows.
Text = Annotated[str, Field(min_length=1)]


@flow(name="promote")
def promote_version(
    reference: str,
    reason: Text,
    override: bool = False,
    who: str | None = None,
    params: str = "params.yaml",
) -> State:
    """Makes a version champion and moves the published channel. Ends as Promoted, or Failed with the gate's reasons.

    Args:
        reference: a version: emoji/3, emoji@ALIAS, or 12 digits of a SHA-256.
        reason: why, for the history.
        override: promote it against the gate. The history records this.
        who: who decided; the worker's user by default.
        params: the file with the settings.
    """

    def promote(settings: config.Config) -> State:
        version = networked(promote_reference, settings)(reference, settings, reason, who, override)
        return _completed("Promoted", version, settings)

    return _decided(promote, params)


@flow(name="rollback")
def roll_back_champion(
    model: str,
    reason: Text,
    to: int | None = None,
    who: str | None = None,
    params: str = "params.yaml",
) -> State:
    """Makes the champion before the present one champion again and moves the published channel. Ends as RolledBack.

    The `retrain` flow does not promote a version again that was rolled back.

    Args:
        model: a name under `models` in params.yaml, or lcm-lora-MODEL.
        reason: why, for the history.
        to: the version to go back to; the last champion by default.
        who: who decided; the worker's user by default.
        params: the file with the settings.
    """

    def go_back(settings: config.Config) -> State:
        # Not retried: a second call would go back by one more champion.
        version = roll_back(name_of(model), settings, reason, who, to)
        return _completed("RolledBack", version, settings)

    return _decided(go_back, params)


@flow(name="approve")
def approve_version(
    reference: str,
    reason: Text,
    who: Text,
    params: str = "params.yaml",
) -> State:
    """Makes a version champion that waits for approval, and moves the published channel. Ends as Promoted.

    Args:
        reference: the version that waits: emoji/3, or 12 digits of a SHA-256.
        reason: why, for the history.
        who: who decided, for the history.
        params: the file with the settings.
    """

    def approve(settings: config.Config) -> State:
        version = networked(approve_reference, settings)(reference, settings, reason, who)
        return _completed("Promoted", version, settings)

    return _decided(approve, params)


@flow(name="reject")
def reject_version(
    reference: str,
    reason: Text,
    who: Text,
    params: str = "params.yaml",
) -> State:
    """Rejects a version that waits for approval: no run makes it champion. Ends as Rejected.

    Args:
        reference: the version that waits: emoji/3, or 12 digits of a SHA-256.
        reason: why, for the history.
        who: who decided, for the history.
        params: the file with the settings.
    """

    def reject(settings: config.Config) -> State:
        version = networked(reject_reference, settings)(reference, settings, reason, who)
        _leave_history(version, settings)
        _tell(version, settings)
        return Completed(name="Rejected", message=f"{version.reference}: rejected by {who}: {reason}")

    return _decided(reject, params)


def _decided(decide: Callable[[config.Config], State], params: str) -> State:
    """Returns the end of a decision, which waits for a Prefect server that is away. Failed with the reason of an
    error."""
    try:
        settings = config.load(Path(params))
        with outlasting(settings.flow.patience):
            return decide(settings)
    except UserError as error:
        return Failed(message=str(error))


def _completed(end: str, version: Version, settings: config.Config) -> State:
    """Moves the channel, leaves the model's history as an artifact, and returns the flow's end."""
    channels = networked(move_channel, settings)(version, settings) if version.uris else []
    _leave_history(version, settings)
    _tell(version, settings)
    follow = f", {', '.join(channels)} follow{'s' if len(channels) == 1 else ''}"
    moved = follow if channels else ", which was never published, so no channel was moved"
    return Completed(name=end, message=f"{version.name}@{settings.registry.alias} is {version.reference}{moved}")


def _leave_history(version: Version, settings: config.Config) -> None:
    history = promotion.history(version.name, settings.registry)
    lines = [(e.time[:19] + "Z", f"/{e.version}", e.action, e.alias or "", e.who, e.reason or "") for e in history]
    table = outcomes.markdown(("time", "version", "what", "alias", "who", "why"), lines)
    key = f"history-{slug(version.name)}"
    create_markdown_artifact(table, key=key, description=f"What happened to {version.name}")


def _tell(version: Version, settings: config.Config) -> None:
    """Tells the targets of `notify`; what cannot be told now the `watch` flow tells."""
    try:
        rounds.tell_history(version.name.removeprefix(PREFIX), settings)
    except UserError as error:
        notify.warn(f"notify: {error}; `watch` tells it")
