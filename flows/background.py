"""Background processes, which outlive the command that starts them: starting, waiting, finding and ending them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from pydantic import BaseModel

from lcmlora.errors import UserError
from lcmlora.flows.servers import logs, ports
from lcmlora.flows.services import Service

_MARK = "LCMLORA_UP"  # environment variable of a service's processes and their children; its value names the service
_TIMEOUT = 180.0  # seconds for all servers together; on two busy cores Prefect alone has taken 40
_IN_USE = b"address already in use"  # what Python and Go say of a port
_GRACE = 20.0  # seconds for a service to end; SeaweedFS takes 15, the others 2


class StartedProcess(BaseModel):
    """A process that `start` has started."""

    pid: int
    digest: str  # of its command and environment
    log: int = 0  # bytes that its log had when it was started


def start(
    services: list[Service],
    folder: Path,
    started: dict[str, StartedProcess],
    inherited: Callable[[str], Mapping[str, str]],
) -> list[Service]:
    """Starts the services that do not run, or run with other settings, and returns them without waiting for them.

    Args:
        folder: keeps their logs. Its parent is the project's folder, in which a worker runs.
        started: the processes that were started before, by service. The new ones are added.
        inherited: returns the environment that a service of this name gets beside its own.
    """
    new = []
    for service in services:
        digest = hashlib.sha256(json.dumps([service.command, service.environment], sort_keys=True).encode()).hexdigest()
        before = started.get(service.name)
        running = family(folder / service.name)
        if before and before.digest == digest and any(process.pid == before.pid for process in running):
            continue
        if before and before.digest != digest and running:
            print(f"{service.name}: its settings have changed, so it is started again")
        # The children of a dead server keep its port and must end. Those of a dead worker are runs, which may go on.
        if service.name != "worker" or (before and before.digest != digest):
            end(folder / service.name)
        log = folder / f"{service.name}.log"
        logs.rotate(log)
        with log.open("ab") as output:
            size = output.tell()
            process = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder.parent if service.name == "worker" else folder,
                env={
                    **inherited(service.name),
                    **service.environment,
                    _MARK: str(folder / service.name),
                    logs.LOG: str(log),
                },
                # SeaweedFS makes sockets in the shared temporary folder, which others must not use. A worker's files
                # belong to the project and keep the user's umask.
                umask=-1 if service.name == "worker" else 0o077,
                start_new_session=True,
            )
        started[service.name] = StartedProcess(pid=process.pid, digest=digest, log=size)
        new.append(service)
    return new


def wait(services: list[Service], folder: Path, started: Mapping[str, StartedProcess]) -> None:
    """Waits until all services answer, and prints a line for each.

    A service answers when its own processes listen on all of its ports: nobody else is taken for it, or told its
    password.

    Raises:
        Taken: another process has a port of a service.
        UserError: a service has ended or does not answer, with the end of its log.
    """
    began = time.monotonic()
    waiting = list(services)
    if not all(_works(each, started[each.name].pid) for each in services):
        print(f"waiting for {', '.join(each.name for each in services)} ...", flush=True)
    while waiting:
        for service in list(waiting):
            pid = started[service.name].pid
            alive = _is_alive(pid)
            if _works(service, pid):
                waiting.remove(service)
                print(f"{service.name:10} answers after {time.monotonic() - began:.0f} s", flush=True)
            elif ports.are_others(service.ports, pid) or (not alive and _lost_a_port(folder, started, service)):
                raise ports.Taken(service.name)
            elif not alive or time.monotonic() > began + _TIMEOUT:
                fault = "does not answer" if alive else "has ended"
                raise UserError(f"{service.name} {fault}; .up/{service.name}.log ends with:\n{_tail(folder, service)}")
        time.sleep(0.2)


def _works(service: Service, pid: int) -> bool:
    return (not service.ports or ports.listening([pid]) >= set(service.ports)) and service.answers()


def _lost_a_port(folder: Path, started: Mapping[str, StartedProcess], service: Service) -> bool:
    """Returns whether a service that has ended says that another process had its port, who may have it no more."""
    with (folder / f"{service.name}.log").open("rb") as log:
        log.seek(started[service.name].log)
        return _IN_USE in log.read().lower()


def _is_alive(pid: int) -> bool:
    try:
        # A child that has ended is a zombie until it is waited for.
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _tail(folder: Path, service: Service) -> str:
    own = folder / f"{service.name}-log" / "weed.INFO"  # SeaweedFS keeps a log of its own
    return logs.tail(own, of=r"[IWEF]\d{4} ") if own.exists() else logs.tail(folder / f"{service.name}.log")


def family(*marks: Path) -> list[psutil.Process]:
    """Returns the living processes of these services: those that `start` started, and their children.

    An environment variable marks them, which is safer than process numbers: other processes have these after a reboot.
    A project's folder may have been renamed since, where they still work.

    Args:
        marks: FOLDER/NAME of each service.
    """
    processes, services = [], {str(mark): mark for mark in marks}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mark = process.environ().get(_MARK)
            if mark is None or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if mark in services or any(_was_renamed(process, Path(mark), each) for each in services.values()):
                processes.append(process)
    return processes


def _was_renamed(process: psutil.Process, former: Path, mark: Path) -> bool:
    """Returns whether a process of `former` works in the folder of `mark`: that was renamed, and not copied."""
    return (
        former.name == mark.name
        and not former.parent.exists()
        and Path(process.cwd()) in (mark.parent, mark.parents[1])
    )


def end(*marks: Path) -> int:
    """Ends services and returns how many processes they had. Those that do not end in time are killed.

    Args:
        marks: as for `family`.
    """
    processes = family(*marks)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if process.pid == os.getsid(process.pid):
                os.killpg(process.pid, signal.SIGTERM)
    until = time.monotonic() + _GRACE
    while left := family(*marks):
        if time.monotonic() > until:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        time.sleep(0.1)
    return len(processes)
