"""A project deployed on a Prefect server of its own, with a worker of its own: each of them may be killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from lcmlora.flows import services
from lcmlora.io.private import runtime_folder
from tests.integration.tracking_servers import PREFECT, PrefectServer

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

ROOT = Path(__file__).parents[2]
WORKER = "here"
_MARK = "LCMLORA_DEPLOYED"  # environment: the project that a worker and its runs belong to


class Deployed:
    """A project in a folder, deployed as `lcmlora up` does it.

    Args:
        root: the project's folder, with a dvc.yaml and a params.yaml.
        limit: the GPU limit that its params.yaml names.
        server: runs already.
        api: the address at which worker and runs find the server, by default its own.
        variables: of the worker's environment.
    """

    def __init__(
        self,
        root: Path,
        limit: str,
        server: PrefectServer,
        api: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.root, self.limit, self.server = root, limit, server
        self._api, self._variables = api or server.api, dict(variables or {})
        self._worker: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        """Yields a client of the server, which is also what `lcmlora.flows.provision` asks within the block."""
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        reached = {PREFECT_API_URL: self.server.api, PREFECT_API_AUTH_STRING: PREFECT.pair}
        with temporary_settings(reached), get_client(sync_client=True) as client:
            yield client

    def deploy(self) -> UUID:
        """Makes what `up` makes, and returns the deployment of `retrain`, of which one run may go at a time."""
        from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions

        from lcmlora.flows import provision

        with self.client() as client:
            provision.provide(self.limit, pool=services.POOL)
            return client.create_deployment(
                client.create_flow_from_name("retrain"),
                f"scheduled-{self.root.name}",
                work_pool_name=services.POOL,
                entrypoint="lcmlora.flows.retrain.retrain_models",
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(self.root)}}],
                concurrency_limit=1,
                concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
            )

    def start_worker(self) -> None:
        variables = self.root / "variables.json"
        variables.write_text(json.dumps(self._variables))
        service = services.worker(
            self._api, PREFECT, self.root / "prefect", self.root, WORKER, services.POOL, variables
        )
        foreign = ("PREFECT_", "MLFLOW_", "AWS_", "LCMLORA_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        own = {"PYTHONPATH": str(ROOT), "PREFECT_WORKER_QUERY_SECONDS": "2", _MARK: str(self.root)}
        with (self.root / "worker.log").open("ab") as log:
            self._worker = subprocess.Popen(
                service.command,
                cwd=self.root,
                env=kept | services.NO_TELEMETRY | own | service.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill_worker(self) -> None:
        """Kills the worker alone (SIGKILL)."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker = None

    def take_up_runs(self) -> list[str]:
        """Does what a new worker does before it begins."""
        from datetime import UTC, datetime

        from lcmlora.flows import provision

        with self.client():
            return provision.take_up_runs(services.POOL, WORKER, datetime.now(UTC))

    def processes(self) -> list[psutil.Process]:
        """Returns the living processes of worker and runs."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == str(self.root) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        """Kills worker and runs."""
        self.kill_worker()
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.1)

    def start_run(self, deployment: UUID) -> UUID:
        with self.client() as client:
            return client.create_flow_run_from_deployment(deployment).id

    def state(self, run: UUID) -> str:
        with self.client() as client:
            return str(client.read_flow_run(run).state_name)

    def history(self, run: UUID) -> list[str]:
        """Returns the names of the states that a run has had."""
        with self.client() as client:
            return [str(state.name) for state in client.read_flow_run_states(run)]

    def left(self) -> list[str]:
        """Returns what runs that have ended should not have left: slots, a held lock, living processes."""
        until = time.monotonic() + 60  # a run that has ended still sends its events
        while True:
            worker = None if self._worker is None else self._worker.pid
            wrong = [f"{each.pid} lives" for each in self.processes() if each.pid != worker]
            with self.client() as client:
                limits = client.read_global_concurrency_limits(limit=50, offset=0)
                wrong += [f"{each.name}: {each.active_slots} slots" for each in limits if each.active_slots]
            lock = runtime_folder() / f"{self.limit}.lock"
            wrong += [f"{lock} is held"] if lock.exists() and is_locked(lock) else []
            if not wrong or time.monotonic() > until:
                return wrong
            time.sleep(0.5)


def is_locked(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    """Returns what `condition` returns once it is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.2)
    return found
