"""Addresses of the pages about a run and a version, which messages name."""

from __future__ import annotations

from prefect.context import FlowRunContext
from prefect.utilities.urls import url_for

from lcmlora.config import Config
from lcmlora.flows import has_server
from lcmlora.registry import tracking
from lcmlora.registry.lookup import Version
from lcmlora.registry.registration import PREVIEW
from lcmlora.releases.stores.store import page_of


def flow_run() -> str | None:
    """Returns the id of the present Prefect run, None outside one."""
    context = FlowRunContext.get()
    return str(context.flow_run.id) if context is not None and context.flow_run is not None else None


def of_run(identity: str | None) -> dict[str, str]:
    """Returns the page of a run on Prefect's server; nothing of a temporary server's, which ends with the run."""
    page = url_for("flow-run", identity) if identity and has_server() else None
    return {"Prefect run": page} if page else {}


def of_version(version: Version, settings: Config) -> dict[str, str]:
    """Returns the pages about a version: this run's, MLflow's, the release and its card."""
    found = of_run(flow_run())
    if version.run_id and (page := tracking.run_page(settings.registry, version.run_id)):
        found["MLflow run"] = page
        server = page.partition("/#/")[0]
        found["MLflow version"] = f"{server}/#/models/{version.name}/versions/{version.version}"
        found["pictures"] = f"{server}/get-artifact?run_uuid={version.run_id}&path={PREVIEW}"
    if version.release_uri:
        found["release"] = page_of(version.release_uri)
        found["card"] = page_of(version.release_uri, "README.md")
    return found
