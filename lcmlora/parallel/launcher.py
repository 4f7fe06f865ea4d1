"""Starts a verb in many processes, and ends all of them when one fails. The processes of one machine listen nowhere.

Processes on CPUs inherit connected sockets; those on GPUs get a private folder in which NCCL finds its peers. Several
machines meet at `launch.rendezvous`. They exchange text there, which nothing unpickles, but whoever can reach the port
can disturb the training: keep it in a trusted network.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

from lcmlora.config import Launch
from lcmlora.errors import UserError
from lcmlora.io import faults
from lcmlora.io.terminal import shown

if TYPE_CHECKING:
    from torch.distributed import Store

# Environment of a process that was started here:
PARENT = "LCMLORA_LAUNCHER"  # the process id of `launch`
PEERS = "LCMLORA_PEERS"  # numbers of the open sockets to other processes, on one machine
FOLDER = "LCMLORA_LAUNCH_FOLDER"  # where processes on the GPUs of one machine find each other
RENDEZVOUS = "LCMLORA_RENDEZVOUS"  # host:port, of several machines
RUN = "LCMLORA_RUN_ID"  # which processes belong together there; a person sets it, on all machines the same

LEFT = 75  # exit status of a process that ends because another one has ended
_KILL_AFTER = 5.0  # seconds between the signal that asks a process to end and SIGKILL
_POLL = 0.1  # seconds between two checks of the processes
_POLL_STORE = 1.0  # seconds between two questions whether another machine has failed
_JOIN_TIMEOUT = 600.0  # seconds for all machines to join
_PART_TIMEOUT = 60.0  # seconds for which the machine with the store waits for the others to end


def launch(settings: Launch, module: str, arguments: Sequence[str]) -> int:
    """Runs `python -m MODULE ARGUMENTS` in every process of this machine and returns the exit status.

    If one of them fails, the others are ended, too. The status is that of the failed one, or 128 + N if signal N ended
    it. SIGTERM, SIGINT and SIGHUP are passed on to all processes; the status is then 128 + N.

    Raises:
        UserError: the other machines do not join, or belong to another run.
    """
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_caught())
        rendezvous = stack.enter_context(_Rendezvous(settings)) if settings.machines > 1 else None
        processes = stack.enter_context(_started(settings, rendezvous, module, arguments))
        status, reason = _watch(processes, signals, rendezvous)
        if reason:
            print(reason, file=sys.stderr, flush=True)
        if rendezvous:
            rendezvous.part(status, reason)
    return status


@contextlib.contextmanager
def _caught() -> Iterator[list[int]]:
    """Yields a list to which signals that ask to end are added, if this thread can receive them."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def take(number: int, frame: FrameType | None) -> None:
        received.append(number)

    former = {each: signal.signal(each, take) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield received
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _started(
    settings: Launch, rendezvous: _Rendezvous | None, module: str, arguments: Sequence[str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts and yields the processes of this machine, which end with the block at the latest."""
    count = settings.processes
    first = rendezvous.number * count if rendezvous else 0
    common = os.environ | {PARENT: str(os.getpid()), "WORLD_SIZE": str(count * settings.machines)}
    common |= {"LOCAL_WORLD_SIZE": str(count)}
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        if rendezvous:
            common |= {RENDEZVOUS: rendezvous.place, RUN: rendezvous.run}
        else:
            common[FOLDER] = stack.enter_context(tempfile.TemporaryDirectory(prefix="lcmlora-launch-"))
            common.setdefault("NCCL_SOCKET_IFNAME", "lo")
        stack.callback(_end, processes, signal.SIGTERM)
        ends = [[] for _ in range(count)] if rendezvous else _pairs(count, stack)
        for local, sockets in enumerate(ends):
            numbers = [each.fileno() for each in sockets]
            own = {"RANK": str(first + local), "LOCAL_RANK": str(local)}
            own |= {PEERS: ",".join(map(str, numbers))} if numbers else {}
            command = [sys.executable, "-P", "-m", module, *arguments]
            # In a session of its own: Ctrl+C goes to this process, which passes it on once.
            made = subprocess.Popen(command, env=common | own, pass_fds=numbers, start_new_session=True)
            processes.append(made)
        for sockets in ends:  # so that a process's end closes its last one
            for each in sockets:
                each.close()
        yield processes


def _pairs(count: int, stack: contextlib.ExitStack) -> list[list[socket.socket]]:
    """Returns for each process its ends of the socket pairs between the first process and the others."""
    pairs = [socket.socketpair() for _ in range(1, count)]
    for pair in pairs:
        for each in pair:
            stack.callback(each.close)
    return [[here for here, _ in pairs], *([there] for _, there in pairs)]


def _watch(
    processes: Sequence[subprocess.Popen[bytes]], signals: Sequence[int], rendezvous: _Rendezvous | None
) -> tuple[int, str | None]:
    """Waits for the processes, ends those that are left if one fails, and returns the exit status with its reason."""
    asked = time.monotonic()
    while True:
        if signals:
            _end(processes, signals[0])
            return 128 + signals[0], None
        states = [process.poll() for process in processes]
        if any(states):
            status, reason = _failure(processes)
            remote = rendezvous.failure(wait=_KILL_AFTER) if rendezvous and status == LEFT else None
            return status, remote or reason
        if all(state == 0 for state in states):
            return 0, None
        if rendezvous and time.monotonic() - asked > _POLL_STORE:
            asked = time.monotonic()
            if reason := rendezvous.failure():
                _end(processes, signal.SIGTERM)
                return 1, reason
        time.sleep(_POLL)


def _failure(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, str | None]:
    """Ends the other processes; returns the status of the one that failed by itself, and why the others were ended."""
    until = time.monotonic() + _KILL_AFTER
    while not (failed := [(rank, p.returncode) for rank, p in enumerate(processes) if p.poll() not in (None, 0, LEFT)]):
        if time.monotonic() > until or all(process.poll() is not None for process in processes):
            break  # it was the process of another machine
        time.sleep(_POLL / 10)
    _end(processes, signal.SIGTERM)
    if not failed:
        return LEFT, "another process has ended, and so were those of this machine"
    # Where several ended at about the same time, a signal from outside is what began it.
    rank, status = min(failed, key=lambda each: (each[1] > 0, each[0]))
    if status == 2:  # of UserError: it has said what is wrong
        return status, None
    how = f"was ended by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
    likely = f"; {faults.explain_sigkill(faults.verb_of(sys.argv[1:]))}" if -status == signal.SIGKILL else ""
    return (128 - status if status < 0 else status), f"process {rank} {how}, and the others were ended{likely}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _end(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Ends all processes by this signal, and by SIGKILL those that do not end in time."""
    for process in processes:
        process.send_signal(number)
    until = time.monotonic() + _KILL_AFTER
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
    for process in processes:
        process.kill()
        process.wait()


def host_and_port(place: str, setting: str = "launch.rendezvous") -> tuple[str, int]:
    """Returns host and port. Raises UserError if the place, which this setting has, is not host:port."""
    host, _, port = place.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(f"{setting}: {shown(repr(place), 80)} is not host:port, e.g. 10.0.0.5:29400")
    return host.strip("[]"), int(port)


class _Rendezvous:
    """The store of torch, on one of the machines, in which launchers count themselves and report failures.

    It holds text, which nothing unpickles.
    """

    def __init__(self, settings: Launch) -> None:
        assert settings.rendezvous is not None
        self._machines = settings.machines
        self.place = settings.rendezvous
        self.run = os.environ.get(RUN, "")
        if not re.fullmatch("[A-Za-z0-9._-]{16,128}", self.run):
            raise UserError(
                f"{RUN}: is not set; several machines need the same random text in it, so that no other run joins "
                "them: `openssl rand -hex 16` makes one, anew for each run"
            )
        self.number = 0  # of this machine; 0 where the store is

    def __enter__(self) -> _Rendezvous:
        from torch.distributed import DistError, PrefixStore, TCPStore

        host, port = host_and_port(self.place)
        try:
            listening = _listening(host, port)
            here = None if listening is None else listening.detach()
            patience = timedelta(seconds=_JOIN_TIMEOUT)
            store = TCPStore(
                host,
                port,
                is_master=here is not None,
                wait_for_workers=False,
                timeout=patience,
                master_listen_fd=here,
            )
            self._store: Store = PrefixStore(self.run, store)
            self.number = 0 if here is not None else self._store.add("machines", 1)
            if self.number >= self._machines:
                raise UserError(f"{RUN}: more than launch.machines: {self._machines} came with it to {self.place}")
            until = time.monotonic() + _JOIN_TIMEOUT
            while (come := 1 + self._store.add("machines", 0)) < self._machines:
                if time.monotonic() > until:
                    raise UserError(
                        f"launch.rendezvous: {come} of {self._machines} machines came to {self.place} in "
                        f"{_JOIN_TIMEOUT / 60:g} minutes; run the same command on all, with the same {RUN}"
                    )
                time.sleep(_POLL)
        except (DistError, OSError) as error:
            raise UserError(f"launch.rendezvous: {self.place}: {shown(str(error).splitlines()[0], 200)}") from None
        return self

    def failure(self, wait: float = 0.0) -> str | None:
        """Returns the reason that another machine gave when it failed; None if none does within `wait` seconds."""
        from torch.distributed import DistError

        until = time.monotonic() + wait
        try:
            while not (failed := self._store.check(["failed"])) and time.monotonic() < until:
                time.sleep(_POLL)
            if failed:
                return f"on another machine: {shown(self._store.get('failed').decode(errors='replace'), 300)}"
        except DistError:
            return f"{self.place} does not answer any more"
        return None

    def part(self, status: int, reason: str | None) -> None:
        """Reports the status to the other machines. The one with the store waits until they have ended, too."""
        from torch.distributed import DistError

        with contextlib.suppress(DistError):  # the machine with the store has ended, and all is said there
            if status != 0 and not self._store.check(["failed"]):
                self._store.set("failed", reason or f"machine {self.number} ended with status {status}")
            until = time.monotonic() + _PART_TIMEOUT
            gone = self._store.add("gone", 1)
            while self.number == 0 and gone < self._machines and time.monotonic() < until:
                time.sleep(_POLL)
                gone = self._store.add("gone", 0)

    def __exit__(self, *_: object) -> None:
        del self._store


def _listening(host: str, port: int) -> socket.socket | None:
    """Returns a socket that listens at this address alone; None if it is another machine's address, or if another
    launcher of this machine listens there already."""
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen(128)
    except OSError as error:
        made.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return None
        raise
    return made
