"""Noticing that the prompts of production have drifted from the training captions, for the `watch` flow."""

from __future__ import annotations

import datetime
import subprocess

from prefect import task
from prefect.cache_policies import NO_CACHE

from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows.memory import Memory
from lcmlora.inference.production import kept_prompts
from lcmlora.io.parsing import Malformed, as_object, parse_json
from lcmlora.io.terminal import shown
from lcmlora.project import Project
from lcmlora.tasks.processes import Processes, python, reason

NO_DRIFT = "none"
FEWEST = 50  # different prompts of a comparison; with fewer of them, more days are waited for


def drift_state(model: str, settings: Config) -> str:
    """Returns a state that changes when the prompts of a model begin to drift, and only then.

    It is NO_DRIFT before the first time, and afterwards says which days drifted last. The prompts of
    `serving.drift_days` days are compared at once, and no day twice, so that `serving.drift_alarms` is the share of
    comparisons that are false alarms. The day that goes on is left for later.

    Raises:
        UserError: the comparison failed.
    """
    remembered = Memory("prompts", settings)
    entry = remembered.read().get(model, {})
    state = str(entry.get("state", NO_DRIFT))
    days = _due(model, settings, entry.get("until"))
    if days is None:
        return state
    since, until = days
    drifted, before = compare(model, since, until), bool(entry.get("drifted"))
    if drifted and not before:
        state = f"prompts from {since} to {until}"
    remembered.write(model, {"state": state, "drifted": before if drifted is None else drifted, "until": until})
    return state


def _due(model: str, settings: Config, until: object) -> tuple[str, str] | None:
    """Returns the first and last day to compare now, None where there are too few.

    Args:
        until: the last day of the last comparison.
    """
    folder = Project().root / settings.serving.prompts
    today = datetime.datetime.now(datetime.UTC).date()
    kept = {day: count for day, count in kept_prompts.days(folder, model).items() if day < today}
    new = {day: count for day, count in kept.items() if not isinstance(until, str) or day.isoformat() > until}
    if not new or (today - min(new)).days < settings.serving.drift_days:
        return None
    first, last = min(new), max(new)
    sample = kept_prompts.sample(folder, model, settings.serving.prompts_a_day, first, last)
    if len({kept.text for kept in sample if kept.text is not None}) < FEWEST:
        return None
    return first.isoformat(), last.isoformat()


@task(task_run_name="look at the prompts of {model}", cache_policy=NO_CACHE)
def compare(model: str, since: str, until: str) -> bool | None:
    """Returns whether the prompts of these days have drifted, None if there are too few prompts or captions to tell.

    Another process embeds them, as this one has no torch.

    Raises:
        UserError: it failed, with its last error line.
    """
    command = python("lcmlora", "prompts", "drift", model, "--since", since, "--until", until, "--json")
    with (
        Processes() as processes,
        processes.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        out, err = process.communicate()
    if process.returncode != 0:
        why = reason(err.decode(errors="replace").splitlines(), process.returncode)
        raise UserError(f"the prompts of {model} cannot be compared: {why}")
    try:
        answer = as_object(parse_json(out), "lcmlora prompts drift --json")
        return None if answer.get("drifted") is None else bool(answer["drifted"])
    except Malformed as error:
        raise UserError(f"lcmlora prompts drift --json: {error}: {shown(out)}") from None
