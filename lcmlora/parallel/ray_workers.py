"""Workers that are actors of a Ray cluster, or of a Ray of this machine alone, which nobody else can reach.

A node has a worker for each of its GPUs, or `launch.processes` of them on its CPUs; a node that joins gets its own. Ray
is asked for nothing but to start them, to carry pickled tasks and results, and to say when one has died.
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lcmlora import extras
from lcmlora.config import Launch
from lcmlora.errors import UserError
from lcmlora.io.terminal import joined, note, shown
from lcmlora.parallel.dealing import Died, Event
from lcmlora.parallel.launcher import host_and_port
from lcmlora.parallel.worker import Failed, unpickled

# What a Ray of this machine alone listens on is the loopback interface, and whoever asks it needs the token. Ray has no
# option for the former; without clusters, as it calls this on other systems, it uses no other interface.
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "RAY_AUTH_MODE": "token",
}
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}  # which Ray would send to its makers
_OBJECTS = 1 << 30  # bytes of shared memory of a Ray of this machine alone
_POLL = 0.5  # seconds to wait for a result
_LOOK = 2.0  # seconds between two looks at the nodes of the cluster
_REACHED_IN = 10.0  # seconds for a connection to the cluster
_NOTE = 60.0  # seconds without a worker after which this is said
_SAME = ("torch", "diffusers", "transformers", "pillow")  # packages that decide results


class RayActors:
    """Actors of Ray (lcmlora.parallel.dealing.Engine)."""

    def __init__(self, launch: Launch, make: Callable[[], Any], device: str) -> None:
        extras.require("ray", extra="ray", needed_by="launch.engine: ray")
        self._launch, self._on_gpus = launch, device != "cpu"
        self._actors: dict[int, _Actor] = {}
        self._started = 0
        self._looked = self._had = time.monotonic()  # when nodes were looked at, and when there was a worker
        self._stack = ExitStack()
        try:
            self._stack.enter_context(_connected(launch.address))
            import ray

            self._make = ray.put(pickle.dumps(make))
            self._actor, versions = _remote_parts()
            self._expected = versions(_SAME)
            self._place()
        except BaseException:
            self._stack.close()
            raise

    @property
    def size(self) -> int:
        return len(self._actors)

    def give(self, worker: int, task: Any) -> None:
        actor, content = self._actors[worker], pickle.dumps(task)
        actor.handle.expect.remote(actor.given, content)
        actor.answers.append(actor.handle.do.remote(actor.given, content))
        actor.given += 1

    def events(self) -> list[tuple[int, Event]]:
        import ray

        if time.monotonic() - self._looked > _LOOK:
            self._place()
        # Of each actor the first answer, for the others come after it.
        first = {actor.answers[0]: number for number, actor in self._actors.items() if actor.answers}
        if not first:
            time.sleep(_POLL)
            return []
        ready, _ = ray.wait(list(first), num_returns=1, timeout=_POLL)
        more, _ = ray.wait(list(first), num_returns=len(first), timeout=0)
        found = [(first[answer], self._event(first[answer])) for answer in {*ready, *more}]
        if any(isinstance(event, Died) for _, event in found):
            self._place()
        return found

    def end(self, *, at_once: bool) -> None:
        import ray

        for actor in self._actors.values():
            ray.kill(actor.handle)
        self._actors.clear()
        self._stack.close()

    def _event(self, number: int) -> Event:
        """Returns the first answer of an actor as an event."""
        import ray

        actor = self._actors[number]
        try:
            answer = ray.get(actor.answers.popleft())
        except ray.exceptions.RayTaskError as error:  # of Ray or this module, for the actor catches all others
            return Failed(RuntimeError(joined(error)), str(error))
        except ray.exceptions.RayError as error:
            ray.kill(actor.handle)  # it may only be out of reach
            del self._actors[number]
            alive = any(node["NodeID"] == actor.place.node and node["Alive"] for node in ray.nodes())
            said = joined(str(error).partition("Some common causes")[0])
            return Died(f"died on node {actor.place.address}: {shown(said, 300)}", by_itself=alive)
        if isinstance(answer, dict):
            raise UserError(difference(actor.place.address, answer, self._expected))
        event: Event = unpickled(answer)
        return event

    def _place(self) -> None:
        """Starts a worker at each place of the cluster that has none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        taken = {actor.place for actor in self._actors.values()}
        for place in places(ray.nodes(), self._launch.processes, self._on_gpus):
            if place not in taken:
                handle = self._actor.options(
                    num_cpus=place.cpus,
                    num_gpus=place.gpus,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
                ).remote()
                answer = handle.make.remote(self._make, self._expected, Path.cwd(), sys.path)
                self._actors[self._started] = _Actor(place, handle, deque([answer]))
                self._started += 1
        self._looked = time.monotonic()
        if self._actors:
            self._had = self._looked
        elif self._looked - self._had > _NOTE:
            note("launch: no node of the Ray cluster has a CPU or GPU for a worker; waiting for one to join")
            self._had = self._looked


