"""Reading the state of a run's inputs, by which the `watch` flow notices changes."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from lcmlora import config
from lcmlora.bases import fetching
from lcmlora.data import fingerprints


@task(task_run_name="look at the data set {data.path}", cache_policy=NO_CACHE)
def read_data_state(data: config.Data) -> str:
    """Returns a digest that changes with the pictures or captions."""
    return fingerprints.fingerprint(data.path, data.links)


@task(task_run_name="look at the base of {model}", cache_policy=NO_CACHE)
def read_base_state(model: str, settings: config.Config) -> str:
    """Returns a local base's digest, or the commit of the hub's repository."""
    return fetching.base_state(model, settings.base(model))
