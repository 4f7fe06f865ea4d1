"""Processes that outlive the command that starts them: started, waited for, known again, ended with their children."""

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

from flows.services import Service
from lcmlora.errors import UserError

_MARK = "LCMLORA_UP"  # in the environment of all that was started and of what that started: the part it belongs to
_PATIENCE = 180.0  # seconds that servers may take together; on two busy cores Prefect alone has taken 40
_GRACE = 20.0  # seconds that a part may take to end; SeaweedFS takes 15, the others 2


class Part(BaseModel):
    """A process that was started."""

    pid: int
    digest: str  # of how it was started


def start(
    wanted: list[Service], folder: Path, parts: dict[str, Part], inherited: Callable[[str], Mapping[str, str]]
) -> list[Service]:
    """Starts those that do not run, or run otherwise than wanted, and returns them without waiting for them.

    Args:
        folder: keeps their logs; its parent is the project's, in which a worker runs.
        parts: what is known to run; what is started is written into it.
        inherited: returns the environment that the part of this name gets beside its own.
    """
    started = []
    for service in wanted:
        digest = hashlib.sha256(json.dumps([service.command, service.environment], sort_keys=True).encode()).hexdigest()
        part = parts.get(service.name)
        running = family(folder / service.name)
        if part and part.digest == digest and any(process.pid == part.pid for process in running):
            continue
        if part and part.digest != digest and running:
            print(f"{service.name}: its settings have changed, so it is started anew")
        # A run goes on without its worker, and tells the server itself how it ended; a server's children hold its port.
        if service.name != "worker" or (part and part.digest != digest):
            end(folder / service.name)
        log = folder / f"{service.name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder.parent if service.name == "worker" else folder,
                env={**inherited(service.name), **service.environment, _MARK: str(folder / service.name)},
                # SeaweedFS makes sockets in the shared temporary folder, which are nobody else's; a worker's files are
                # the project's.
                umask=-1 if service.name == "worker" else 0o077,
                start_new_session=True,
            )
        parts[service.name] = Part(pid=process.pid, digest=digest)
        started.append(service)
    return started


def wait(wanted: list[Service], folder: Path, parts: Mapping[str, Part]) -> None:
    """Returns when all answer, saying so of each. Raises UserError with a log's end where one does not."""
    began = time.monotonic()
    waiting = list(wanted)
    if not all(each.answers() for each in wanted):
        print(f"waiting for {', '.join(each.name for each in wanted)} ...", flush=True)
    while waiting:
        for service in list(waiting):
            alive = _is_alive(parts[service.name].pid)
            if service.answers():
                waiting.remove(service)
                print(f"{service.name:10} answers after {time.monotonic() - began:.0f} s", flush=True)
            elif not alive or time.monotonic() > began + _PATIENCE:
                what = "does not answer" if alive else "has ended"
                raise UserError(f"{service.name} {what}; .up/{service.name}.log ends with:\n{_tail(folder, service)}")
        time.sleep(0.2)


def _is_alive(pid: int) -> bool:
    try:
        # A child that has ended is a zombie until it is waited for.
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _tail(folder: Path, service: Service) -> str:
    text = (folder / f"{service.name}.log").read_text(errors="replace")
    return "\n".join(text.splitlines()[-8:])


def family(*marks: Path) -> list[psutil.Process]:
    """Returns the living processes of these parts: what `up` started, and what that started.

    They are known by a variable in their environment, so that a process number of before a reboot misleads nobody.
    """
    found, wanted = [], set(map(str, marks))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) in wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end(*marks: Path) -> int:
    """Ends parts and returns how many processes they had: their groups are asked, and after a while all are killed."""
    found = family(*marks)
    for process in found:
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
    return len(found)
