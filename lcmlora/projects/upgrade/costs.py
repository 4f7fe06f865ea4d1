"""What the stages cost that an upgrade makes stale, as far as this machine knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lcmlora.dvc_files import resolved
from lcmlora.projects.durations import Durations
from lcmlora.projects.upgrade.staleness import Outlook


@dataclass(frozen=True)
class Cost:
    """How long a stage will take."""

    seconds: float | None  # None where nothing tells
    source: str  # doctor, last run, or why it is not known


def stage_costs(outlook: Outlook, durations: Durations, doctor: Callable[[str], Cost | None]) -> dict[str, Cost]:
    """Returns the cost of each stale stage by its name.

    Args:
        durations: of the last runs on this machine.
        doctor: estimates the distillation of a model; None where it is not asked.
    """
    found = {}
    for stage in outlook.stale:
        estimate = doctor(stage.run.model) if stage.run.stage == "distill" and stage.run.model else None
        last = durations.seconds.get(resolved.entry_name(stage.run))
        if estimate and (estimate.seconds is not None or last is None):
            found[stage.name] = estimate
        elif last is None:
            advice = f"; `lcmlora doctor {stage.run.model}` estimates it" if stage.run.stage == "distill" else ""
            found[stage.name] = Cost(None, f"this machine has not measured it{advice}")
        else:
            steps = "" if stage.steps == 1 else f", for {stage.steps:.3g} times its steps"
            found[stage.name] = Cost(last * stage.steps, f"its last run{steps}")
    return found
