"""Moving the champion's alias, and the published channel after it."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from lcmlora import config
from lcmlora.registry import promotion
from lcmlora.registry.lookup import Version
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
def move_channel(version: Version, settings: config.Config) -> str:
    """Points the channel at a published version and returns the pointer's address; idempotent."""
    assert version.release_uri is not None
    model = version.name.removeprefix("lcm-lora-")
    return publish.point_channel_of(
        model, version.sha256, version.release_uri, settings.publish, settings.registry.alias
    )
