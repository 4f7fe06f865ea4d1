"""Moving the champion's alias, and the published channel after it; asking a person for approval."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from lcmlora import config
from lcmlora.registry import promotion
from lcmlora.registry.approval import decisions
from lcmlora.registry.approval.standing import Standing
from lcmlora.registry.lookup import PREFIX, Version, registered_name
from lcmlora.registry.registration import Registered
from lcmlora.releases import publish


@task(task_run_name="promote {reference}", cache_policy=NO_CACHE)
def promote_reference(reference: str, settings: config.Config, reason: str, who: str | None, override: bool) -> Version:
    """Makes the version champion and returns it; idempotent."""
    return promotion.promote(reference, settings.registry, settings.gate, reason=reason, who=who, override=override)


@task(task_run_name="roll back {name}", cache_policy=NO_CACHE)
def roll_back(name: str, settings: config.Config, reason: str, who: str | None, to: int | None) -> Version:
    """Makes the former champion, or the version `to`, champion again and returns it."""
    return promotion.rollback(name, settings.registry, reason=reason, who=who, to=to)


@task(task_run_name="channel {version.name}", cache_policy=NO_CACHE)
def move_channel(version: Version, settings: config.Config) -> list[str]:
    """Points the channel at a published version in each of its stores and returns the pointers' addresses; idempotent.

    Raises:
        UserError: as of `point_channels_of`.
    """
    model = version.name.removeprefix(PREFIX)
    return publish.point_channels_of(model, version.sha256, version.uris, settings.publish, settings.registry.alias)


@task(task_run_name="ask for approval of {model}", cache_policy=NO_CACHE)
def request_approval(model: str, version: Registered, settings: config.Config) -> Standing | None:
    """Lets the version wait for approval, in place of all others of the model; None if it waits already; idempotent."""
    return decisions.request(version.name, version.version, settings.registry, reason="passed the gate")


@task(task_run_name="approvals of {model}", cache_policy=NO_CACHE)
def expire_approvals(model: str, settings: config.Config) -> list[str]:
    """Rejects the model's versions that have waited for too long and returns them; idempotent."""
    return decisions.expire(registered_name(model), settings.registry, settings.gate)


@task(task_run_name="approve {reference}", cache_policy=NO_CACHE)
def approve_reference(reference: str, settings: config.Config, reason: str, who: str | None) -> Version:
    """Makes a version champion that waits for approval and returns it; idempotent."""
    return decisions.approve(reference, settings.registry, settings.gate, reason=reason, who=who)


@task(task_run_name="reject {reference}", cache_policy=NO_CACHE)
def reject_reference(reference: str, settings: config.Config, reason: str, who: str | None) -> Version:
    """Rejects a version, so that no run makes it champion, and returns it; idempotent."""
    return decisions.reject(reference, settings.registry, reason=reason, who=who)