@dataclass(frozen=True)
class Place:
    """Where a worker is: its number on a node, and its share of that."""

    node: str
    address: str
    number: int
    cpus: float
    gpus: int


@dataclass
class _Actor:
    place: Place
    handle: Any
    answers: deque[Any]  # object references: whether it has made its function, then of its tasks
    given: int = 0  # tasks


def places(nodes: list[dict[str, Any]], processes: int, on_gpus: bool) -> list[Place]:
    """Returns where workers should be.

    Args:
        nodes: as Ray describes them.
        processes: on a node without GPUs.
    """
    found = []
    for node in nodes:
        resources = node["Resources"]
        cpus = resources.get("CPU", 0.0)
        if not node["Alive"] or not cpus:  # a head that only manages the cluster has none
            continue
        gpus = int(resources.get("GPU", 0)) if on_gpus else 0
        share = cpus / (gpus or processes)
        for number in range(gpus or processes):
            share_of_cpus = float(int(share)) if share >= 1 else share
            found.append(Place(node["NodeID"], node["NodeManagerAddress"], number, share_of_cpus, 1 if gpus else 0))
    return found


def _remote_parts() -> tuple[Any, Callable[[tuple[str, ...]], dict[str, str | None]]]:
    """Returns the class of the actors, and a function that returns the versions of packages, None for missing ones.

    They are defined here, so that Ray pickles them by value: on a node without lcmlora they can say so.
    """
    import ray

    def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
        import hashlib
        import importlib.metadata
        import importlib.util

        found: dict[str, str | None] = {}
        for package in packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = None
        spec = importlib.util.find_spec("lcmlora")
        if spec is None or spec.origin is None:
            return found | {"lcmlora": None}
        folder, digest = Path(spec.origin).parent, hashlib.sha256()
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder)
            if name.parts[0] not in ("tasks", "flows"):  # in a clone these are links, which are not followed
                digest.update(f"{name.as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return found | {"lcmlora": f"of the source {digest.hexdigest()[:12]}"}

    @ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"ahead": 1})
    class Worker:
        def make(
            self, make: bytes, expected: dict[str, str | None], folder: Path, path: list[str]
        ) -> bytes | dict[str, str | None]:
            """Returns the pickled event, or the versions here if they are not the expected ones.

            Args:
                folder: the driver's current one.
                path: where the driver imports from.
            """
            if (found := versions(tuple(expected))) != expected:
                return found
            from lcmlora.parallel import worker

            if folder.is_dir():
                os.chdir(folder)
            sys.path += [entry for entry in path if entry and entry not in sys.path]
            made = worker.attempt(lambda: worker.Work(worker.unpickled(make)()))
            if isinstance(made, worker.Work):
                self.work = made
            return pickle.dumps(worker.Ready() if isinstance(made, worker.Work) else made)

        @ray.method(concurrency_group="ahead")
        def expect(self, number: int, task: bytes) -> None:
            from lcmlora.parallel import worker

            self.work.expect(number, worker.unpickled(task))

        def do(self, number: int, task: bytes) -> bytes:
            from lcmlora.parallel import worker

            return worker.pickled(self.work.do(number, worker.unpickled(task)))

    return Worker, versions


def difference(address: str, found: dict[str, str | None], expected: dict[str, str | None]) -> str:
    """Returns what is wrong with the packages of a node."""
    name = next(name for name in ("lcmlora", *expected) if found.get(name) != expected[name])
    if found.get(name) is None:
        return f"launch: node {address} of the Ray cluster has no {name}; install there what this machine has"
    return (
        f"launch: node {address} of the Ray cluster has {name} {found[name]}, and this machine {expected[name]}: "
        "install the same on all nodes, or they would make other results"
    )


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connects this process to a Ray cluster, or starts a Ray of this machine alone that ends with the block.

    Raises:
        UserError: there is no such cluster, it refuses this process, or has another version of Ray or Python.
    """
    with ExitStack() as stack:
        asked = _QUIET | ({} if address else ALONE | {"RAY_AUTH_TOKEN": _own_token()})
        stack.enter_context(_environment(asked))  # which Ray reads when it is imported
        import ray

        if ray.is_initialized():  # by the program that calls this
            yield
            return
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        if address:
            options = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lcmlora-ray-", ignore_cleanup_errors=True))
            options |= {"address": "local", "_temp_dir": folder, "object_store_memory": _OBJECTS}
        try:
            if address:  # Ray asks a cluster that is not there for two minutes
                socket.create_connection(host_and_port(address, "launch.address"), _REACHED_IN).close()
            ray.init(**options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise UserError(f"launch.address: {address or 'a Ray of this machine alone'}: {joined(error)}") from None
        stack.callback(ray.shutdown)
        yield


@cache
def _own_token() -> str:
    """Returns a token that is made anew for each process: Ray reads it once in a process."""
    return secrets.token_hex(32)


@contextmanager
def _environment(asked: dict[str, str]) -> Iterator[None]:
    """Sets environment variables in the block; those that a person has set stay."""
    added = {name: value for name, value in asked.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
