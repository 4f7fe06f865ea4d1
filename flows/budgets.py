"""The monthly budget of a model (`costs.budget`): past it, scheduled runs leave the model to a person."""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from lcmlora.config import Config
from lcmlora.flows import notify
from lcmlora.flows.outcomes import Outcome
from lcmlora.io.terminal import note
from lcmlora.tasks import costs

_BY_ITSELF = ("SCHEDULE", "AUTOMATION")  # creators of a run that no person has started


def leave_to_a_person(outcome: Outcome, settings: Config) -> bool:
    """Returns whether the model must not train or draw in this run, and tells people of it once a month.

    A run that a person has started goes on, with a warning.
    """
    budget = costs.budget_of(outcome.model, settings)
    if budget is None or not budget.is_spent:
        return False
    if not is_scheduled():
        note(f"warning: {outcome.model}: {budget.line}")
        return False
    advice = f"`lcmlora run {outcome.model}`, or a run of the deployment by hand, goes on all the same"
    outcome.over_budget = f"{budget.line}; {advice}"
    if costs.is_first_notice(outcome.model):
        figures: dict[str, float | str] = {"spent": budget.spent, "budget": budget.budget, "currency": budget.currency}
        event = notify.Event("budget", outcome.over_budget, outcome.model, figures, run=flow_run.id)
        notify.send(event, settings)
    return True


def is_scheduled() -> bool:
    """Returns whether a schedule or an automation has started this run, and no person."""
    if flow_run.id is None:
        return False
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run.id)
    return run.auto_scheduled or (run.created_by is not None and run.created_by.type in _BY_ITSELF)
