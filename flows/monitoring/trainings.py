"""The last training of each model, as MLflow has it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from lcmlora.config import Config
from lcmlora.registry import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUNNING = "RUNNING"  # status of an MLflow run

_PAGE = 100  # runs, each with hundreds of figures


class Trainings:
    """Remembers the last training of each model, so that a look reads only those that go on or have begun since."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._place: tuple[str, str] | None = None  # where the remembered ones are
        self._last: dict[str, Run] = {}  # by model
        self._asked: set[str] = set()  # models

    def look(self, settings: Config) -> dict[str, Run]:
        """Returns the run that began last, of each model that has one with a figure of its speed.

        A model that was not looked for before is asked for by itself.

        Raises:
            UserError: MLflow cannot be reached.
        """
        place = (settings.registry.tracking_uri, settings.registry.experiment)
        with self._lock, tracking.reaching(settings.registry, "ask again later"):
            client = tracking.connect(settings.registry)
            found = client.get_experiment_by_name(settings.registry.experiment)
            if found is None:
                return {}
            if place != self._place:
                self._place, self._last, self._asked = place, {}, set()
            # Those that went on at the last look may have ended meanwhile.
            going = [run.info.run_id for run in self._last.values() if run.info.status == RUNNING]
            conditions = [_listed(going[at : at + _PAGE]) for at in range(0, len(going), _PAGE)]
            if self._last:
                newest = max(run.info.start_time for run in self._last.values())
                conditions += [f"attributes.start_time > {newest}", f"attributes.status = '{RUNNING}'"]
            for condition in conditions:
                self._read(client, found.experiment_id, condition)
            for model in settings.models:
                if model not in self._asked:
                    self._read(client, found.experiment_id, f"tags.model = '{model}'", newest=1)
                    self._asked.add(model)
            return {model: run for model, run in self._last.items() if model in settings.models}

    def _read(self, client: MlflowClient, experiment: str, condition: str, newest: int | None = None) -> None:
        token = None
        while True:
            page = client.search_runs(
                [experiment],
                f"metrics.images_per_second > 0 AND {condition}",
                order_by=["attributes.start_time DESC"],
                max_results=newest or _PAGE,
                page_token=token,
            )
            for run in page:
                model = run.data.tags.get("model", "")
                known = self._last.get(model)
                if model and (known is None or run.info.start_time >= known.info.start_time):
                    self._last[model] = run
            token = page.token
            if newest or not token:
                return


def _listed(run_ids: list[str]) -> str:
    return f"attributes.run_id IN ({', '.join(map(repr, run_ids))})"
