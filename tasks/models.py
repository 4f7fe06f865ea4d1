"""The tasks of one model outside DVC: base, gate, version in the registry, published release."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from lcmlora import config, registry
from lcmlora.adapters.metadata import FACTS, WEIGHTS, Distilled
from lcmlora.errors import Unavailable, UserError
from lcmlora.evaluation import gate
from lcmlora.evaluation.comparisons import compatibility
from lcmlora.evaluation.figures import Metrics
from lcmlora.project import Project
from lcmlora.registry import promotion, registration
from lcmlora.registry.costs.spent import Spent, record
from lcmlora.releases import bundle, publish
from lcmlora.releases.bundle import Provenance
from lcmlora.releases.stores.store import open_store
from lcmlora.tasks import costs
from lcmlora.tasks.devices import holding_device
from lcmlora.tasks.dvc import StageFailed
from lcmlora.tasks.processes import Processes, python, reason, stream

_PROJECT = Project()  # flows run in the project's folder


@dataclass(frozen=True)
class Champion:
    """The version that a candidate is compared with, and its figures against the candidate's own reference."""

    reference: str
    figures: Metrics | None
    fault: str | None = None  # why there are no figures, such as a run that was deleted


@task(task_run_name="fetch base {model}", cache_policy=NO_CACHE)
def fetch_base(model: str, settings: config.Config) -> Path:
    """Puts the base at bases/MODEL and returns the folder."""
    from lcmlora.bases import fetching

    return fetching.fetch(model, settings.base(model), _PROJECT.bases)


@task(task_run_name="figures {model}", cache_policy=NO_CACHE)
def read_metrics(model: str) -> Metrics:
    """Returns the figures of the last evaluation."""
    return Metrics.read(_PROJECT.metrics(model))


@task(task_run_name="champion {model}", cache_policy=NO_CACHE)
def read_champion(model: str, figures: Metrics, settings: config.Config, processes: Processes) -> Champion | None:
    """Returns the champion to compare with. None if there is none, or if it is this adapter, or of another base.

    If data, prompts or features have changed since it was measured, it is measured again.
    """
    champion = registry.champion(model, settings.registry)
    if champion is None or champion.trained == Provenance.read(_PROJECT.release(model) / bundle.PROVENANCE).trained:
        return None
    try:
        champion_figures = registry.figures(champion, settings.registry)
    except Unavailable:
        raise
    except UserError as error:
        return Champion(champion.reference, None, str(error))
    if gate.incomparable(figures, champion_figures):
        from lcmlora.bases import folders

        made_for = Distilled.read(_PROJECT.adapter(model) / FACTS).base
        if not folders.same_base(champion.base, made_for):
            return None
        champion_figures = _remeasure(model, champion.reference, settings, processes)
    return Champion(champion.reference, champion_figures)


def _remeasure(model: str, reference: str, settings: config.Config, processes: Processes) -> Metrics:
    out = _PROJECT.scratch("champion", f"{model}.json")
    arguments = ("remeasure", model, "--adapter", f"models:/{reference}", "--out", str(out))
    with holding_device(settings.flow.limit, processes, patience=settings.flow.patience):
        status, lines = stream(processes, python("lcmlora", *arguments))
    if status != 0:
        raise StageFailed(f"remeasure {reference}: {reason(lines, status)}")
    return Metrics.read(out)


@task(task_run_name="gate {model}", cache_policy=NO_CACHE)
def pass_gate(model: str, figures: Metrics, champion: Champion | None, settings: config.Config) -> list[str]:
    """Returns why the candidate must not become champion; empty if it may."""
    found = compatibility.read_of(_PROJECT.compatibility(model), _PROJECT.adapter(model) / WEIGHTS)
    failures = gate.gate_failures(figures, settings.gate, found)
    if champion is not None and champion.fault is not None:
        failures.append(
            f"cannot be compared with {champion.reference}, the {settings.registry.alias}: {champion.fault}"
        )
    elif champion is not None and champion.figures is not None:
        failures += gate.against(figures, champion.figures, settings.gate, champion.reference)
    return failures


@task(task_run_name="publish {model} to {store}", cache_policy=NO_CACHE)
def publish_release(model: str, settings: config.Config, store: str) -> str:
    """Returns the release's address in one of the stores of `publish.to`; idempotent."""
    return publish.publish_release(_PROJECT.release(model), model, settings.publish.to_one(store))


@task(task_run_name="register {model}", cache_policy=NO_CACHE)
def register_release(
    model: str, settings: config.Config, uris: list[str | None], gate_failures: list[str]
) -> registration.Registered:
    """Returns the version of the release in the registry; idempotent.

    Args:
        uris: the release's address in each store; None where it was not published.
    """
    return registration.register_release(
        model, settings.registry, _PROJECT.release(model), uris[0] if uris else None, gate_failures, uris[1:]
    )


@task(task_run_name="costs {model}", cache_policy=NO_CACHE)
def record_costs(model: str, version: registration.Registered, settings: config.Config) -> Spent | None:
    """Writes what was spent since the last version into the tags of a new one, and returns it. None: nothing was."""
    found = costs.uncounted(model)
    if not found or version.deleted:
        return None
    spent = costs.spent(found, settings)
    record(spent, version.name, version.version, settings.registry)
    costs.count_for(model, f"{version.name}/{version.version}")
    return spent


@task(task_run_name="promote {model}", cache_policy=NO_CACHE)
def promote_version(model: str, version: registration.Registered, settings: config.Config) -> str:
    """Moves the configured alias to this version and returns MODEL@ALIAS."""
    return promotion.promote_passed(version, settings.registry, reason="passed the gate")


@task(task_run_name="point channel {model} in {store}", cache_policy=NO_CACHE)
def point_channel(model: str, sha256: str, settings: config.Config, store: str) -> str:
    """Points the published channel with the alias's name at the release, and returns the pointer's address."""
    return publish.point_channel(model, sha256, settings.publish.to_one(store), settings.registry.alias)


@task(task_run_name="channel {model} in {store}", cache_policy=NO_CACHE)
def follow_champion(model: str, settings: config.Config, store: str) -> str | None:
    """Points the channel of a store at the champion's release, which a person may have chosen on MLflow's page.

    Returns:
        The pointer's address; None where there is no champion, or it has no release in this store.
    """
    champion = registry.champion(model, settings.registry)
    own = settings.publish.to_one(store)
    place = open_store(own).uri
    if champion is None or not any(uri.startswith(place) for uri in champion.uris):
        return None
    return publish.point_channel(model, champion.sha256, own, settings.registry.alias)
